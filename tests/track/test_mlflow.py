"""A real MLflow with a database on this machine holds each step once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_runs import TOKEN, made_run, write_lines

from trainer.track.config import TrackerConfig
from trainer.track.cursor import Cursor, cursor_path, read_cursor
from trainer.track.open import opener
from trainer.track.send import Sender
from trainer.track.tracker import TrackerDown
from trainer.whole_file import write_whole

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")


def sender(run: Path, tracker: TrackerConfig) -> Sender:
    return Sender(run, tracker, opener(run, tracker))


def stored(tracker: TrackerConfig) -> Any:
    """Return the only run of the project, with the history of its metrics."""
    client = mlflow.MlflowClient(tracking_uri=tracker.url)
    (found,) = client.search_runs([client.get_experiment_by_name(tracker.project).experiment_id])
    history = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    return found, history


def test_mlflow_holds_each_step_once_through_an_outage_a_kill_and_a_resume(tmp_path: Path) -> None:
    tracker = TrackerConfig(kind="mlflow", url=f"sqlite:///{tmp_path}/server/mlflow.db")
    run = made_run(tmp_path / "run", tracker, steps=3)
    (tmp_path / "server").write_text("no directory: the database cannot be made")
    with pytest.raises(TrackerDown, match="mlflow does not answer"):
        sender(run, tracker).send()
    (tmp_path / "server").unlink()
    (tmp_path / "server").mkdir()
    sender(run, tracker).send()
    # A kill after the server has stored the steps, and before the cursor says so.
    path = cursor_path(run, tracker)
    write_whole(path, Cursor(token=TOKEN, sent=1, tried=3))
    write_lines(run, range(1, 6))
    resumed = sender(run, tracker)
    resumed.send()
    resumed.close()
    found, history = stored(tracker)
    assert history["loss"] == [(step, 10.0 - step) for step in range(1, 6)]
    assert history["refused_by_reason/too_long"] == [(step, 1.0) for step in range(1, 6)]
    assert found.data.params == {"run.seed": "7", "data.shuffle": "True", "digest.data": "d1"}
    assert found.info.run_name == "first"
    assert found.info.status == "RUNNING"
    assert read_cursor(path, TOKEN) == Cursor(token=TOKEN, sent=5, tried=5)


def test_a_file_store_without_keys_holds_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's store of files appends what it gets, so that only the history tells what it holds."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/files")
    tracker = TrackerConfig(kind="mlflow")
    run = made_run(tmp_path / "run", tracker, steps=4)
    sender(run, tracker).send()
    write_whole(cursor_path(run, tracker), Cursor(token=TOKEN, sent=2, tried=4))
    sender(run, tracker).send()
    _, history = stored(tracker)
    assert history["loss"] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
