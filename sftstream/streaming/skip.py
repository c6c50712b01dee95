"""Remove the rows and steps that the config skips from finished packs.

A skipped pack stays in its place without its segments. All other packs are unchanged.

A skipped conversation is drawn, tokenized and planned like any other, and is left out when its pack
is returned. So a skip may begin or end at any resume, without an effect on other conversations, and
is the same on any topology.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from sftstream.config import DataConfig, SkipConfig
from sftstream.records import Example, Pack, Segment
from sftstream.sources import Corpus, FileSet
from sftstream.streaming.packing import build_pack


class Skip:
    """The rows and packs that a config skips. `pad_id` fills the slots of left out tokens."""

    def __init__(self, config: DataConfig, pad_id: int) -> None:
        self._rows = frozenset(config.skip.rows)
        batch = config.global_batch
        self._packs = [range((first - 1) * batch, last * batch) for first, last in config.skip.steps]
        self._pad_id = pad_id

    def applied(self, pack: Pack, number: int) -> Pack:
        """Return pack `number` of the run without its skipped segments, listed in `skipped`."""
        whole = any(number in packs for packs in self._packs)
        if not pack.segments or not (whole or self._rows):
            return pack
        kept = [not whole and (segment.source, segment.row) not in self._rows for segment in pack.segments]
        return pack if all(kept) else _without(pack, kept, self._pad_id)


def _without(pack: Pack, kept: list[bool], pad_id: int) -> Pack:
    examples, segments, skipped = list[Example](), list[Segment](), list[Segment]()
    borders = pairwise(pack.borders.tolist())
    for segment, keep, (start, end) in zip(pack.segments, kept, borders, strict=False):
        if not keep:
            skipped.append(segment)
            continue
        segments.append(segment)
        trained = pack.trained[start:end]
        examples.append(Example(pack.ids[start:end], trained, int(trained[1:].sum())))
    rest = build_pack(examples, segments, pack.capacity, pad_id, pack.refused, pack.exhausted)
    return dataclasses.replace(rest, skipped=tuple(skipped))


def require_known_rows(skip: SkipConfig, corpus: Corpus) -> None:
    """Raise ValueError if `skip` names a row that a source does not have. The rows of a streamed
    source are not counted, and so not checked."""
    for source, row in skip.rows:
        opened = corpus.sources[source]
        if isinstance(opened, FileSet) and row >= len(opened):
            raise ValueError(
                f"skip.rows holds [{source}, {row}], but source {source} has {len(opened):,} rows, counted from 0; "
                "`sftstream trace` prints the numbers of rows"
            )


def require_steps_to_come(before: SkipConfig | None, now: SkipConfig | None, done: int) -> None:
    """Raise ValueError if `now` skips a trained step: a step up to `done` that `before` did not
    skip."""
    known = sorted(before.steps) if before else []
    for first, last in now.steps if now else ():
        new = first
        for known_first, known_last in known:
            if known_first <= new <= known_last:
                new = known_last + 1
        if new <= min(last, done):
            raise ValueError(
                f"skip.steps holds [{first}, {last}], but the state was saved after step {done}, and step {new} was "
                f"trained; resume from a state before step {new}, or skip steps from {done + 1} on"
            )
