"""The `[[trackers]]` tables of a config, and the check that their packages are installed."""

from __future__ import annotations

import importlib.util
from typing import Literal
from urllib.parse import urlsplit

import msgspec

LONGEST = 200
"""Characters of a project or a name."""


class TrackerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[[trackers]]` table: a service that shows the numbers of the run beside those of others.

    A process of its own sends the lines of `metrics.jsonl`, so that a tracker that is down neither
    stops nor slows the training. No conversation, message or answer is ever sent.
    """

    kind: Literal["mlflow", "trackio", "wandb"]
    """Tracker: MLflow, trackio, or Weights & Biases. Each is an extra, such as
    `pip install "sftstream[mlflow]"`. Keys and passwords are read from the environment variables of
    the tracker, such as `WANDB_API_KEY`."""
    project: str = "sftstream"
    """Project of the tracker, in MLflow the experiment. For Weights & Biases also "entity/project".
    """
    name: str | None = None
    """Name of the run in the tracker. Default: `run.name`."""
    url: str | None = None
    """Address of the tracker's server: an http URL, for MLflow also a database such as
    `sqlite:///mlflow.db`. Default: the place that the tracker's own environment variables name, for
    trackio a database on this machine."""
    paths: bool = False
    """Also send the texts of the config, such as the paths of sources and models. False sends of
    the config only numbers, true, false, and values from a fixed list, such as "bfloat16"."""

    def __post_init__(self) -> None:
        for field, value in (("project", self.project), ("name", self.name)):
            if value is not None and not (value.strip() and value.isprintable() and len(value) <= LONGEST):
                raise ValueError(f"{field} = {value!r} must be a line of 1 to {LONGEST} printable characters")
        self._require_address()

    @property
    def target(self) -> tuple[str, str, str | None, str | None]:
        """Kind, project, name and address: the run of the tracker that gets the steps."""
        return self.kind, self.project, self.name, self.url

    def _require_address(self) -> None:
        if self.url is None:
            return
        schemes = ("http://", "https://", "sqlite://") if self.kind == "mlflow" else ("http://", "https://")
        if not self.url.startswith(schemes) or not self.url.isprintable():
            raise ValueError(f"url = {self.url!r} is no address of {self.kind}; begin with {' or '.join(schemes)}")
        parts = urlsplit(self.url)
        if parts.password or parts.username or parts.query:
            raise ValueError(
                "url holds a user, password or token, which the files of the run would show; give it in the environment "
                "variable of the tracker, such as WANDB_API_KEY, MLFLOW_TRACKING_TOKEN or TRACKIO_WRITE_TOKEN"
            )


def require_installed(trackers: tuple[TrackerConfig, ...]) -> None:
    """Raise ValueError if the package of a tracker is missing. Imports no package."""
    for tracker in trackers:
        if importlib.util.find_spec(tracker.kind) is None:
            raise ValueError(
                f'trackers.kind = "{tracker.kind}" needs the package {tracker.kind}; '
                f'install it with: pip install "sftstream[{tracker.kind}]"'
            )
