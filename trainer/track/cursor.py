"""Store how far a tracker has got the steps of a run."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from sftstream import one_line
from trainer.track.config import TrackerConfig
from trainer.whole_file import DAMAGED


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """The place of a tracker in `metrics.jsonl`."""

    token: str
    """Token of the run; steps of another run in the directory are sent from the first."""
    sent: int = 0
    """Last step that the tracker has acknowledged."""
    tried: int = 0
    """Last step that was ever sent, acknowledged or not."""


def cursor_path(run: Path, tracker: TrackerConfig) -> Path:
    """Return the file of a tracker's cursor; another project, name or address is another file."""
    target = msgspec.json.encode(tracker.target)
    return run / "trackers" / f"{tracker.kind}-{hashlib.sha256(target).hexdigest()[:8]}.json"


def read_cursor(path: Path, token: str) -> Cursor:
    """Return the stored cursor of the run with `token`, or a cursor before the first step.

    Raises ValueError if the file holds no cursor, OSError if it cannot be read.
    """
    try:
        cursor = msgspec.json.decode(path.read_bytes(), type=Cursor)
    except FileNotFoundError:
        return Cursor(token=token)
    except DAMAGED as error:
        raise ValueError(
            f"{path} was not written by a run: {one_line(error)}; delete the file, and the steps are sent again from the first"
        ) from error
    return cursor if cursor.token == token else Cursor(token=token)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Yield True to the only process that may move the cursor in `path`, False to any other.

    Raises OSError if the file system has no locks.
    """
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
