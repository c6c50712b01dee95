"""Compare the settings of a checkpoint with the settings of the run that resumes from it.

A schedule is compared by the rates of the steps done: a cosine over 12 steps may go on as a cosine
with `schedule.steps = 12` in a run of 20 steps, since all 12 rates are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from msgspec import UNSET, UnsetType

from sftstream import differences
from trainer.config import TrainConfig
from trainer.llama.blocks import Recompute
from trainer.llama.config import LlamaConfig
from trainer.llama.lora.layers import LoraConfig
from trainer.training.accepted import ACCEPTABLE, ROWS, covers
from trainer.training.model import ModelSource
from trainer.training.optimizer import OptimizerConfig
from trainer.training.schedule import ScheduleConfig, learning_rate


class AcceptedChange(msgspec.Struct, frozen=True, kw_only=True):
    """Changes of settings, accepted when a run resumed after `step`."""

    step: int
    differences: tuple[str, ...]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that decide the numbers of a run; a resume needs equal settings."""

    seed: int
    model: LlamaConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    compute_dtype: str
    weights_dtype: str = "float32"
    compile: bool = False
    float8: bool = False
    recompute: Recompute | UnsetType = UNSET
    """Recomputation of compiled layers, which round differently for each value; left out for other
    layers and by version 0.1.0. Not compared, since the memory of a machine decides."""
    attention: str | UnsetType = UNSET
    """Name of the attention kernel; left out by version 0.2.0."""
    steps: int | None = None
    """The run's length if the schedule decays to the run's end, else None."""
    first_weights: str | UnsetType = UNSET
    """Digest of the files of `model.init_from`, or "random"; left out by version 0.1.0."""
    rows_before: int | UnsetType = UNSET
    """Number of tokens in `model.init_from` before `model.resize_vocabulary` added rows; left out
    if no rows were added."""
    lora: LoraConfig | UnsetType = UNSET
    """The `[lora]` table; left out without adapters."""
    base: dict[str, str] | UnsetType = UNSET
    """Digest of each weight file of the model under the adapters; left out without adapters."""
    accepted: tuple[AcceptedChange, ...] | UnsetType = UNSET
    """Changes accepted so far, oldest first; left out if there are none. Not compared."""

    @classmethod
    def of(
        cls, config: TrainConfig, source: ModelSource, compute_dtype: torch.dtype, base: dict[str, str] | None = None
    ) -> Settings:
        """Collect the settings of a run whose choices are made, but for an attention kernel that is
        "auto"; `compute_dtype` replaces "auto".

        `base` has the digests of the frozen model's weight files, None without adapters.
        """
        assert config.run.compile != "auto"
        recompute: Recompute | UnsetType = UNSET
        if config.run.compile:
            assert config.run.recompute != "auto"
            recompute = config.run.recompute
        return cls(
            seed=config.run.seed,
            model=source.shape,
            optimizer=config.optimizer,
            schedule=config.schedule,
            compute_dtype=str(compute_dtype).removeprefix("torch."),
            weights_dtype=config.run.weights_dtype,
            compile=config.run.compile,
            float8=config.run.float8,
            recompute=recompute,
            attention=config.run.attention,
            steps=config.run.steps if config.schedule.decays_to_run_end else None,
            first_weights=source.digest,
            rows_before=UNSET if source.rows_before is None else source.rows_before,
            lora=UNSET if config.lora is None else config.lora,
            base=UNSET if base is None else base,
        )


def carry_over(saved: Settings, now: Settings, step: int, accept: Sequence[str]) -> Settings:
    """Return `now` with the record of `saved`, lengthened by differences that `accept` covers.

    `step` is the number of steps done under `saved`, `accept` is `run.accept_changed`. Raises
    ValueError, with each difference and a remedy, for a difference outside of `accept`.
    """
    changed = _changes(saved, now, step)
    _require_accepted(saved, changed, step, accept)
    return _with_record(msgspec.structs.replace(now, accepted=saved.accepted), changed, step)


