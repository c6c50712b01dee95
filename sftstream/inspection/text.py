"""Describe a data state in lines of text, and list the differences between two states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UnsetType

from sftstream.config import SkipConfig
from sftstream.identity import differences
from sftstream.records import Amount
from sftstream.sources import FileIdentity
from sftstream.state import DataState, StateDict


def describe(state: StateDict | DataState) -> str:
    """Return a text for people: progress, sources, refusals, accepted changes."""
    data = DataState.parse(state)
    lines = [
        *_progress_lines(data),
        *_source_lines(data),
        *_count_lines(data),
        *_skip_lines(data.identity.skip),
        *(f"accepted at pack {c.packs}: {'; '.join(c.differences)}" for c in data.history),
    ]
    if exhausted := sum(stream.exhausted for stream in data.streams.values()):
        lines.append(f"exhausted streams: {exhausted}")
    return "\n".join(lines)


def _progress_lines(data: DataState) -> list[str]:
    streams, identity = data.streams.values(), data.identity
    packs = sum(stream.packs for stream in streams)
    conversations = sum(stream.conversations for stream in streams)
    tokens = sum(stream.tokens for stream in streams)
    # After a change of capacity, the number of packs of each size is unknown, and so is the fill.
    same_capacity = not any(d.startswith("data.capacity:") for change in data.history for d in change.differences)
    fill = f", {tokens / (packs * identity.capacity):.2%} full" if packs and same_capacity else ""
    waiting = sum(len(stream.waiting) for stream in streams)
    return [
        f"pack {data.packs} is next; streams here: {len(streams)} of {identity.streams}",
        f"returned: {packs:,} packs, {conversations:,} conversations, {tokens:,} tokens{fill}",
        f"read and waiting: {waiting:,} conversations",
    ]


def _source_lines(data: DataState) -> list[str]:
    streams, sources = data.streams.values(), data.identity.sources
    accepted = [
        sum((stream.accepted[index] for stream in streams if stream.accepted), Amount())
        for index in range(len(sources))
    ]
    total = sum(accepted, Amount())
    lines = []
    for index, source in enumerate(sources):
        drawn = sum(stream.drawn[index] for stream in streams)
        more = ", ..." if len(source.files) > 3 else ""
        names = ", ".join(file.name for file in source.files[:3]) + more
        line = f"source {index} ({names}): {drawn:,} rows drawn"
        line += f", {drawn / source.rows:.3f} epochs" if source.rows else ""
        line += _sampled(source.files, data.digests_in_full.get(index, {}))
        line += _unread(data.unread_columns, index)
        line += _shares(accepted[index], total) if len(sources) > 1 and total.conversations else ""
        lines.append(line)
    return lines


def _unread(columns: Mapping[int, Sequence[str]] | UnsetType, source: int) -> str:
    names = () if isinstance(columns, UnsetType) else columns.get(source, ())
    return f"; nothing reads {', '.join(names)}" if names else ""


def _sampled(files: Sequence[FileIdentity], digests: Mapping[int, str]) -> str:
    sampled = sum(file.sampled and number not in digests for number, file in enumerate(files))
    return f"; {sampled} of {len(files)} files sampled, not yet read in full" if sampled else ""


def _skip_lines(skip: SkipConfig | UnsetType) -> list[str]:
    if isinstance(skip, UnsetType):
        return []
    steps = ", ".join(f"{first} to {last}" for first, last in skip.steps) or "none"
    return [f"skipped: {len(skip.rows):,} rows in every epoch; steps: {steps}"]


def _shares(part: Amount, total: Amount) -> str:
    trained = part.trained_tokens / max(total.trained_tokens, 1)
    return (
        f"; {part.conversations / total.conversations:.1%} of conversations, "
        f"{part.tokens / total.tokens:.1%} of tokens, {trained:.1%} of trained tokens"
    )


def _count_lines(data: DataState) -> list[str]:
    streams = data.streams.values()
    notes = sum((Counter(stream.notes) for stream in streams), Counter[str]())
    refused = sum((Counter(reasons) for stream in streams for reasons in stream.refused), Counter[str]())
    return [
        *(f"{note}: {count:,}" for note, count in notes.most_common()),
        *(f"refused, {reason}: {count:,}" for reason, count in refused.most_common()),
    ]


def diff(a: StateDict | DataState, b: StateDict | DataState) -> list[str]:
    """Return the differences between two states, as `path: in a -> in b`."""
    first, second = (msgspec.to_builtins(DataState.parse(state)) for state in (a, b))
    return differences(first, second, "state")
