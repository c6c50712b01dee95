"""Names in `run.accept_changed`: the settings of the training that a resume may change."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.training.optimizer import OptimizerConfig
from trainer.training.schedule import ScheduleConfig

ACCEPTABLE = ("optimizer", "schedule", "run.attention")
"""Tables and keys that `run.accept_changed` may name, beside single keys of the tables."""

FIXED = ("optimizer.kind",)
"""Keys in these tables that no resume may change: the states of two optimizers differ."""

ROWS = "schedule.rows"
"""Name of a change of the number of rows under a decay over the data."""


def require_acceptable(names: Sequence[str]) -> None:
    """Raise ValueError for a name of no setting that a resume may change."""
    tables = {"optimizer": OptimizerConfig, "schedule": ScheduleConfig}
    keys = [f"{name}.{key}" for name, table in tables.items() for key in table.__struct_fields__]
    known = [name for name in (*ACCEPTABLE, *keys, ROWS) if name not in FIXED]
    for name in names:
        if name.partition("[")[0] not in known:  # "optimizer.betas[0]" is the first number of a key
            raise ValueError(
                f"accept_changed holds {name!r}, which is no setting of the training that a resume may change; name "
                f"{', '.join(known)}, and changes of the data in data.accept_changed"
            )


def covers(name: str, change: str) -> bool:
    """Return True if a name in `run.accept_changed` accepts the difference `change`."""
    path = change.partition(":")[0]
    return path not in FIXED and (path == name or path.startswith((f"{name}.", f"{name}[")))
