"""The part that all trackers share: their interface, and the error of a tracker that is down."""

from __future__ import annotations

from typing import Protocol

from trainer.track.content import About, Step


class TrackerDown(RuntimeError):
    """A tracker that does not take what was sent, with the reason; to be tried again."""


class Tracker(Protocol):
    """The run of a tracker, opened. Each method raises TrackerDown, or any error of the library."""

    held: int | None
    """Last step that the tracker holds, by its own word; None if the cursor tells."""

    def send(self, steps: list[Step], tried: int) -> None:
        """Send steps in order, and return once the tracker has them.

        Steps up to the number `tried` may have reached the tracker before, in whole or in part, and
        must not appear twice.
        """

    def close(self, *, complete: bool | None) -> None:
        """End the session; `complete` tells the run's end, None while the run goes on."""


class Opener(Protocol):
    """A function that opens the run of a tracker, or begins it at the first call."""

    def __call__(self, about: About) -> Tracker:
        """Return the tracker's run, found by the token of `about`."""
