"""Compare the tokens of waiting rows with a state's digests, after a change of library versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat

from sftstream.records import Example, Refused, Segment
from sftstream.sources import Corpus
from sftstream.state import StreamState
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.packing import example_digest, joined
from sftstream.tokenization.encoder import ChatEncoder


def require_equal_tokens(
    changed: Sequence[str], streams: Mapping[int, StreamState], corpus: Corpus, encoder: ChatEncoder
) -> None:
    """Raise ValueError naming versions and row if the waiting rows of `streams` give other tokens.

    `changed` holds the changed versions. Of a state without digests only lengths are compared.
    """
    for stream in streams.values():
        reader = ExampleReader.of(corpus, encoder)
        reader.remember(stream.known_bookmarks)
        for segment in stream.waiting:
            reader.expect(segment.ref)
        for segments, digest in _groups(stream):
            examples = [_example(reader, segment) for segment in segments]
            problem = _difference(segments, examples, digest)
            if problem:
                raise ValueError(
                    f"the libraries changed ({', '.join(changed)}), and {problem}; install the versions from before, or "
                    "accept the new tokens of rows still to come by data.accept_changed = ['data.versions']"
                )


def _groups(stream: StreamState) -> Iterator[tuple[tuple[Segment, ...], int | None]]:
    """Yield the segments of each planned pack and leftover with their digest, None if absent."""
    digests = stream.digests if isinstance(stream.digests, tuple) else repeat(None)
    return zip(chain(stream.planned, ((leftover.segment,) for leftover in stream.leftovers)), digests, strict=False)


def _example(reader: ExampleReader, segment: Segment) -> Example | None:
    try:
        return reader.examples(segment.ref)[segment.part]
    except (Refused, IndexError):
        return None


def _difference(segments: Sequence[Segment], examples: Sequence[Example | None], digest: int | None) -> str | None:
    """Return the first difference in words, or None if there is none."""
    found = []
    for segment, example in zip(segments, examples, strict=True):
        row = f"row {segment.row} of source {segment.source}"
        if example is None:
            return f"{row} gave {segment.length} tokens before and is refused now"
        if len(example.tokens) != segment.length:
            return f"{row} gave {segment.length} tokens before and gives {len(example.tokens)} now"
        found.append(example)
    if digest is None or example_digest(joined(found)) == digest:
        return None
    rows = ", ".join(f"{segment.row} of source {segment.source}" for segment in segments[:5])
    return f"the rows planned together give other tokens or trained spans than before (row {rows})"
