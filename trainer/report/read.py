"""Read the files of a run and summarize them. The files may be partial, damaged, or in use."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from sftstream import require_files
from trainer.report.flat import excerpt, flatten
from trainer.report.launches import summarize_launches
from trainer.report.lines import LineReader
from trainer.report.records import CheckpointSummary, Refusals, RefusedRow, SessionLine, SourceShare, Summary
from trainer.report.steps import Steps
from trainer.reporting.events import EVENTS, METRICS, Ended, Event, Launch, Saved, Unapplied
from trainer.whole_file import DAMAGED

SESSIONS = "ledger/sessions.jsonl"
EXAMPLES = 3
"""Refused rows shown of each reason."""
MOST_REASONS = 40
"""Reasons of refusals that are listed, the most frequent."""
MOST_CHECKPOINTS = 1000
"""Checkpoints that are listed, the newest."""
FILES = (METRICS, EVENTS, "run.json", "ledger", "checkpoints")
"""Files and folders of a run, of which a directory of a run holds one or more."""


def require_run(directory: Path, *more: Path) -> None:
    """Raise ValueError unless a directory holds a file in `FILES` or `more`."""
    if any((directory / name).exists() for name in (*map(Path, FILES), *more)):
        return
    otherwise = "is not a directory" if directory.exists() else "does not exist"
    there = "holds no file of a run" if directory.is_dir() else otherwise
    raise ValueError(f"{str(directory)!r} {there}; name the directory of a run, such as runs/first")


class RunReader:
    """The files of a run in `directory`. Each call of `summary` reads what was added since.

    Raises ValueError if the directory is not that of a run.
    """

    def __init__(self, directory: Path) -> None:
        require_run(directory)
        require_files([*(directory / name for name in FILES[:3]), directory / "refused.jsonl", directory / SESSIONS])
        self._directory = directory
        self._events = LineReader[Event](directory / EVENTS, Launch | Saved | Unapplied | Ended)
        self._sessions = LineReader[SessionLine](directory / SESSIONS, SessionLine)
        self._refused = LineReader[RefusedRow](directory / "refused.jsonl", RefusedRow)
        self._examples = defaultdict[str, list[RefusedRow]](list)
        self._launches: list[Launch] = []
        self._ends: dict[int, Ended] = {}
        """Number of a launch -> its end."""
        self._saved: dict[int, Saved] = {}
        self._session: SessionLine | None = None
        self._session_launches: list[Launch] = []
        self._marked: set[int] = set()
        self._steps = Steps(directory, self._marked)

    def summary(self, *, is_alive: bool = False) -> Summary:
        """Return the run as its files tell it now. Raises OSError if a file cannot be read.

        `is_alive` is True if the run is known to be under way, however long the last step is ago.
        """
        self._read_events()
        self._read_sessions()
        self._steps.read()
        self._read_examples()
        return self._summarize(time.time(), is_alive=is_alive)

    def _read_events(self) -> None:
        for event in self._events.new():
            if isinstance(event, Launch):
                self._launches.append(event)
                self._marked.add(event.after)
                # A launch repeats all steps after its first, and takes their checkpoints again.
                self._saved = {step: saved for step, saved in self._saved.items() if step <= event.after}
            elif isinstance(event, Ended):
                self._ends[len(self._launches) - 1] = event
            elif isinstance(event, Saved):
                self._saved[event.step] = event
                while len(self._saved) > MOST_CHECKPOINTS:
                    del self._saved[min(self._saved)]

    def _read_sessions(self) -> None:
        """Read the ledger's sessions, the launches of versions that wrote no events."""
        for session in self._sessions.new():
            self._session = session
            environment = {"loader workers": str(session.workers), "sftstream": session.version}
            self._session_launches.append(
                Launch(time=0.0, after=session.after, mesh=session.mesh, environment=environment)
            )

    def _read_examples(self) -> None:
        """Read refused rows until there are `EXAMPLES` of each reason."""
        reasons = self._steps.reasons
        if all(len(self._examples[reason]) >= min(EXAMPLES, count) for reason, count in reasons.items()):
            return
        for row in self._refused.new():
            if len(self._examples[row.reason]) < EXAMPLES:
                self._examples[row.reason].append(
                    RefusedRow(excerpt(row.place), excerpt(row.reason), excerpt(row.detail))
                )

    def _summarize(self, now: float, *, is_alive: bool) -> Summary:
        steps, last = self._steps, self._steps.last
        launches = summarize_launches(
            self._launches or self._session_launches, self._ends, steps, None if is_alive else now
        )
        newest = self._launches[-1] if self._launches else None
        config = newest.config if newest else {"data": self._session.data} if self._session else {}
        status, under_way = _status(launches[-1].end if launches else "", last.step if last else 0)
        mfu = steps.mfu_weighted / steps.mfu_seconds if steps.mfu_seconds else None
        return Summary(
            name=self._directory.resolve().name,
            directory=str(self._directory),
            read_at=now,
            status=status,
            is_under_way=under_way,
            step=last.step if last else 0,
            share=_share(last.rows if last else 0, last.step if last else 0, newest),
            rows=last.rows if last else 0,
            tokens=steps.tokens,
            trained_tokens=steps.trained_tokens,
            seconds=steps.seconds,
            refused=steps.refused,
            loss=steps.loss,
            steps_without_loss=steps.without_loss,
            validation_loss=steps.validation_loss,
            best=steps.best,
            tokens_per_second=_ratio(steps.tokens, steps.seconds),
            gpu_tokens_per_second=_ratio(steps.gpu_tokens, steps.seconds) or None,
            mfu=mfu,
            peak_memory=steps.peak_memory,
            fill=_ratio(steps.filled, steps.fill_steps),
            trained_share=_ratio(steps.trained_tokens, steps.tokens),
            data_wait=_ratio(steps.waited, steps.seconds),
            curves=steps.curves(),
            held_out=steps.held_out(),
            mixture=_mixture(steps, config),
            launches=launches,
            checkpoints=self._checkpoints(),
            refusals=self._refusals(),
            config=flatten(config),
            identity=flatten(self._session.identity) if self._session else {},
            environment=_environment(newest or (self._session_launches[-1] if self._session_launches else None)),
            damage=(*steps.lines.damage, *self._events.damage, *self._sessions.damage, *self._refused.damage),
        )

    def _refusals(self) -> tuple[Refusals, ...]:
        return tuple(
            Refusals(reason=excerpt(reason), rows=rows, examples=tuple(self._examples[reason]))
            for reason, rows in self._steps.reasons.most_common(MOST_REASONS)
        )

    def _checkpoints(self) -> tuple[CheckpointSummary, ...]:
        """Return the checkpoints of the events and those on disk, the newest `MOST_CHECKPOINTS`."""
        on_disk = self._on_disk()
        steps = sorted({*self._saved, *(on_disk or {})})[-MOST_CHECKPOINTS:]
        found = []
        for step in steps:
            saved = self._saved.get(step)
            found.append(
                CheckpointSummary(
                    step=step,
                    time=saved.time if saved else (on_disk or {}).get(step),
                    seconds=saved.seconds if saved else None,
                    kept=None if on_disk is None else step in on_disk,
                )
            )
        return tuple(found)

    def _on_disk(self) -> dict[int, float] | None:
        """Return step and time of each committed checkpoint; None without a local directory."""
        root = _root(self._directory)
        if root is None or not root.is_dir():
            return None
        found = {}
        for path in root.iterdir():
            if match := re.fullmatch(r"step-([0-9]{8,12})", path.name):
                try:
                    found[int(match[1])] = (path / "manifest.json").stat().st_mtime
                except OSError:
                    continue  # not committed, or deleted meanwhile
        return found


