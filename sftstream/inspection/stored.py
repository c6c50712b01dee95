"""Read the data state of a run from wherever it is stored: a state file, a checkpoint, a run."""

from __future__ import annotations

import subprocess
import sys
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

import msgspec

from sftstream.door import Door
from sftstream.regular_files import require_files
from sftstream.state import DataState

STREAM, RUN = "data/stream/", "data/run"
"""Keys in a checkpoint: prefix of the states of the streams, and the state without its streams."""
REMEDY = (
    "name a JSON file with a state dict, a directory such as runs/my-run, or a checkpoint such as "
    "runs/my-run/checkpoints/step-00000100"
)


class StoredState(NamedTuple):
    """A data state, and its place for messages."""

    state: DataState
    place: str
    """For example "checkpoint of step 100 in runs/first/checkpoints"."""


def read_state(path: str | PathLike[str]) -> DataState:
    """Return the data state that a path holds.

    `path` is one of: a JSON file with a state dict; a checkpoint, such as
    `runs/first/checkpoints/step-00000100`; a directory of checkpoints; the directory of a run. Of a
    run or a directory of checkpoints, the newest checkpoint is read. Checkpoints may lie behind a
    URL such as `s3://bucket/first`. Only the files with the data state are read and verified, so no
    GPU and no process group is needed, and no weight is loaded.

    Raises ValueError if there is no state, or if it is damaged.
    """
    return find_state(path).state


def find_state(path: str | PathLike[str]) -> StoredState:
    """Return the data state that a path holds, as `read_state` does, with its place."""
    place = fspath(path)
    if "://" in place:
        return _of_checkpoint(place)
    local = Path(place)
    if not local.is_dir():
        return StoredState(_of_file(local), f"state file {place}")
    if states := sorted((local / "states").glob("step-*.json")):  # a run of the data service alone
        return StoredState(_of_file(states[-1]), f"state file {states[-1]}")
    root = _checkpoints_of(local)
    if "://" not in root and not Path(root).name.startswith("step-") and not any(Path(root).glob("step-*")):
        raise ValueError(f"{place} holds no checkpoint and no state; {REMEDY}")
    return _of_checkpoint(root)


class _Owner(msgspec.Struct):
    """The part of a run's `run.json` that tells the place of its checkpoints."""

    checkpoints: str | None = None


def _checkpoints_of(directory: Path) -> str:
    """Return the directory of checkpoints of a run; `directory` itself if it is no run."""
    owner = directory / "run.json"
    require_files([owner])
    if owner.exists():
        with Door(f"{owner} was not written by a run"):
            root = msgspec.json.decode(owner.read_bytes(), type=_Owner).checkpoints
        return root or str(directory / "checkpoints")
    inside = directory / "checkpoints"
    return str(inside if inside.is_dir() else directory)


def _of_file(path: Path) -> DataState:
    require_files([path])
    with Door(f"{path} cannot be read"):
        content = path.read_bytes()
    try:
        with Door("not JSON"):
            value = msgspec.json.decode(content)
        return DataState.parse(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Values(msgspec.Struct):
    """The output of `python -m checkpoints values`."""

    root: str
    step: int
    values: dict[str, object]


def _of_checkpoint(path: str) -> StoredState:
    # In another process, because sftstream does not import the package of checkpoints.
    command = [sys.executable, "-m", "checkpoints", "values", path, "--prefix", "data/"]
    ended = subprocess.run(command, capture_output=True, check=False)
    if ended.returncode:
        reason = ended.stderr.decode(errors="replace").strip().splitlines() or ["it ended without a message"]
        raise ValueError(f"the state in {path} cannot be read: {reason[-1].removeprefix('error: ')}; {REMEDY}")
    found = msgspec.msgpack.decode(ended.stdout, type=_Values)
    run, streams = found.values.get(RUN), _streams(found.values)
    if not isinstance(run, dict):
        raise ValueError(f"step {found.step} in {found.root} was saved without a data state; {REMEDY}")
    with Door(f"step {found.step} in {found.root}"):
        state = DataState.from_parts(run, streams)
    return StoredState(state, f"checkpoint of step {found.step} in {found.root}")


def _streams(values: dict[str, object]) -> dict[int, bytes]:
    return {
        int(key.removeprefix(STREAM)): blob
        for key, blob in values.items()
        if key.startswith(STREAM) and isinstance(blob, bytes)
    }
