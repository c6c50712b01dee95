"""Send steps to trackio: to its database on this machine, or to a server.

Uses the two calls under trackio's own `Run`, which would send in a thread of its own, draw a new id
for every line, and not say when a line is stored. With an id of token and step, trackio stores no
step twice.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

from trainer.track.config import TrackerConfig
from trainer.track.content import About, Step

TIMEOUT = 20.0
"""Seconds for a call of a server."""


class TrackioRun:
    """A run of trackio, whose id is the token of the run."""

    def __init__(self, tracker: TrackerConfig, about: About) -> None:
        self.held: int | None = None
        self._project = tracker.project
        self._name = tracker.name or about.name
        self._token = about.token
        self._settings = about.sent_to(tracker)
        self._server: Any = _server(tracker.url) if tracker.url else None

    def send(self, steps: list[Step], tried: int) -> None:  # noqa: ARG002 - trackio knows the ids it holds
        """Store steps; trackio leaves out the ids that it holds."""
        ids = [f"{self._token}-{step.number}" for step in steps]
        if self._server is not None:
            run = {"project": self._project, "run": self._name, "run_id": self._token, "config": self._settings}
            logs = [
                {**run, "metrics": step.values, "step": step.number, "log_id": id_}
                for step, id_ in zip(steps, ids, strict=True)
            ]
            self._server.predict(api_name="/bulk_log", logs=logs, hf_token=None)
            return
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.bulk_log(
            project=self._project,
            run=self._name,
            run_id=self._token,
            metrics_list=[step.values for step in steps],
            steps=[step.number for step in steps],
            timestamps=[datetime.fromtimestamp(step.time, UTC).isoformat() for step in steps],
            log_ids=ids,
            config=self._settings,
        )

    def close(self, *, complete: bool | None) -> None:
        """Do nothing: trackio has no state of an ended run."""


def _server(url: str) -> Any:
    from trackio.remote_client import RemoteClient

    token = os.environ.get("TRACKIO_WRITE_TOKEN")
    return RemoteClient(url, write_token=token, httpx_kwargs={"timeout": TIMEOUT})
