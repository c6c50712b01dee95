"""Each step reaches a tracker once, across failures, kills and resumes."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from made_runs import TOKEN, line, made_run, write_lines

from trainer.track.config import TrackerConfig
from trainer.track.content import About, Step
from trainer.track.cursor import Cursor, claimed, cursor_path, read_cursor
from trainer.track.send import Sender
from trainer.track.tail import Tail
from trainer.track.tracker import TrackerDown
from trainer.whole_file import write_whole

TRACKER = TrackerConfig(kind="mlflow")
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS", "1000"))


class Killed(BaseException):
    """The end of the process at any place."""


class Store:
    """A tracker that appends what it gets to a list, like a server without any keys.

    `fails` is called before each value is stored and after the last, and may raise.
    """

    def __init__(self, stored: list[tuple[str, int, float]], held: int | None = None) -> None:
        self.stored, self.held = stored, held
        self.closed: list[bool | None] = []
        self.fails = lambda: None

    def open(self, about: About) -> Store:
        self.fails()
        return self

    def send(self, steps: list[Step], tried: int) -> None:
        known = {(name, number) for name, number, _ in self.stored if number <= tried}
        for step in steps:
            for name, value in step.values.items():
                self.fails()
                if (name, step.number) not in known:
                    self.stored.append((name, step.number, value))
        self.fails()

    def close(self, *, complete: bool | None) -> None:
        self.closed.append(complete)


def losses(store: Store) -> list[tuple[int, float]]:
    return [(number, value) for name, number, value in store.stored if name == "loss"]


def test_steps_are_sent_once_and_in_order(tmp_path: Path) -> None:
    run, store = made_run(tmp_path, steps=3), Store([])
    sender = Sender(run, TRACKER, store.open)
    sender.send()
    write_lines(run, range(1, 6))
    sender.send()
    sender.send()
    assert losses(store) == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (5, 5.0)]
    assert sender.sent == 5


def test_another_process_goes_on_after_the_last_step(tmp_path: Path) -> None:
    run, store = made_run(tmp_path, steps=3), Store([])
    Sender(run, TRACKER, store.open).send()
    write_lines(run, range(1, 5))
    Sender(run, TRACKER, store.open).send()
    assert [number for number, _ in losses(store)] == [1, 2, 3, 4]


def test_steps_repeated_by_a_resume_are_not_sent_again(tmp_path: Path) -> None:
    run, store = made_run(tmp_path, steps=7), Store([])
    sender = Sender(run, TRACKER, store.open)
    sender.send()
    write_lines(run, range(1, 6))  # cut back to step 5 by a resume
    Sender(run, TRACKER, store.open).send()
    write_lines(run, range(1, 10), note="longer than before, so that the old place is inside a line")
    sender.send()
    assert [number for number, _ in losses(store)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_run_that_begins_anew_in_the_directory_is_sent_from_its_first_step(tmp_path: Path) -> None:
    run, store = made_run(tmp_path, steps=3), Store([])
    Sender(run, TRACKER, store.open).send()
    made_run(tmp_path, steps=2, token="ff" * 16)
    other = Store([])
    Sender(run, TRACKER, other.open).send()
    assert [number for number, _ in losses(other)] == [1, 2]


def test_another_project_is_another_cursor(tmp_path: Path) -> None:
    paths = {cursor_path(tmp_path, TrackerConfig(kind="mlflow", project=name)) for name in ("a", "b")}
    assert len(paths) == 2
    same = TrackerConfig(kind="mlflow", project="a", paths=True)
    assert cursor_path(tmp_path, same) in paths


def test_the_word_of_the_tracker_counts_more_than_the_cursor(tmp_path: Path) -> None:
    """A library that only hands steps to a process of its own may lose those that the cursor counts."""
    run = made_run(tmp_path, steps=5)
    write_whole(cursor_path(run, TRACKER), Cursor(token=TOKEN, sent=4, tried=4))
    behind, ahead = Store([], held=2), Store([], held=5)
    Sender(run, TRACKER, behind.open).send()
    assert [number for number, _ in losses(behind)] == [3, 4, 5]
    Sender(run, TRACKER, ahead.open).send()
    assert ahead.stored == []


def test_a_tracker_that_is_down_is_caught_up_later(tmp_path: Path) -> None:
    run, store = made_run(tmp_path, steps=2), Store([])

    def down() -> None:
        raise ConnectionError("connection refused")

    store.fails = down
    sender = Sender(run, TRACKER, store.open)
    for _ in range(3):
        with pytest.raises(TrackerDown, match="mlflow does not answer: connection refused"):
            sender.send()
    write_lines(run, range(1, 4))
    store.fails = lambda: None
    sender.send()
    assert [number for number, _ in losses(store)] == [1, 2, 3]


@pytest.mark.parametrize("end", [("complete", True), ("stopped on request", False), ("error: x", False), (None, None)])
def test_the_end_of_the_run_is_told(end: tuple[str | None, bool | None], tmp_path: Path) -> None:
    run, store = made_run(tmp_path, steps=1), Store([])
    events = [{"event": "launch", "time": 1.0, "after": 0}]
    if end[0] is not None:
        events.append({"event": "end", "time": 2.0, "step": 1, "reason": end[0]})
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    sender = Sender(run, TRACKER, store.open)
    sender.send()
    sender.close()
    assert store.closed == [end[1]]


@pytest.mark.parametrize("draws", [20, pytest.param(DRAWS, marks=pytest.mark.slow)])
def test_kills_failures_and_resumes_at_any_place_leave_each_value_once(draws: int, tmp_path: Path) -> None:
    """Draw the places: before and after each stored value, with kills, errors and cut files."""
    seed = int(os.environ.get("SFTSTREAM_SEED", random.randrange(2**32)))
    print(f"SFTSTREAM_SEED={seed}")
    draw = random.Random(seed)
    for case in range(draws):
        run = made_run(tmp_path / str(case))
        store = Store([])

        def fails() -> None:
            if draw.random() < 0.05:
                raise Killed if draw.random() < 0.5 else ConnectionError("reset")

        steps, sender = 0, None
        last = draw.randint(1, 40)
        while steps < last or sender is None or sender.sent < last:
            # A resume repeats up to 5 steps; the file may end with a torn line.
            steps = min(last, max(0, steps - draw.randint(0, 5)) if draw.random() < 0.3 else steps + draw.randint(0, 8))
            write_lines(run, range(1, steps + 1), pad="x" * draw.randint(0, 30))
            if draw.random() < 0.3:
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(line(steps + 1))[: draw.randint(1, 20)])
            store.fails = fails
            sender = sender or Sender(run, TRACKER, store.open)
            try:
                sender.send()
            except TrackerDown:
                pass
            except Killed:
                sender = None
        found = sorted((name, number) for name, number, _ in store.stored)
        names = ("loss", "refused", "refused_by_reason/too_long")
        assert found == [(name, number) for name in names for number in range(1, last + 1)], f"case {case}"


def test_a_torn_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    run = made_run(tmp_path, steps=1)
    whole = json.dumps(line(2)) + "\n"
    tail = Tail(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(whole[:9])
    assert [step.number for step in tail.batch(0, 1000)] == [1]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(whole[9:])
    assert [step.number for step in tail.batch(1, 1000)] == [2]


def test_batches_are_bounded_and_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    run = made_run(tmp_path, steps=6)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:10]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    tail = Tail(run)
    numbers, after = [], 0
    while batch := tail.batch(after, most=6):  # of three values each
        assert len(batch) <= 2
        numbers += [step.number for step in batch]
        after = numbers[-1]
    assert numbers == [1, 2, 4, 5, 6]


def test_a_missing_file_has_no_steps(tmp_path: Path) -> None:
    assert Tail(tmp_path).batch(0, 1000) == []


def test_a_damaged_cursor_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    run, store = made_run(tmp_path, steps=1), Store([])
    path = cursor_path(run, TRACKER)
    path.write_text("{")
    with pytest.raises(ValueError, match="delete the file"):
        Sender(run, TRACKER, store.open)
    path.unlink()
    Sender(run, TRACKER, store.open).send()
    assert read_cursor(path, TOKEN).sent == 1


def test_a_single_process_moves_a_cursor(tmp_path: Path) -> None:
    path = cursor_path(tmp_path, TRACKER)
    with claimed(path) as first, claimed(path) as second:
        assert (first, second) == (True, False)
    with claimed(path) as third:
        assert third
