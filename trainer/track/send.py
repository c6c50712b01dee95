"""Send the steps of a run to a tracker, each of them once, across failures and kills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from sftstream import Door, one_line
from trainer.report.read import require_run
from trainer.reporting.events import COMPLETE, EVENTS, Ended, Event
from trainer.track.config import TrackerConfig
from trainer.track.content import ABOUT, About, Step
from trainer.track.cursor import Cursor, cursor_path, read_cursor
from trainer.track.tail import Tail
from trainer.track.tracker import Opener, Tracker, TrackerDown
from trainer.whole_file import DAMAGED, write_whole

MOST = 1000
"""Values of a batch, about."""


class Sender:
    """The way of a run's steps to a tracker.

    Before a batch is sent, the cursor notes that it is tried; after the tracker has acknowledged
    the batch, that it is sent. A kill between the two leaves steps that the tracker may hold, and
    that are then sent in a way that stores none twice.
    """

    def __init__(self, run: Path, tracker: TrackerConfig, opener: Opener) -> None:
        self._run = run
        self._opener = opener
        self._door = Door(f"{tracker.kind} does not answer", TrackerDown)
        self._about = read_about(run)
        self._path = cursor_path(run, tracker)
        self._cursor = read_cursor(self._path, self._about.token)
        self._tail = Tail(run)
        self._batch: list[Step] = []
        self._tracker: Tracker | None = None

    @property
    def sent(self) -> int:
        """Last step that the tracker has acknowledged."""
        return self._cursor.sent

    def send(self) -> None:
        """Send all steps that are not sent yet.

        Raises TrackerDown if the tracker does not take them, OSError if a file of the run cannot be
        read or written. The next call goes on where this call has ended.
        """
        tracker = self._opened()
        while self._batch or self._read():
            last = self._batch[-1].number
            tried = self._cursor.tried
            if last > tried:
                self._store(sent=self._cursor.sent, tried=last)
            with self._door:
                tracker.send(self._batch, tried)
            self._batch = []
            self._store(sent=last, tried=max(last, tried))

    def close(self) -> None:
        """End the session with the tracker, and tell the tracker if the run has ended.

        Raises TrackerDown if the tracker does not answer.
        """
        tracker = self._opened()
        with self._door:
            tracker.close(complete=_complete(self._run))
        self._tracker = None

    def _opened(self) -> Tracker:
        if self._tracker is None:
            with self._door:
                self._tracker = self._opener(self._about)
            held = self._tracker.held
            if held is not None and held != self._cursor.sent:
                self._batch, self._tail = [], Tail(self._run)
                self._store(sent=held, tried=max(held, self._cursor.tried))
        return self._tracker

    def _read(self) -> bool:
        self._batch = self._tail.batch(self._cursor.sent, MOST)
        return bool(self._batch)

    def _store(self, *, sent: int, tried: int) -> None:
        cursor = Cursor(token=self._about.token, sent=sent, tried=tried)
        write_whole(self._path, cursor)
        self._cursor = cursor


def read_about(run: Path) -> About:
    """Return the facts about a run that a launch has stored for its trackers.

    Raises ValueError if `run` is not the directory of a run, if the run has no trackers, or if the
    file is damaged.
    """
    require_run(run, ABOUT)
    try:
        return msgspec.json.decode((run / ABOUT).read_bytes(), type=About)
    except FileNotFoundError:
        raise ValueError(
            f"{run} has no {ABOUT}, so its run had no tracker; add a [[trackers]] table to the config and start the "
            "run's command again"
        ) from None
    except DAMAGED as error:
        raise ValueError(
            f"{run / ABOUT} was not written by a run: {one_line(error)}; start the run's command again, which writes it"
        ) from error


def _complete(run: Path) -> bool | None:
    """Return True if the last launch has completed the run, False if it has ended otherwise, and
    None if it has not ended, or a kill has ended it."""
    decode: Callable[[bytes], Event] = msgspec.json.Decoder(Event).decode
    try:
        event = decode((run / EVENTS).read_bytes().splitlines()[-1])
    except (OSError, IndexError, *DAMAGED):
        return None
    return event.reason == COMPLETE if isinstance(event, Ended) else None
