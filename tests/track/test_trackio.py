"""A real trackio with its database on this machine holds each step once."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from made_runs import TOKEN, made_run, write_lines

from trainer.track.config import TrackerConfig
from trainer.track.cursor import Cursor, cursor_path
from trainer.track.open import opener
from trainer.track.send import Sender
from trainer.whole_file import write_whole

pytest.importorskip("trackio")
TRACKER = TrackerConfig(kind="trackio", project="letters")


def sender(run: Path) -> Sender:
    return Sender(run, TRACKER, opener(run, TRACKER))


def test_trackio_holds_each_step_once_through_a_kill_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "store")
    run = made_run(tmp_path / "run", TRACKER, steps=3)
    sender(run).send()
    write_whole(cursor_path(run, TRACKER), Cursor(token=TOKEN, sent=1, tried=3))
    write_lines(run, range(1, 6))
    sender(run).send()
    (database,) = (tmp_path / "store").glob("*.db")
    with closing(sqlite3.connect(database)) as stored:
        rows = stored.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        ((config,),) = stored.execute("SELECT config FROM configs").fetchall()
    assert [(run_id, name, step) for run_id, name, step, _ in rows] == [(TOKEN, "first", step) for step in range(1, 6)]
    assert json.loads(rows[4][3]) == {"loss": 5.0, "refused": 1.0, "refused_by_reason/too_long": 1.0}
    assert json.loads(config) == {"run.seed": 7, "data.shuffle": True, "digest.data": "d1"}
