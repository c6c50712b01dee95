"""Prove from ledger, metrics and sources that a run, finished or not, trained the right rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.config import SkipConfig
from sftstream.identity import Identity
from sftstream.ledger.mixture import compare_mixture, shares
from sftstream.ledger.once import Listed, astray, draws_of, moved, repeated, unbalanced
from sftstream.ledger.reader import Ledger, refs_of
from sftstream.ledger.rebuild import Rebuilder
from sftstream.ledger.records import Session, StepLine, StepSegments
from sftstream.ledger.segments import NO_SEGMENTS, SKIPPED, Segments, given, segments_of, skipped
from sftstream.records import Ref, batch_digest
from sftstream.source_changes import follow_sources
from sftstream.sources import FileSet
from sftstream.state import DataState
from sftstream.streaming.order import draws_of_source


class Report(NamedTuple):
    """The result of an audit: statements proved, contradictions, and statements not examined."""

    proved: list[str]
    differences: list[str]
    """Contradictions, each with the first step or row that shows it."""
    not_shown: list[str]
    """Statements that could not be examined, with the reason."""


def audit(ledger: Ledger, rebuild: int | None = None) -> Report:
    """Return the report on the run of `ledger`.

    `rebuild` is the number of evenly spread steps whose packs are built again from the sources;
    None for all steps. Raises ValueError or OSError if the ledger or a source cannot be read.
    """
    return _Audit(ledger).report(rebuild)


class _Audit:
    """An audit under way. Each `_check` method adds to `proved`, `differences` and `not_shown`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._report = Report([], [], [])
        steps, segments = ledger.up_to()
        self._all = Listed(steps, segments)
        self._opened: list[tuple[Session, Rebuilder]] = []

    def report(self, rebuild: int | None) -> Report:
        """Run all checks, the cheap checks first."""
        if not self._ledger.steps:
            self._report.not_shown.append("everything: the run has finished no step")
            return self._report
        self._check_steps()
        self._check_capacity()
        self._check_totals()
        self._check_skips()
        self._check_unapplied()
        self._check_once()
        self._check_digests(rebuild)
        self._check_parts()
        return self._report

    @cached_property
    def _last(self) -> Rebuilder:
        return self._rebuilder(self._ledger.sessions[-1])

    def _rebuilder(self, session: Session) -> Rebuilder:
        """Return the Rebuilder of a session. Sessions with equal data share a Rebuilder."""
        for known, rebuilder in self._opened:
            if (known.data, known.identity) == (session.data, session.identity):
                return rebuilder
        self._opened.append((session, Rebuilder(session)))
        return self._opened[-1][1]

    def _check_steps(self) -> None:
        numbers = [step.step for step in self._ledger.steps]
        missing = [before + 1 for before, after in pairwise(numbers) if after != before + 1]
        metrics = self._ledger.metrics
        found: list[str] = []
        if missing:
            found.append(f"step {missing[0]} is not in the ledger, but step {numbers[-1]} is")
        if unwritten := sorted(set(metrics) - set(numbers)):
            steps = [step for step in unwritten if step >= numbers[0]]
            found += [f"step {step} is in metrics.jsonl, but not in the ledger" for step in steps[:1]]
        # The ledger has a step before the step is trained; a kill may leave it without metrics.
        if unknown := sorted(set(numbers[:-1]) - set(metrics)):
            found.append(f"step {unknown[0]} is in the ledger, but not in metrics.jsonl")
        if numbers[0] > 1:
            self._report.not_shown.append(f"steps 1 to {numbers[0] - 1}: made before the run had a ledger")
        self._add(found, f"steps {numbers[0]:,} to {numbers[-1]:,} are in the ledger, each once")

    def _check_capacity(self) -> None:
        found: list[str] = []
        most = 0
        for step, listed in self._ledger.steps:
            identity = self._ledger.session(step).identity
            segments = given(listed)
            if not len(segments):
                continue
            tokens = np.bincount(segments["pack"], weights=segments["tokens"])
            most = max(most, int(tokens.max()))
            if len(tokens) > identity.global_batch:
                found.append(f"step {step} has a pack {len(tokens) - 1}, but a step has {identity.global_batch} packs")
            if (tokens > identity.capacity).any():
                pack = int(tokens.argmax())
                found.append(f"pack {pack} of step {step} holds {int(tokens[pack])} tokens of {identity.capacity}")
        self._add(found, f"no pack is over its capacity; the fullest holds {most:,} tokens")

    def _check_totals(self) -> None:
        """Compare the counts of each step with its line in `metrics.jsonl`."""
        found: list[str] = []
        before = self._ledger.metrics.get(self._ledger.steps[0].step - 1)
        rows = before.rows if before else 0
        for step, listed in self._ledger.steps:
            line = self._ledger.metrics.get(step)
            if line is None:
                continue
            segments = given(listed)
            rows += int((listed["part"] == 0).sum()) + line.refused
            counts = {
                "tokens": (int(segments["tokens"].sum()), line.tokens),
                "trained tokens": (int(segments["trained_tokens"].sum()), line.trained_tokens),
                "rows so far": (rows, line.rows),
            }
            for name, (ours, theirs) in counts.items():
                if ours != theirs:
                    found.append(f"step {step}: {ours:,} {name} in the ledger, {theirs:,} in metrics.jsonl")
            rows = line.rows
        lines = len(self._ledger.refused)
        counted = sum(line.refused for line in self._ledger.metrics.values())
        if lines != counted:
            found.append(f"refused.jsonl lists {lines:,} rows, metrics.jsonl counts {counted:,}")
        self._add(found, "tokens, trained tokens and rows of each step are those of metrics.jsonl")

    def _check_skips(self) -> None:
        """Compare the skipped segments of each step with the `skip` of the step's session."""
        found: list[str] = []
        for step, segments in self._ledger.steps:
            wanted = skips(self._ledger.session(step).identity, step, segments)
            left_out = segments["trained_tokens"] == SKIPPED
            for index in np.flatnonzero(wanted != left_out)[:1].tolist():
                row = f"row {segments['row'][index]} of source {segments['source'][index]}"
                is_skipped = "skipped, but skip does not name it" if left_out[index] else "trained, but skip names it"
                found.append(f"step {step}, pack {segments['pack'][index]}: {row} is {is_skipped}")
        count = len(skipped(self._all.segments))
        if found or count:
            self._add(found, f"{count:,} conversations or parts are skipped, as the config asks, and no others")

    def _check_unapplied(self) -> None:
        """Compare the steps without an update with `metrics.jsonl` and the conversations listed."""
        found: list[str] = []
        metrics = self._ledger.metrics
        records = {record.step: record for record in self._ledger.unapplied if record.step in metrics}
        marked = {step for step, line in metrics.items() if line.unapplied}
        for step in sorted(marked ^ records.keys()):
            holder, other = ("metrics.jsonl", "ledger") if step in marked else ("ledger", "metrics.jsonl")
            found.append(f"step {step} is without an update in {holder}, but not in {other}")
        segments = {listed.step: given(listed.segments) for listed in self._ledger.steps if listed.step in records}
        count = 0
        for step, record in records.items():
            listed = segments.get(step, NO_SEGMENTS)
            count += int((listed["part"] == 0).sum())
            chosen = listed[np.isin(listed["pack"], record.packs)] if record.packs else listed
            if set(record.conversations) != _refs(chosen):
                found.append(f"step {step}: the conversations named as the cause are not those of the packs named")
        if found or records:
            named = ", ".join(map(str, list(records)[:5])) + (
                f" and {len(records) - 5:,} more" if len(records) > 5 else ""
            )
            self._add(
                found,
                f"steps without an update, since loss or gradient was not finite: {named}; their {count:,} conversations "
                "count as trained in other lines, but changed no weight",
            )

    def _check_once(self) -> None:
        found = [line] if (line := repeated(self._all)) else []
        stored = self._ledger.state
        if stored is None:
            self._add(found, "no conversation is listed twice in an epoch")
            self._report.not_shown.append("that no row is lost: no checkpoint was written yet")
            return
        step, state = stored[0], self._followed(stored[1])
        if later := self._ledger.steps[-1].step - step:
            self._report.not_shown.append(
                f"that no row is lost in the last {later} steps: they follow the newest checkpoint, of step {step}"
            )
        listed = Listed(*self._ledger.up_to(step))
        refused = refs_of(self._ledger.refused, step)
        lines: list[str] = []
        for source in range(len(state.identity.sources)):
            if moved(state.orders.get(source, ())):
                self._report.not_shown.append(
                    f"that no row of source {source} is lost: an accepted change gave its rows other numbers"
                )
                continue
            draws = draws_of(source, self._last.config, self._last.corpus, state, listed, refused)
            found += unbalanced(source, listed, refused, state, draws) if not state.rebased else []
            indexed = isinstance(self._last.corpus.sources[source], FileSet)
            if self._one_assignment and (indexed or not state.rebased):
                identity = state.identity
                line = astray(source, listed, draws, identity.streams, identity.global_batch)
                found += [line] if line else []
            lines.append(_summary(source, listed, refused, state))
        if state.rebased:
            self._report.not_shown.append(
                "that no row is lost: the run accepted changes of data or settings, after which rows may be refused that "
                "were trained before"
            )
        found += _unfinished(state)
        self._add(found, "each conversation is trained, skipped, refused or waiting exactly once in each epoch")
        self._report.proved.extend([] if found else lines)
        self._check_mixture(state)

    def _followed(self, state: DataState) -> DataState:
        """Return a state with the row numbers of the last session.

        The session may have accepted changed files, and no checkpoint may have followed.
        """
        last = self._last
        if last.changes:
            return state
        return follow_sources(state, self._ledger.sessions[-1].identity, last.config, last.corpus)

    @cached_property
    def _one_assignment(self) -> bool:
        """True if all sessions had the same number of streams and packs in a step."""
        return len({(s.identity.streams, s.identity.global_batch) for s in self._ledger.sessions}) == 1

    def _check_mixture(self, state: DataState) -> None:
        if len(state.identity.sources) == 1:
            return
        examined, found = compare_mixture(state, self._longest)
        self._add(
            found[:1],
            f"the mixture is as wanted in {examined} of {len(state.streams)} streams; in all others a source ended",
        )
        if not found:
            self._report.proved.extend(shares(self._all, self._ledger.sessions[-1].identity))

    @cached_property
    def _longest(self) -> int:
        """Upper bound of the tokens of a trained conversation, in all its parts together."""
        tokens = self._all.segments["tokens"]
        parts = int(self._all.segments["part"].max(initial=0)) + 1
        return int(tokens.max(initial=0)) * parts

    def _check_digests(self, rebuild: int | None) -> None:
        steps = [step for step in self._ledger.steps if step.step in self._ledger.metrics]
        chosen = steps if rebuild is None or rebuild >= len(steps) else _spread(steps, rebuild)
        if changes := self._last.changes:
            self._report.differences.append(f"the data is not the data of the run: {changes[0]}")
            return
        found: list[str] = []
        count = 0
        for step in chosen:
            rebuilder = self._rebuilder(self._ledger.session(step.step))
            if rebuilder.changes:
                self._report.not_shown.append(
                    f"the packs of step {step.step} and others: the data changed since ({rebuilder.changes[0]})"
                )
                break
            found += _rebuilt(rebuilder, step, self._ledger.metrics[step.step])
            count += 1
            if found:
                break
        if len(chosen) < len(steps):
            self._report.not_shown.append(f"the packs of {len(steps) - len(chosen):,} steps: not built again, as asked")
        self._add(
            found, f"the packs of {count:,} steps, built again from the sources, have the digests in metrics.jsonl"
        )

    def _check_parts(self) -> None:
        """Compare the parts of each rebuilt row with the parts listed and waiting."""
        stored = self._ledger.state
        read = {ref: count for _, rebuilder in self._opened for ref, count in rebuilder.parts.items()}
        if stored is None or stored[1].rebased or not read:
            return
        step, state = stored
        _, segments = self._ledger.up_to(step)
        columns = (segments[name].tolist() for name in Ref._fields)
        listed = Counter(map(Ref._make, zip(*columns, strict=True)))
        waiting = Counter(segment.ref for stream in state.streams.values() for segment in stream.waiting)
        found = [
            f"row {ref.row} of source {ref.source} in epoch {ref.epoch} has {count} parts, but {listed[ref] + waiting[ref]} "
            "are trained, skipped or waiting"
            for ref, count in read.items()
            if listed[ref] and listed[ref] + waiting[ref] != count
        ]
        self._add(found, f"all parts of {len(read):,} divided conversations are trained, skipped or waiting")

    def _add(self, found: list[str], proved: str) -> None:
        """Add up to five of the differences `found`, or, if there are none, the statement
        `proved`."""
        if found:
            self._report.differences.extend(found[:5])
        else:
            self._report.proved.append(proved)


