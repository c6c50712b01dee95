"""Send steps to Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainer.track.config import TrackerConfig
from trainer.track.content import About, Step

TIMEOUT = 30.0
"""Seconds in which the server has to answer at the start of a session."""


class WandbRun:
    """A run of Weights & Biases, whose id is the token of the run.

    The library stores what is sent on the disk and sends it from a process of its own, again and
    again. The server's last step decides where a new session goes on, so that steps that a kill has
    left in that process are sent again. Neither the command, the code, the host nor what the
    process prints is sent.
    """

    def __init__(self, tracker: TrackerConfig, about: About, directory: Path) -> None:
        if tracker.url:
            os.environ["WANDB_BASE_URL"] = tracker.url
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        entity, _, project = tracker.project.rpartition("/")
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            init_timeout=TIMEOUT,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        # What the server does not get is sent again from metrics.jsonl, so the copy may be lost.
        self._copy = TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True)
        self._run: Any = wandb.init(
            entity=entity or None,
            project=project,
            name=tracker.name or about.name,
            id=about.token,
            resume="allow",
            config=about.sent_to(tracker),
            allow_val_change=True,
            dir=str(directory) if os.environ.get("WANDB_MODE") == "offline" else self._copy.name,
            settings=settings,
        )
        self.held = None if self._run.offline else max(0, self._run.step - 1)

    def send(self, steps: list[Step], tried: int) -> None:  # noqa: ARG002 - the server's step decides
        """Hand steps to the process of the library."""
        for step in steps:
            self._run.log(step.values | {"_timestamp": step.time}, step=step.number)

    def close(self, *, complete: bool | None) -> None:
        """Wait until the server has all steps."""
        self._run.finish(exit_code=int(complete is False))
        self._copy.cleanup()
