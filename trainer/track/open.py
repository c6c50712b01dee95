"""Open the run of a tracker by its kind; only the library of that kind is imported."""

from __future__ import annotations

from pathlib import Path

from trainer.track.config import TrackerConfig
from trainer.track.content import About
from trainer.track.mlflow_run import MlflowRun
from trainer.track.tracker import Opener, Tracker
from trainer.track.trackio_run import TrackioRun
from trainer.track.wandb_run import WandbRun


def opener(run: Path, tracker: TrackerConfig) -> Opener:
    """Return the function that opens the tracker's run for the run in the directory `run`."""

    def open_run(about: About) -> Tracker:
        match tracker.kind:
            case "mlflow":
                return MlflowRun(tracker, about)
            case "trackio":
                return TrackioRun(tracker, about)
            case "wandb":
                return WandbRun(tracker, about, run / "trackers")

    return open_run
