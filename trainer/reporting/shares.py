"""Count what a run has taken from each source, and compare the shares with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sftstream import DataConfig, Segments
from trainer.reporting.events import MOST_SOURCES
from trainer.reporting.metrics import RunLog


class SourceShares:
    """The amounts of a run from each source so far, in the unit of `data.mix_by`.

    A resumed run goes on from the last line of `metrics.jsonl`, with 0 for an added source. A line
    of an earlier version, or of a run of one source, has no amounts: those of the run are then not
    known, and left out.
    """

    def __init__(self, data: DataConfig, sizes: Sequence[int | None], log: RunLog, step: int) -> None:
        self._unit = data.mix_by
        self._sources = len(data.sources)
        self._wanted = None if data.stages else _wanted(data, sizes)
        self._amounts: np.ndarray[Any, np.dtype[np.int64]] | None = np.zeros(self._sources, np.int64)
        if step:
            before = log.last_step().get("mixed_by_source")
            added = self._sources - len(before or ())  # a resume removes no source
            self._amounts = np.array([*before, *[0] * added], np.int64) if before else None

    def after(self, segments: Segments) -> dict[str, Any]:
        """Return the fields of `StepMetrics` by source after a step with `segments`.

        None for one source or more than `MOST_SOURCES`.
        """
        if not 1 < self._sources <= MOST_SOURCES:
            return {}
        kept = segments[segments["trained_tokens"] >= 0]  # without the conversations of run.skip
        counts = {
            "conversations": (kept["part"] == 0).astype(np.int64),
            "tokens": kept["tokens"],
            "trained_tokens": kept["trained_tokens"],
        }
        by_source = {
            name: np.bincount(kept["source"], count, self._sources).astype(np.int64) for name, count in counts.items()
        }
        fields: dict[str, Any] = {
            "tokens_by_source": tuple(by_source["tokens"].tolist()),
            "trained_tokens_by_source": tuple(by_source["trained_tokens"].tolist()),
        }
        if self._amounts is None:
            return fields
        self._amounts = self._amounts + by_source[self._unit]
        total = int(self._amounts.sum())
        return fields | {
            "mixed_by_source": tuple(self._amounts.tolist()),
            "share_by_source": tuple((self._amounts / max(total, 1)).tolist()),
            "wanted_share_by_source": self._wanted,
        }


def _wanted(data: DataConfig, sizes: Sequence[int | None]) -> tuple[float, ...] | None:
    """Return the share of each source by the weights; None if a size that decides is not known."""
    weights = []
    for source, size in zip(data.sources, sizes, strict=True):
        if source.weight is None and size is None:
            return None
        weights.append((size or 0) * source.repeat if source.weight is None else source.weight)
    return tuple(weight / sum(weights) for weight in weights) if sum(weights) else None
