"""Send steps to MLflow."""

from __future__ import annotations

import os
from typing import Any

from trainer.track.config import TrackerConfig
from trainer.track.content import About, Step

TOKEN = "sftstream.run"
"""Tag that holds the token of the run."""
MOST_METRICS, MOST_PARAMS = 1000, 100
"""Limits of MLflow for a single call."""
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""Settings of MLflow's client, unless the environment has others: this package retries itself."""


class MlflowRun:
    """A run of MLflow, found by its tag `TOKEN` in the experiment that the config names."""

    def __init__(self, tracker: TrackerConfig, about: About) -> None:
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.held: int | None = None
        self._client: Any = MlflowClient(tracking_uri=tracker.url)
        self._id: str = self._find(tracker, about)
        self._client.update_run(self._id, status="RUNNING")
        self._describe(about.sent_to(tracker))

    def send(self, steps: list[Step], tried: int) -> None:
        """Send steps; of those up to `tried`, only the values that MLflow does not hold."""
        from mlflow.entities import Metric

        held = self._held({name for step in steps if step.number <= tried for name in step.values})
        metrics = [
            Metric(name, value, int(step.time * 1000), step.number)
            for step in steps
            for name, value in step.values.items()
            if (name, step.number) not in held
        ]
        for begin in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + MOST_METRICS])

    def close(self, *, complete: bool | None) -> None:
        """Set the status of an ended run."""
        if complete is not None:
            self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")

    def _find(self, tracker: TrackerConfig, about: About) -> str:
        experiment = self._client.get_experiment_by_name(tracker.project)
        identity = experiment.experiment_id if experiment else self._client.create_experiment(tracker.project)
        query = f"tags.`{TOKEN}` = '{about.token}'"
        found = self._client.search_runs([identity], query, max_results=1, order_by=["attributes.start_time ASC"])
        run = (
            found[0]
            if found
            else self._client.create_run(identity, tags={TOKEN: about.token}, run_name=tracker.name or about.name)
        )
        return str(run.info.run_id)

    def _describe(self, settings: dict[str, Any]) -> None:
        """Send settings as parameters; a value that a resume has changed is sent as a tag, since
        MLflow refuses another value of a parameter."""
        from mlflow.entities import Param, RunTag

        held = self._client.get_run(self._id).data.params
        new = [Param(key, str(value)) for key, value in settings.items() if key not in held]
        changed = [RunTag(f"changed.{k}", str(v)) for k, v in settings.items() if held.get(k, str(v)) != str(v)]
        for begin in range(0, len(new), MOST_PARAMS):
            self._client.log_batch(self._id, params=new[begin : begin + MOST_PARAMS])
        for begin in range(0, len(changed), MOST_PARAMS):
            self._client.log_batch(self._id, tags=changed[begin : begin + MOST_PARAMS])

    def _held(self, names: set[str]) -> set[tuple[str, int]]:
        return {(name, metric.step) for name in names for metric in self._client.get_metric_history(self._id, name)}
