"""Compare the sources that a run drew from with their weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sftstream.identity import Identity
from sftstream.ledger.once import Listed
from sftstream.ledger.segments import given
from sftstream.state import DataState, StreamState
from sftstream.streaming.order import draws_of_source, draws_of_stream


def compare_mixture(state: DataState, longest: int) -> tuple[int, list[str]]:
    """Return the number of streams whose sources all have rows left, and a line for each of these
    streams that drew more or less from a source than its weight allows.

    `longest` is the number of tokens of the longest conversation: a conversation is drawn whole,
    so a stream may be ahead by its longest conversation.
    """
    identity, unit = state.identity, state.identity.mix_by
    slack = len(identity.sources) * (1 if unit == "conversations" else max(longest, identity.capacity))
    stages = _weights(identity)
    examined, found = 0, []
    for number, stream in state.streams.items():
        if _any_ended(stream, number, identity):
            continue
        examined += 1
        total, weights = sum(stream.mixed), stages[stream.stage]
        for source, amount in enumerate(stream.mixed):
            share = weights[source] / sum(weights)
            if abs(amount - share * total) > slack:
                found.append(
                    f"stream {number} drew {amount:,} of {total:,} {unit.replace('_', ' ')} from source {source}, whose "
                    f"weight is {share:.1%}"
                )
    return examined, found


def shares(listed: Listed, identity: Identity) -> Iterator[str]:
    """Yield for each source of `identity` its share of the trained conversations or tokens."""
    unit, weights = identity.mix_by, _weights(identity)[0]
    wanted = "wanted at the beginning of the run" if identity.stages else "wanted by its weight"
    segments = given(listed.segments)
    amounts: NDArray[np.int64] = {
        "conversations": (segments["part"] == 0).astype(np.int64),
        "tokens": segments["tokens"],
        "trained_tokens": segments["trained_tokens"],
    }[unit]
    reached = np.bincount(segments["source"], weights=amounts, minlength=len(weights))
    for source, amount in enumerate(reached.tolist()):
        yield (
            f"source {source}: {amount / max(reached.sum(), 1):.1%} of trained {unit.replace('_', ' ')}, "
            f"{weights[source] / sum(weights):.1%} {wanted}"
        )


def _weights(identity: Identity) -> list[list[float]]:
    """Return the weights of the sources at the start, and in each stage."""
    first = [
        (1 if source.rows is None else source.rows) * source.repeat if source.weight is None else source.weight
        for source in identity.sources
    ]
    return [first, *(list(stage.weights) for stage in identity.stages)]


def _any_ended(stream: StreamState, number: int, identity: Identity) -> bool:
    """Return True if a source is, or may be, exhausted for a stream."""
    if stream.exhausted:
        return True
    if identity.epochs is None:
        return False
    for index, source in enumerate(identity.sources):
        if source.rows is None:
            return True
        draws = draws_of_source(source.rows, source.repeat, identity.epochs)
        if stream.drawn[index] >= draws_of_stream(draws, number, identity.streams):
            return True
    return False
