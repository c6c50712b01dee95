"""Rebuild the packs of a step from the ledger. Only the rows of the step are read again."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from sftstream.config import DataConfig
from sftstream.identity import differences, identify
from sftstream.ledger.records import Session
from sftstream.ledger.segments import Segments, given, skipped
from sftstream.records import Conversation, Example, Pack, Ref, Refused, Segment
from sftstream.sources import Corpus
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.packing import build_pack
from sftstream.tokenization.encoder import ChatEncoder


class Rebuilder:
    """Builder of packs from the data of a session, opened again: sources, tokenizer and template.

    Raises ValueError or OSError if the sources or the tokenizer cannot be read.
    """

    def __init__(self, session: Session) -> None:
        self.config = _present(session)
        self.corpus = Corpus(self.config.sources)
        tokenizer = self.config.tokenizer
        date = tokenizer.date or datetime.now(UTC).date().isoformat()
        self.encoder = ChatEncoder(
            tokenizer.path,
            tokenizer.template,
            date=date,
            variables=tokenizer.variables,
            policy=self.config,
            backend=tokenizer.backend,
        )
        now = identify(self.config, self.corpus, self.encoder)
        # Another library or version matters only if it makes other tokens, and digests of packs
        # show other tokens.
        now = msgspec.structs.replace(
            now, fast_tokenizer=session.identity.fast_tokenizer, versions=session.identity.versions
        )
        self.changes = differences(msgspec.to_builtins(session.identity), msgspec.to_builtins(now))
        """Differences between the data of the session and the data as it is now."""
        self.empty = self._pack((), ())
        """A pack of an exhausted stream."""
        self.parts: dict[Ref, int] = {}
        """Number of parts of each row with several parts that was read so far."""

    def packs(self, segments: Segments) -> dict[int, Pack]:
        """Return the packs that `segments` describe, by place in the step.

        `segments` are the segments of a step, or of some packs of a step. Raises ValueError if a
        row, trained or skipped, is refused or has another length now.
        """
        examples = self._examples(segments)
        for left_out in segments_as_records(skipped(segments)):
            _example(examples, left_out)
        result = {}
        packed = given(segments)
        for place in np.unique(packed["pack"]).tolist():
            chosen = segments_as_records(packed[packed["pack"] == place])
            if (tokens := sum(segment.length for segment in chosen)) > self.config.capacity:
                raise ValueError(
                    f"pack {place} holds {tokens:,} tokens of {self.config.capacity:,}: the ledger or the "
                    "data changed; restore them"
                )
            result[place] = self._pack(tuple(_example(examples, s) for s in chosen), chosen)
        return result

    def step(self, segments: Segments) -> list[Pack]:
        """Return all packs of a step in order, including the empty packs of exhausted streams."""
        packs = self.packs(segments)
        return [packs.get(place, self.empty) for place in range(self.config.global_batch)]

    def conversation(self, ref: Ref) -> Conversation | None:
        """Return a row as a conversation; None for a row of plain text or token ids.

        Raises Refused if the row is refused now.
        """
        reader = ExampleReader.of(self.corpus, self.encoder)
        reader.expect(ref)
        (loaded,) = reader.load([ref])
        if isinstance(loaded, Refused):
            raise loaded
        return loaded if isinstance(loaded, Conversation) else None

    def _examples(self, segments: Segments) -> Mapping[Ref, list[Example]]:
        """Return the examples of each row of a step, in the order of the row's parts."""
        # A new reader for each step: a reader of a streamed source only moves forward.
        reader = ExampleReader.of(self.corpus, self.encoder)
        refs = dict.fromkeys(segment.ref for segment in segments_as_records(segments))
        for ref in refs:
            reader.expect(ref)
        examples = {}
        for ref in refs:
            try:
                examples[ref] = reader.examples(ref)
            except Refused as refused:
                raise ValueError(
                    f"row {ref.row} of source {ref.source} was trained, but is refused now ({refused}): the source "
                    "changed; restore it"
                ) from None
            if len(examples[ref]) > 1:
                self.parts[ref] = len(examples[ref])
        return examples

    def _pack(self, examples: tuple[Example, ...], segments: tuple[Segment, ...]) -> Pack:
        return build_pack(examples, segments, self.config.capacity, self.encoder.tokenizer.vocabulary.pad_id)


def segments_as_records(segments: Segments) -> tuple[Segment, ...]:
    """Return entries of a ledger as `Segment` records."""
    columns = (segments[name].tolist() for name in ("source", "row", "tokens", "epoch", "part"))
    return tuple(Segment(*values) for values in zip(*columns, strict=True))


def _example(examples: Mapping[Ref, list[Example]], segment: Segment) -> Example:
    parts = examples[segment.ref]
    example = parts[segment.part] if segment.part < len(parts) else None
    if example is None or len(example.tokens) != segment.length:
        now = f"{len(example.tokens)} tokens" if example else f"{len(parts)} parts"
        raise ValueError(
            f"row {segment.row} of source {segment.source} has {now}, but part {segment.part} had {segment.length} tokens "
            "when it was trained: the source changed; restore it"
        )
    return example


def _present(session: Session) -> DataConfig:
    """Return the config of a session with the values that the session used: the number of streams,
    the date printed by the template, and paths that start in the working directory of the session.
    """
    tokenizer = session.data.tokenizer
    template = tokenizer.template and _located(session.directory, tokenizer.template)
    date = session.identity.date or tokenizer.date
    return msgspec.structs.replace(
        session.data,
        streams=session.identity.streams,
        sources=tuple(
            msgspec.structs.replace(source, path=_located(session.directory, source.path))
            for source in session.data.sources
        ),
        tokenizer=msgspec.structs.replace(
            tokenizer, path=_located(session.directory, tokenizer.path), template=template, date=date
        ),
    )


def _located(directory: str, path: str) -> str:
    """Return a relative local path joined to `directory`; return any other path unchanged."""
    if "\n" in path or "{" in path or "://" in path:
        return path  # the text of a template, or a remote path
    local = Path(os.path.join(directory, path))
    return str(local) if glob.has_magic(path) or local.exists() else path