def skips(identity: Identity, step: int, segments: Segments) -> NDArray[np.bool_]:
    """Return for each segment of a step whether the setting `skip` of `identity` skips it."""
    skip = identity.skip or SkipConfig()
    if any(first <= step <= last for first, last in skip.steps):
        return np.full(len(segments), True)
    rows = np.array([number for _, number in skip.rows], np.int64)
    sources = np.array([number for number, _ in skip.rows], np.int64)
    return np.isin(_numbers(segments["source"], segments["row"]), _numbers(sources, rows))


def _refs(segments: Segments) -> set[Ref]:
    columns = (segments[name].tolist() for name in Ref._fields)
    return set(map(Ref._make, zip(*columns, strict=True)))


def _numbers(sources: NDArray[np.integer], rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return a number for each pair of a source and a row, different for different pairs."""
    result: NDArray[np.int64] = (rows.astype(np.int64) << 20) + sources
    return result


def sessions(ledger: Ledger) -> Iterator[str]:
    """Yield a line for each start of the run: its steps, topology and workers."""
    last = ledger.steps[-1].step if ledger.steps else 0
    ends = [*(session.after for session in ledger.sessions[1:]), last]
    for session, end in zip(ledger.sessions, ends, strict=True):
        mesh = ", ".join(f"{name} {size}" for name, size in session.mesh.items())
        made = f"steps {session.after + 1:,} to {end:,}" if end > session.after else "no step that was kept"
        accepted = f"; accepted so far: {'; '.join(session.accepted)}" if session.accepted else ""
        yield f"{made}: {mesh}, workers {session.workers}, version {session.version}{accepted}"


def _rebuilt(rebuilder: Rebuilder, step: StepSegments, line: StepLine) -> list[str]:
    try:
        packs = rebuilder.step(step.segments)
    except ValueError as error:
        return [f"step {step.step} cannot be built again: {error}"]
    built, ours = segments_of(packs), given(step.segments)
    if len(built) != len(ours):
        return [f"step {step.step} has segments outside the {len(packs)} packs of a step"]
    if len(wrong := np.flatnonzero(built != ours)):
        before, now = (array["trained_tokens"][wrong[0]] for array in (ours, built))
        row = f"row {built['row'][wrong[0]]} of source {built['source'][wrong[0]]}"
        return [f"step {step.step}: {row} has {before:,} trained tokens in the ledger, {now:,} when built again"]
    if (digest := batch_digest(pack.digest() for pack in packs)) != line.batch_digest:
        return [
            f"step {step.step}: the packs in the ledger have the digest {digest[:12]}, metrics.jsonl has "
            f"{line.batch_digest[:12]}"
        ]
    return []


def _spread(steps: list[StepSegments], count: int) -> list[StepSegments]:
    """Return `count` evenly spread steps, including the first and, if `count` > 1, the last."""
    return [steps[index] for index in np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int)).tolist()]


def _summary(source: int, listed: Listed, refused: list[Ref], state: DataState) -> str:
    own = listed.of_source(source).segments
    left_out = sum(1 for ref in refused if ref.source == source)
    drawn = sum(stream.drawn[source] for stream in state.streams.values())
    epochs = int(own["epoch"].max(initial=0)) + 1
    trained, unused = (int((part["part"] == 0).sum()) for part in (given(own), skipped(own)))
    return (
        f"source {source}: {drawn:,} draws in {epochs} epochs; {trained:,} conversations trained, {left_out:,} refused"
        + (f", {unused:,} skipped" if unused else "")
    )


def _unfinished(state: DataState) -> list[str]:
    """Return the sources with draws left, in a run whose streams have all ended."""
    identity = state.identity
    if identity.epochs is None or identity.ends_with == "first" or not all(s.exhausted for s in state.streams.values()):
        return []
    found = []
    for index, source in enumerate(identity.sources):
        if source.rows is None or state.orders.get(index):
            continue
        wanted = draws_of_source(source.rows, source.repeat, identity.epochs)
        drawn = sum(stream.drawn[index] for stream in state.streams.values())
        if drawn != wanted:
            found.append(f"source {index}: the run ended after {drawn:,} of {wanted:,} draws")
    return found
