"""The learning rate of each step: warm-up and decay.

Example: with learning_rate = 1.0, kind = "linear" and warmup = 1, a run of 6 steps takes the rates
0.5, 1.0, 0.8, 0.6, 0.4, 0.2: the decay would reach 0 at step 6, counted from 0. With kind = "wsd"
and decay = 2 it takes the rates 0.5, 1.0, 1.0, 1.0, 1.0, 0.5.

"wsd" (warm-up, stable, decay): Hu et al., "MiniCPM", https://arxiv.org/abs/2404.06395. The form
"1-sqrt": Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations", https://arxiv.org/abs/2405.18392.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from sftstream import MOST_STEPS
from trainer.training.optimizer import OptimizerConfig


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[schedule]` table: warm-up and decay of the learning rate."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Form of the decay after the warm-up: none, a straight line, half a cosine wave, or "wsd"
    (warm-up, stable, decay): the full rate up to a short decay at the end. While a run is in its
    warm-up or stable phase, a resume may move the end of "wsd", or change between "constant" and
    "wsd"."""
    warmup: int = 0
    """Steps with a linearly rising rate before the full rate, 0 or more. Step n of the warm-up,
    counted from 1, has the rate n / (warmup + 1)."""
    over: Literal["steps", "data"] = "steps"
    """Measure of the decay: the "steps" taken after the warm-up, or the share of the "data" read,
    which needs `run.epochs` and sources of known size."""
    steps: int | None = None
    """Step at which a decay over steps ends, above `warmup`. Default: the last step, `run.steps`; a
    run whose decay ends at a given step can be made longer later."""
    decay: int | float | None = None
    """Length of the decay of "wsd", which needs it: a number of steps, 1 or more, or a share of the
    steps or of the data up to the end, above 0.0 and at most 1.0. Other kinds decay from the end of
    the warm-up."""
    decay_form: Literal["linear", "1-sqrt"] = "linear"
    """Form of the decay of "wsd": a straight line, or 1 - sqrt(finished share of the decay)."""
    minimum: float = 0.0
    """Rate at the end of the decay, as a fraction of `learning_rate` in [0, 1]."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.minimum <= 1:
            raise ValueError(f"warmup {self.warmup} must be 0 or more, and minimum {self.minimum} must lie in [0, 1]")
        if max(self.warmup, self.steps or 0) > MOST_STEPS:
            raise ValueError(f"warmup {self.warmup} and steps {self.steps} must be at most {MOST_STEPS}")
        if self.steps is not None and self.steps <= self.warmup:
            raise ValueError(
                f"steps {self.steps} must exceed warmup {self.warmup}, since the decay follows the warm-up"
            )
        if self.steps is not None and self.over == "data":
            raise ValueError(
                f'steps {self.steps} has no meaning with over = "data"; remove steps, or set over = "steps"'
            )
        if self.kind == "wsd":
            self._require_decay()
        elif self.decay is not None or self.decay_form != "linear":
            raise ValueError(
                f'decay and decay_form belong to kind = "wsd", but kind is "{self.kind}"; remove them, or set kind = "wsd"'
            )

    def _require_decay(self) -> None:
        decay = self.decay
        if decay is None:
            raise ValueError(
                'kind = "wsd" needs the length of its decay; set decay to a number of steps such as 500, or to a share such as '
                '0.1, or set kind = "constant" until the end is known'
            )
        if isinstance(decay, int):
            if not 1 <= decay <= MOST_STEPS:
                raise ValueError(f"decay {decay} must be 1 to {MOST_STEPS} steps, or a share such as 0.1")
            if self.over == "data":
                raise ValueError(
                    f'decay {decay} is a number of steps, but over = "data" measures shares; set decay to a share such as 0.1, '
                    'or over = "steps"'
                )
        elif not 0 < decay <= 1:
            raise ValueError(f"decay {decay} must be a share above 0.0 and at most 1.0, or a whole number of steps")
        if self.steps is not None:
            self._stable_end(self.steps)

    @property
    def decays_over_data(self) -> bool:
        """True if the rates depend on the share of the data read."""
        return self.kind != "constant" and self.over == "data"

    @property
    def decays_to_run_end(self) -> bool:
        """True if the decay ends at the run's last step, so that rates depend on its number."""
        return self.kind != "constant" and self.over == "steps" and self.steps is None

    def decay_interval(self, run_steps: int | None) -> tuple[int, int]:
        """Return the steps, counted from 0, at which a decay over steps starts and ends.

        The first is the last step with the full rate. The decay ends at `steps`, else at
        `run_steps`, which is `run.steps`, None in a run over epochs. Raises ValueError if neither
        is known, or if the decay of "wsd" starts within the warm-up.
        """
        end = run_steps if self.steps is None else self.steps
        if end is None:
            raise ValueError(
                f"a {self.kind} schedule over steps needs its last step, and a run over epochs does not know its number of "
                'steps before its end; set schedule.over = "data" or schedule.steps'
            )
        return self._stable_end(end) if self.kind == "wsd" else self.warmup, end

    def _stable_end(self, end: int) -> int:
        assert self.decay is not None
        length = self.decay if isinstance(self.decay, int) else max(1, round(self.decay * end))
        if self.warmup + length > end:
            raise ValueError(
                f"warmup {self.warmup} and a decay of {length} steps exceed the {end} steps of the schedule; lower "
                "schedule.warmup or schedule.decay"
            )
        return end - length


def learning_rate(
    config: OptimizerConfig, schedule: ScheduleConfig, step: int, progress: float, total_steps: int | None
) -> float:
    """Return the learning rate of step `step`, counted from 0: full rate x warm-up x decay.

    `progress` in [0, 1] is the share of the data read before the step, for `over = "data"`.
    `total_steps` is the run's length, None if unknown. Raises ValueError if a decay over steps has
    no last step.
    """
    rise = min(1.0, (step + 1) / (schedule.warmup + 1))
    return config.learning_rate * rise * _decay(schedule, _share(schedule, step, progress, total_steps))


def _share(schedule: ScheduleConfig, step: int, progress: float, total_steps: int | None) -> float:
    """Return the finished part of the decay, in [0, 1]."""
    if schedule.kind == "constant":
        return 0.0
    if schedule.over == "data":
        share = progress if schedule.decay is None else 1 - (1 - progress) / schedule.decay
    else:
        start, end = schedule.decay_interval(total_steps)
        share = (step - start) / max(1, end - start)
    return min(1.0, max(0.0, share))


def _decay(schedule: ScheduleConfig, share: float) -> float:
    match schedule.kind:
        case "constant":
            falling = 1.0
        case "linear":
            falling = 1 - share
        case "cosine":
            falling = (1 + math.cos(math.pi * share)) / 2
        case "wsd":
            falling = 1 - share if schedule.decay_form == "linear" else 1 - math.sqrt(share)
    return schedule.minimum + (1 - schedule.minimum) * falling