def _root(directory: Path) -> Path | None:
    """Return the directory of the run's checkpoints; None for a URL or a damaged `run.json`."""
    try:
        owner = msgspec.json.decode((directory / "run.json").read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        owner = {}
    except (OSError, *DAMAGED):
        return None
    root = owner.get("checkpoints")
    if root is None:
        return directory / "checkpoints"
    return Path(root) if isinstance(root, str) and "://" not in root and "\0" not in root else None


def _mixture(steps: Steps, config: dict[str, Any]) -> tuple[SourceShare, ...]:
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    tables = [source if isinstance(source, dict) else {} for source in sources or ()]
    total = sum(steps.source_tokens)
    found = []
    for number, (tokens, curve) in enumerate(zip(steps.source_tokens, steps.mixture(), strict=True)):
        table = tables[number] if number < len(tables) else {}
        weight = table.get("weight")
        found.append(
            SourceShare(
                path=excerpt(str(table.get("path", f"source {number}"))),
                weight=float(weight) if isinstance(weight, int | float) else None,
                tokens=tokens,
                share=tokens / total if total else 0.0,
                curve=curve,
            )
        )
    return tuple(found)


def _share(rows: int, step: int, launch: Launch | None) -> float | None:
    """Return the finished part of the run, as the run's display does."""
    table = launch.config.get("run") if launch else None
    steps = table.get("steps") if isinstance(table, dict) else None
    ends = [(rows, launch.total_rows if launch else None), (step, steps if isinstance(steps, int) else None)]
    parts = [done / total for done, total in ends if total]
    return min(1.0, max(parts)) if parts else None


def _environment(launch: Launch | None) -> dict[str, str]:
    if launch is None:
        return {}
    mesh = {"topology": ", ".join(f"{name} {size}" for name, size in launch.mesh.items())} if launch.mesh else {}
    return flatten(mesh | launch.environment)


def _status(end: str, step: int) -> tuple[str, bool]:
    """Return the state of a run in words, and True if the run may be under way."""
    if end == "under way":
        return f"under way after step {step:,}" if step else "started, no step finished yet", True
    if not end:
        return f"after step {step:,}; the trainer of this run recorded no launches and ends", False
    if end.startswith("error: "):
        return f"ended after step {step:,} by an {end}", False
    return f"{end} after step {step:,}", False


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
