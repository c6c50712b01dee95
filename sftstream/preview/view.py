"""Take packs apart for display: the text, id and role of each token, and the refused rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import msgspec

from sftstream.loader import PackLoader
from sftstream.preview.parts import Part, parts_of
from sftstream.records import Conversation, Pack, Refused, Segment
from sftstream.streaming.example_reader import ExampleReader

TEMPLATE, TEXT = "template", "text"
"""Roles of tokens that belong to no message: those of the template, and those of a row of plain
text or token ids."""
ROLES = ("system", "user", "assistant", "tool", TEMPLATE, TEXT)


class TokenView(msgspec.Struct, frozen=True, array_like=True):
    """A token of a pack."""

    id: int
    text: str
    """The characters of the token; of a token with a part of a character, its bytes as escapes."""
    trained: bool
    """True if the token counts in the loss."""
    special: bool
    """True for a special token of the tokenizer, False for words that only look like one."""


class RunView(msgspec.Struct, frozen=True, kw_only=True):
    """Neighbouring tokens of one message, or of the template between two messages."""

    role: str
    """A member of `ROLES`."""
    message: int | None
    """Index of the message in the conversation."""
    position: int
    """Position of the first token in its conversation, counted from 0."""
    tokens: tuple[TokenView, ...]

    @property
    def trained(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(token.trained for token in self.tokens)


class ConversationView(msgspec.Struct, frozen=True, kw_only=True):
    """A segment of a pack."""

    source: int
    row: int
    epoch: int
    part: int
    location: str
    """File and line, in a form that editors open."""
    start: int
    """Position of the first token in the pack."""
    length: int
    trained: int
    runs: tuple[RunView, ...]


class RefusedView(msgspec.Struct, frozen=True, kw_only=True):
    """A refused row."""

    source: int
    row: int
    location: str
    reason: str
    detail: str


class PackView(msgspec.Struct, frozen=True, kw_only=True):
    """A pack."""

    number: int
    """Number of the pack in the run, counted from 0."""
    stream: int
    capacity: int
    tokens: int
    """Tokens without padding."""
    trained: int
    digest: str
    conversations: tuple[ConversationView, ...]

    @property
    def fill(self) -> float:
        """Share of the slots with tokens."""
        return self.tokens / self.capacity


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """Some packs of a run, and the rows refused until the last of them."""

    tokenizer: str
    sources: tuple[str, ...]
    """Paths of the sources."""
    streams: int
    packs: tuple[PackView, ...]
    refused: tuple[RefusedView, ...]


def preview(loader: PackLoader, skip: int, count: int) -> Preview:
    """Return up to `count` packs of a loader after the next `skip` packs.

    Raises ValueError if the data ends before the first of these packs.
    """
    builder = _Builder(loader)
    packs: list[PackView] = []
    refused: list[RefusedView] = []
    first = loader.state.packs
    for number, pack in enumerate(loader, first):
        refused += builder.refused(pack)
        if number >= first + skip and (pack.segments or not pack.exhausted):
            packs.append(builder.pack(number, pack))
        if number + 1 == first + skip + count:
            break
    if not packs:
        raise ValueError(f"pack {first + skip} does not exist: the data ends before it; give a smaller number")
    return Preview(
        tokenizer=loader.encoder.tokenizer.name,
        sources=tuple(source.path for source in loader.config.sources),
        streams=loader.config.stream_count,
        packs=tuple(packs),
        refused=tuple(refused),
    )


class _Mark(NamedTuple):
    """The message of a token."""

    role: str
    message: int | None


class _Builder:
    def __init__(self, loader: PackLoader) -> None:
        self._loader = loader
        self._encoder = loader.encoder
        self._special = frozenset(loader.encoder.tokenizer.vocabulary.special)

    def refused(self, pack: Pack) -> Iterator[RefusedView]:
        for refusal in pack.refused:
            yield RefusedView(
                source=refusal.source,
                row=refusal.row,
                location=self._loader.locate_row(refusal),
                reason=refusal.reason,
                detail=refusal.detail,
            )

    def pack(self, number: int, pack: Pack) -> PackView:
        # A new reader for each pack: a reader of a streamed source only moves forward.
        reader = ExampleReader.of(self._loader.corpus, self._encoder)
        for segment in pack.segments:
            reader.expect(segment.ref)
        conversations = [
            self._conversation(reader, pack, segment, start, end)
            for segment, (start, end) in zip(pack.segments, pairwise(pack.borders.tolist()), strict=False)
        ]
        return PackView(
            number=number,
            stream=number % self._loader.config.stream_count,
            capacity=pack.capacity,
            tokens=pack.tokens,
            trained=pack.trained_tokens,
            digest=pack.digest(),
            conversations=tuple(conversations),
        )

    def _conversation(
        self, reader: ExampleReader, pack: Pack, segment: Segment, start: int, end: int
    ) -> ConversationView:
        (loaded,) = reader.load([segment.ref])
        if isinstance(loaded, Refused):
            raise loaded
        ids = pack.ids[start:end].tolist()
        # The first token of a segment is predicted by no token, so it never counts in the loss.
        trained = [False, *pack.trained[start + 1 : end].tolist()]
        part = parts_of(self._encoder, loaded)[segment.part] if isinstance(loaded, Conversation) else None
        texts, marks = self._texts(ids, part), self._marks(ids, part)
        special = [self._encoder.tokenizer.token_text(token) in self._special for token in ids]
        tokens = list(map(TokenView, ids, texts, trained, special))
        return ConversationView(
            source=segment.source,
            row=segment.row,
            epoch=segment.epoch,
            part=segment.part,
            location=self._loader.corpus.locate_row(segment.source, segment.row),
            start=start,
            length=end - start,
            trained=sum(trained),
            runs=tuple(_runs(tokens, marks)),
        )

    def _texts(self, ids: Sequence[int], part: Part | None) -> list[str]:
        ranges = self._ranges(ids, part)
        if part is None or ranges is None:
            return [self._encoder.tokenizer.hf.decode([token]) for token in ids]
        text = part.rendered.text
        lengths = self._encoder.tokenizer.vocabulary.byte_lengths
        # Tokens that share a character have the same range; each shows its own bytes.
        shared = [a == b and first < last for a, b in pairwise(ranges) for first, last in [a]]
        torn = [x or y for x, y in zip([*shared, False], [False, *shared], strict=True)]
        if lengths is None or not any(torn):
            return [text[first:last] for first, last in ranges]
        whole, at, texts = text.encode("utf-8", "surrogatepass"), 0, []
        for token, (first, last), cut in zip(ids, ranges, torn, strict=True):
            size = int(lengths[token])
            texts.append(whole[at : at + size].decode(errors="backslashreplace") if cut else text[first:last])
            at += size
        return texts

    def _ranges(self, ids: Sequence[int], part: Part | None) -> list[tuple[int, int]] | None:
        """Return the characters of each token; None if another tokenization gave the ids."""
        if part is None:
            return None
        ranges = self._encoder.tokenizer.ranges(part.rendered)
        return ranges if len(ranges) == len(ids) else None

    def _marks(self, ids: Sequence[int], part: Part | None) -> list[_Mark]:
        ranges = self._ranges(ids, part)
        if part is None or ranges is None:
            return [_Mark(TEXT, None)] * len(ids)
        messages = part.conversation.messages
        of_character = [_Mark(TEMPLATE, None)] * (len(part.rendered.text) + 1)
        for start, end, message in self._encoder.renderer.message_ranges(part.conversation):
            of_character[start:end] = [_Mark(messages[message].role, message)] * (end - start)
        return [of_character[first] for first, _ in ranges]


def _runs(tokens: Sequence[TokenView], marks: Sequence[_Mark]) -> Iterator[RunView]:
    position = 0
    for mark, group in groupby(zip(marks, tokens, strict=True), key=lambda pair: pair[0]):
        run = tuple(token for _, token in group)
        yield RunView(role=mark.role, message=mark.message, position=position, tokens=run)
        position += len(run)
