"""Summarize a data state for people and programs: sources, streams, mixture, refusals, identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import UNSET

from sftstream.config import SkipConfig
from sftstream.identity import Identity
from sftstream.records import Amount
from sftstream.state import Change, DataState, StreamState


class Share(msgspec.Struct, frozen=True):
    """Shares of one source in all that was read, each from 0 to 1; 0 if nothing was read."""

    conversations: float
    tokens: float
    trained_tokens: float


class SourceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a source over all streams of the state."""

    files: tuple[str, ...]
    """Names of the files."""
    rows: int | None
    """Number of rows; None for a streamed source."""
    drawn: int
    """Rows drawn, over all epochs."""
    epochs: float | None
    """`drawn` divided by `rows`; None for a streamed source."""
    accepted: Amount
    """Conversations, tokens and trained tokens that were read, without refused rows."""
    share: Share
    """Mixture reached: the share of `accepted` in the sum over all sources."""
    refused: dict[str, int]
    """Reason -> number of refused rows."""
    weight: float | None
    repeat: float


class StreamSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a logical stream."""

    number: int
    drawn: tuple[int, ...]
    """Rows drawn from each source."""
    stage: int
    """Mixture stages entered."""
    windows: int
    packs: int
    conversations: int
    tokens: int
    waiting: int
    """Examples read but not yet returned in a pack."""
    refused: int
    exhausted: bool


class StateSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A data state in numbers."""

    packs: int
    """Number of the run's next pack."""
    steps: int
    """Steps completed: `packs` divided by `global_batch`."""
    global_batch: int
    stream_count: int
    """Logical streams of the run, of which a shard's state holds some."""
    returned_packs: int
    conversations: int
    tokens: int
    fill: float | None
    """Share of the returned packs' slots with tokens; None before the first pack, or if the
    capacity was changed."""
    waiting: int
    sources: tuple[SourceSummary, ...]
    streams: tuple[StreamSummary, ...]
    refused: dict[str, int]
    """Reason -> number of refused rows, over all sources, the most frequent first."""
    notes: dict[str, int]
    """Modification -> number of conversations."""
    unread_columns: dict[int, tuple[str, ...]]
    """Number of a source -> columns that no layout reads."""
    accepted: tuple[Change, ...]
    """Changes of data or settings that a resume accepted."""
    identity: dict[str, str]
    """Settings and digests that decide the packs, as short texts."""


def summarize(state: DataState) -> StateSummary:
    """Return the summary of a data state."""
    streams, identity = state.streams, state.identity
    packs, tokens = (sum(getattr(stream, name) for stream in streams.values()) for name in ("packs", "tokens"))
    resized = any(line.startswith("data.capacity:") for change in state.history for line in change.differences)
    refused = _total(reasons for stream in streams.values() for reasons in stream.refused)
    unread = state.unread_columns
    return StateSummary(
        packs=state.packs,
        steps=state.packs // identity.global_batch,
        global_batch=identity.global_batch,
        stream_count=identity.streams,
        returned_packs=packs,
        conversations=sum(stream.conversations for stream in streams.values()),
        tokens=tokens,
        fill=tokens / (packs * identity.capacity) if packs and not resized else None,
        waiting=sum(len(stream.waiting) for stream in streams.values()),
        sources=_sources(state),
        streams=tuple(_stream(number, stream) for number, stream in streams.items()),
        refused=refused,
        notes=_total(stream.notes for stream in streams.values()),
        unread_columns={} if isinstance(unread, msgspec.UnsetType) else unread,
        accepted=state.history,
        identity=_identity(identity),
    )


def _sources(state: DataState) -> tuple[SourceSummary, ...]:
    streams = list(state.streams.values())
    accepted = [
        sum((stream.accepted[index] for stream in streams if stream.accepted), Amount())
        for index in range(len(state.identity.sources))
    ]
    total = sum(accepted, Amount())
    result = []
    for index, source in enumerate(state.identity.sources):
        drawn = sum(stream.drawn[index] for stream in streams)
        result.append(
            SourceSummary(
                files=tuple(file.name for file in source.files),
                rows=source.rows,
                drawn=drawn,
                epochs=drawn / source.rows if source.rows else None,
                accepted=accepted[index],
                share=_share(accepted[index], total),
                refused=_total(stream.refused[index] for stream in streams if stream.refused),
                weight=source.weight,
                repeat=source.repeat,
            )
        )
    return tuple(result)


def _share(part: Amount, total: Amount) -> Share:
    return Share(
        part.conversations / max(total.conversations, 1),
        part.tokens / max(total.tokens, 1),
        part.trained_tokens / max(total.trained_tokens, 1),
    )


def _stream(number: int, stream: StreamState) -> StreamSummary:
    return StreamSummary(
        number=number,
        drawn=stream.drawn,
        stage=stream.stage,
        windows=stream.windows,
        packs=stream.packs,
        conversations=stream.conversations,
        tokens=stream.tokens,
        waiting=len(stream.waiting),
        refused=sum(sum(reasons.values()) for reasons in stream.refused),
        exhausted=stream.exhausted,
    )


def _identity(identity: Identity) -> dict[str, str]:
    """Return the settings that decide the packs, digests cut to 12 characters."""
    values: dict[str, object] = {
        "format": identity.format,
        "tokenizer": identity.tokenizer_sha256[:12],
        "template": identity.template_sha256[:12],
        "ids by": identity.fast_tokenizer or "tokenizers",
        "versions": ", ".join(f"{name} {version}" for name, version in identity.versions.items()),
        "date": identity.date or "none printed",
        "capacity": identity.capacity,
        "window": identity.window,
        "overflow": identity.overflow,
        "trained roles": ", ".join(identity.train_on),
        "history": identity.history,
        "shuffle": identity.shuffle,
        "seed": identity.seed,
        "epochs": "without end" if identity.epochs is None else identity.epochs,
        "mixed by": identity.mix_by,
        "variables": "" if identity.variables is UNSET else identity.variables,
        "skip": "" if identity.skip is UNSET else _skip(identity.skip),
    }
    return {name: str(value) for name, value in values.items() if value != ""}


def _skip(skip: SkipConfig) -> str:
    spans = ", ".join(f"{first} to {last}" for first, last in skip.steps)
    parts = [f"{len(skip.rows):,} rows"] * bool(skip.rows) + [f"steps {spans}"] * bool(spans)
    return "; ".join(parts)


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of several counts by name, the largest first."""
    return dict(sum(map(Counter, counts), Counter[str]()).most_common())
