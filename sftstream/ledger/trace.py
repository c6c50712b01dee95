"""Show the conversations of a step, rebuilt from the ledger: messages, trained texts, losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sftstream.excerpt import printable
from sftstream.ledger.reader import Ledger
from sftstream.ledger.rebuild import Rebuilder, segments_as_records
from sftstream.ledger.segments import given, skipped
from sftstream.records import Conversation, Message, Pack, Segment

LossOf = Callable[[Pack], np.ndarray]
"""Function that returns the loss of each position of a pack in nats, 0 where no label counts."""


class Traced(NamedTuple):
    """A segment of a step, with its conversation."""

    pack: int
    """Place of the pack in the step, counted from 0."""
    segment: Segment
    start: int
    """Position of the first token in the pack."""
    trained_tokens: int
    location: str
    """File and line, in a form that editors open."""
    conversation: Conversation | None
    """None for a row of plain text or token ids."""
    trained: list[str]
    """Text of each unbroken sequence of trained tokens, in order."""
    loss: float | None
    """Mean loss over the trained tokens, in nats; None without a model or a trained token."""


def trace(ledger: Ledger, step: int, pack: int | None = None, loss_of: LossOf | None = None) -> list[Traced]:
    """Return the conversations of a step, or of one of its packs.

    With `loss_of`, the conversations are sorted by loss, the largest first; otherwise they are in
    the order of the packs. Skipped conversations are left out (see `left_out`). Raises ValueError
    if the ledger lacks the step, if the step has no such pack, or if a source changed.
    """
    segments = given(ledger.segments(step))
    session = ledger.session(step)
    packs = session.identity.global_batch
    if pack is not None and not 0 <= pack < packs:
        raise ValueError(f"pack {pack} does not exist: step {step} has the packs 0 to {packs - 1}; name one of them")
    rebuilder = Rebuilder(session)
    if rebuilder.changes:
        raise ValueError(f"the data is not the data of step {step}: {rebuilder.changes[0]}; restore it")
    chosen = segments if pack is None else segments[segments["pack"] == pack]
    result: list[Traced] = []
    for place, built in rebuilder.packs(chosen).items():
        records = segments_as_records(chosen[chosen["pack"] == place])
        result += _traced(rebuilder, place, built, records, loss_of(built) if loss_of else None)
    if loss_of:
        result.sort(key=lambda traced: -1.0 if traced.loss is None else traced.loss, reverse=True)
    return result


def left_out(ledger: Ledger, step: int, pack: int | None = None) -> list[str]:
    """Return a line for each conversation that was skipped in a step, or in one of its packs."""
    segments = skipped(ledger.segments(step))
    chosen = segments if pack is None else segments[segments["pack"] == pack]
    return [
        f"pack {place}: row {row} of source {source} in epoch {epoch}{f', part {part}' if part else ''} was skipped"
        for place, row, source, epoch, part in zip(
            *(chosen[name].tolist() for name in ("pack", "row", "source", "epoch", "part")), strict=True
        )
    ]


def describe(traced: Traced, width: int) -> Iterator[str]:
    """Yield the lines that show a conversation; `width` limits the characters of each text."""
    segment = traced.segment
    part = f", part {segment.part}" if segment.part else ""
    loss = "" if traced.loss is None else f"; loss {traced.loss:.4f}"
    yield printable(
        f"pack {traced.pack}, tokens {traced.start} to {traced.start + segment.length}: {traced.location} (row {segment.row} "
        f"of source {segment.source}, epoch {segment.epoch}{part}); {traced.trained_tokens} of {segment.length} tokens "
        f"trained{loss}"
    )
    for message in traced.conversation.messages if traced.conversation else ():
        yield f"  {message.role}: {_short(_text(message), width)}"
    for text in traced.trained:
        yield f"  trained: {_short(text, width)}"


def _traced(
    rebuilder: Rebuilder, place: int, pack: Pack, segments: tuple[Segment, ...], losses: np.ndarray | None
) -> Iterator[Traced]:
    labels = pack.labels.numpy() >= 0
    for segment, start, end in zip(segments, pack.borders.tolist(), pack.borders[1:].tolist(), strict=False):
        count = int(labels[start:end].sum())
        loss = float(losses[start:end].sum() / count) if losses is not None and count else None
        yield Traced(
            place,
            segment,
            start,
            count,
            rebuilder.corpus.locate_row(segment.source, segment.row),
            rebuilder.conversation(segment.ref),
            _trained_texts(rebuilder, pack, start, end),
            loss,
        )


def _trained_texts(rebuilder: Rebuilder, pack: Pack, start: int, end: int) -> list[str]:
    """Return the text of each unbroken sequence of trained tokens at positions `start` to `end`."""
    trained = np.concatenate([[False], pack.trained[start:end], [False]])
    edges = np.flatnonzero(trained[1:] != trained[:-1]) + start
    return [
        rebuilder.encoder.tokenizer.hf.decode(pack.ids[first:last])
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    ]


def _text(message: Message) -> str:
    calls = [f"calls {call.name}({call.arguments})" for call in message.tool_calls]
    thought = [f"<reasoning> {message.reasoning}"] if message.reasoning else []
    return " ".join([*thought, *([message.content] if message.content else []), *calls])


def _short(text: str, width: int) -> str:
    """Return a text as a printable line of at most `width` characters."""
    # Escaped before it is cut, so that the shown line has at most `width` characters.
    line = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= width else f"{line[: width - 3]}..."
