"""Tell from the events when each launch of a run began and ended, and which steps were lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.report.flat import excerpt
from trainer.report.records import LaunchSummary
from trainer.report.steps import Steps
from trainer.reporting.events import Ended, Launch

UNDER_WAY, KILLED = "under way", "killed"
MOST_CHANGES = 20
"""Changes of a launch that are told."""
SILENT_SECONDS, SILENT_STEPS = 600, 50
"""A launch without an end counts as killed after both of these: seconds, and mean steps."""


def summarize_launches(
    launches: Sequence[Launch], ends: Mapping[int, Ended], steps: Steps, now: float | None
) -> tuple[LaunchSummary, ...]:
    """Return a record of each launch. `ends` has the end of a launch by its number.

    A launch that has no end and is followed by another was killed. `now` is the Unix time, None if
    the last launch is known to be under way.
    """
    found = []
    for number, launch in enumerate(launches):
        after = launches[number + 1] if number + 1 < len(launches) else None
        end = ends.get(number)
        last = steps.last.step if steps.last else launch.after
        if after is not None:
            reached, ended = max(after.reached, after.after), after.last_sign
        else:
            reached, ended = max(last, launch.after), steps.last.time if steps.last else None
        if end is not None:
            reached, ended = end.step, end.time
        if ended is not None and launch.time and ended < launch.time:
            ended = launch.time  # killed before the first step
        kept = after.after if after else reached
        found.append(
            LaunchSummary(
                after=launch.after,
                reached=reached,
                lost=max(0, reached - kept),
                began=launch.time or None,
                kept=_kept(launch, kept, steps) if reached > kept else None,
                ended=ended,
                end=excerpt(end.reason) if end else _end(launch, ended, steps, now, is_last=after is None),
                mesh=launch.mesh,
                changed=_changed(launches[number - 1], launch) if number else (),
            )
        )
    return tuple(found)


def _kept(launch: Launch, step: int, steps: Steps) -> float | None:
    """Return the time of the last kept step, or the launch's begin if it kept no step."""
    found = steps.times.get(step)
    return found if found is not None and step > launch.after else launch.time or None


def _end(launch: Launch, ended: float | None, steps: Steps, now: float | None, *, is_last: bool) -> str:
    if not is_last:
        return KILLED
    if not launch.time:
        return ""
    if now is None:
        return UNDER_WAY
    silent = now - (ended or launch.time)
    done = steps.last.step if steps.last else 0
    mean = steps.seconds / done if done else 0.0
    return KILLED if silent > max(SILENT_SECONDS, SILENT_STEPS * mean) else UNDER_WAY


def _changed(before: Launch, after: Launch) -> tuple[str, ...]:
    tables = [{**{name: str(size) for name, size in one.mesh.items()}, **one.environment} for one in (before, after)]
    names = [name for name in dict.fromkeys([*tables[0], *tables[1]]) if tables[0].get(name) != tables[1].get(name)]
    return tuple(
        excerpt(f"{name}: {tables[0].get(name, 'none')} -> {tables[1].get(name, 'none')}")
        for name in names[:MOST_CHANGES]
    )