def carry_over_rows(
    settings: Settings, before: int | None, after: int | None, step: int, accept: Sequence[str]
) -> Settings:
    """Return the settings of a run whose data had `before` rows in all epochs and has `after` now.

    A decay over the data would have given the steps done other rates. Raises ValueError unless
    `accept` covers such a change.
    """
    changed = differences(before, after, ROWS) if settings.schedule.decays_over_data else []
    _require_accepted(settings, changed, step, accept)
    return _with_record(settings, changed, step)


def _require_accepted(saved: Settings, changed: Sequence[str], step: int, accept: Sequence[str]) -> None:
    refused = [change for change in changed if not any(covers(name, change) for name in accept)]
    if refused:
        raise ValueError(
            f"the checkpoint of step {step} was made with other settings (checkpoint -> now): {'; '.join(refused)}. "
            f"{_remedies(saved, refused, accept)}"
        )


def _with_record(settings: Settings, changed: Sequence[str], step: int) -> Settings:
    if not changed:
        return settings
    change = AcceptedChange(step=step, differences=tuple(changed))
    return msgspec.structs.replace(settings, accepted=(*(settings.accepted or ()), change))


def _changes(saved: Settings, now: Settings, step: int) -> list[str]:
    """Return the differences as `path: before -> after`, with the paths of the config."""
    changed = []
    for path in ("seed", "model", "optimizer", "compute_dtype", "weights_dtype", "compile", "float8"):
        before, after = (msgspec.to_builtins(getattr(settings, path)) for settings in (saved, now))
        changed += differences(before, after, path if path in ("model", "optimizer") else f"run.{path}")
    changed += differences(saved.rows_before or None, now.rows_before or None, "model.resize_vocabulary")
    changed += differences(_adapters(saved), _adapters(now), "lora")
    if saved.base and now.base:
        changed += differences(saved.base, now.base, "model.init_from")
    if saved.attention is not UNSET:
        changed += differences(saved.attention, now.attention, "run.attention")
    if saved.first_weights is not UNSET:
        changed += differences(saved.first_weights, now.first_weights, "model.init_from")
    if not _gave_equal_rates(saved, now, step):
        changed += differences(_terms(saved), _terms(now), "schedule")
    return changed


def _adapters(settings: Settings) -> dict[str, object] | None:
    return settings.lora.identity if settings.lora else None


def _gave_equal_rates(saved: Settings, now: Settings, steps: int) -> bool:
    """Return True if both schedules have equal rates in the first `steps` steps."""
    if _terms(saved) == _terms(now):
        return True
    if saved.schedule.decays_over_data or now.schedule.decays_over_data:
        return False  # the rates depend on the rows of each step, and no record has them
    unit = OptimizerConfig(learning_rate=1.0)
    return all(
        learning_rate(unit, saved.schedule, step, 0.0, saved.steps)
        == learning_rate(unit, now.schedule, step, 0.0, now.steps)
        for step in range(steps)
    )


def _terms(settings: Settings) -> dict[str, object]:
    """Return the schedule's fields, with the step at which a decay over steps ends."""
    terms: dict[str, object] = msgspec.to_builtins(settings.schedule)
    if settings.schedule.decays_to_run_end:
        terms["steps"] = settings.steps
    return terms


def _remedies(saved: Settings, refused: Sequence[str], accept: Sequence[str]) -> str:
    remedies = ["Restore the settings"]
    if all(change.startswith("schedule.steps: ") for change in refused):
        end = _terms(saved)["steps"]
        if isinstance(end, int) and end > saved.schedule.warmup:
            remedies.append(f"set schedule.steps = {end} to go on at the rate of the decay's end")
    covering = [name for change in refused for name in ACCEPTABLE if covers(name, change)]
    if len(covering) == len(refused):
        listed = ", ".join(f'"{name}"' for name in dict.fromkeys([*accept, *covering]))
        remedies.append(f"set run.accept_changed = [{listed}] to go on with the new ones and keep a record")
    return f"{', '.join(remedies)}, or give the run another name"
