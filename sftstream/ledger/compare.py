"""Find the first difference between the ledgers of two runs."""

from __future__ import annotations

from sftstream.ledger.reader import Ledger
from sftstream.ledger.segments import SEGMENT, SKIPPED, Segments


def compare(a: Ledger, b: Ledger) -> tuple[str | None, int]:
    """Return the first difference between two runs, or None, and the number of equal steps.

    Compares the steps that both runs have made: segments, then digests, then refused rows. Raises
    ValueError if a ledger cannot be read.
    """
    for count, (one, other) in enumerate(zip(a.steps, b.steps, strict=False)):
        if one.step != other.step:
            return f"the next step is {one.step} in A and {other.step} in B", count
        if difference := _segments(one.segments, other.segments):
            return f"step {one.step}, {difference}", count
        lines = [ledger.metrics.get(one.step) for ledger in (a, b)]
        digests = [line.batch_digest for line in lines if line]
        if len(set(digests)) > 1:
            return (
                f"step {one.step} has equal rows of equal lengths, but other tokens: digest {digests[0][:12]} in A, "
                f"{digests[1][:12]} in B"
            ), count
    count = min(len(a.steps), len(b.steps))
    last = a.steps[count - 1].step if count else 0
    refused = [{(x.step, *x.ref, x.reason) for x in ledger.refused if x.step <= last} for ledger in (a, b)]
    if differing := sorted(refused[0] ^ refused[1]):
        step, source, row, epoch, reason = differing[0]
        where = "A" if differing[0] in refused[0] else "B"
        return (
            f"step {step}: row {row} of source {source} is refused in epoch {epoch} in {where} alone ({reason})",
            count,
        )
    return None, count


def _segments(one: Segments, other: Segments) -> str | None:
    """Return the first difference between the segments of a step in A and in B."""
    for index in range(min(len(one), len(other))):
        if one[index] != other[index]:
            return f"pack {min(one['pack'][index], other['pack'][index])}: {_words(one, index)} in A, {_words(other, index)} in B"
    if len(one) == len(other):
        return None
    longer, where = (one, "A") if len(one) > len(other) else (other, "B")
    index = min(len(one), len(other))
    return f"pack {longer['pack'][index]}: {_words(longer, index)} in {where} alone"


def _words(segments: Segments, index: int) -> str:
    values = {name: segments[name][index].item() for name in SEGMENT.names or ()}
    part = f" part {values['part']}" if values["part"] else ""
    trained = "skipped" if values["trained_tokens"] == SKIPPED else f"{values['trained_tokens']} trained"
    return (
        f"row {values['row']}{part} of source {values['source']} in epoch {values['epoch']} with {values['tokens']} tokens, "
        f"{trained}, in pack {values['pack']}"
    )
