"""The names under a root and what may happen to them, by one process: rank 0 alone calls what changes anything."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable
from datetime import datetime
from pathlib import Path

from checkpoints.commit import LocalFiles, discard, make_directory, open_file, publish, sync, write_file
from checkpoints.errors import CheckpointError, CorruptCheckpoint
from checkpoints.lock import Lock
from checkpoints.manifest import FILE_NAME, MANIFEST, About, Manifest, Part, decode, encode, merge

logger = logging.getLogger(__name__)

# No leading zeros beyond eight digits: a step has one name only.
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,18})")
_FILE = re.compile(FILE_NAME)
_LEFTOVER = re.compile(r"\.step-[0-9]{8,19}\.(tmp|gone)-[0-9a-f]{16}")

_MANIFEST_LIMIT = 1 << 28
"""Bytes of a manifest, about two million chunks. More is refused unread."""


def step_of(name: str) -> int | None:
    """The step whose directory has this name; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def require_growth(root: Path | str, step: int, steps: list[int]) -> None:
    """Raises `CheckpointError` unless `step` is above all of `steps`."""
    newest = max(steps, default=-1)
    if step <= newest:
        raise CheckpointError(
            f"{root} already holds step {newest}, so step {step} cannot be saved; to go on from an earlier "
            "step, move the later ones away or save to another directory"
        )


def check_manifest(path: Path | str, data: bytes, step: int) -> Manifest:
    """The manifest in `data`, if it is one and of this step."""
    try:
        manifest = decode(data)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    if manifest.step != step:
        raise CorruptCheckpoint(f"{path}: it is the manifest of step {manifest.step}")
    return manifest


def require_short(path: Path | str, size: int) -> None:
    """Raises `CorruptCheckpoint` for a manifest that is too long to be read."""
    if size > _MANIFEST_LIMIT:
        raise CorruptCheckpoint(f"{path} has {size} bytes; {_MANIFEST_LIMIT} are the most that is read")


class LocalStore:
    """The steps under `root`: `step-00000120` is committed; names with a dot in front are on their way in or out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = Lock(root / ".lock")

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def step_files(self, step: int, _manifest: Manifest) -> LocalFiles:
        """Where a committed step is read."""
        return LocalFiles(self.path(step))

    def attempt(self, step: int, token: str) -> LocalFiles:
        """Where a step is written before it is committed."""
        return LocalFiles(self.root / f".{self.path(step).name}.tmp-{token}")

    def saved(self, step: int) -> datetime:
        """When a step was committed, in local time."""
        return datetime.fromtimestamp((self.path(step) / MANIFEST).stat().st_mtime)

    def steps(self) -> list[int]:
        """The committed steps, oldest first. Links do not count."""
        try:
            names = [entry.name for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        return sorted(step for step in map(step_of, names) if step is not None)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a committed step, checked; raises `CorruptCheckpoint` if it is not this step's."""
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"{self.root} holds no step {step}; it holds {steps or 'no steps'}")
        path = self.path(step) / MANIFEST
        with open_file(path) as file:
            require_short(path, os.fstat(file.fileno()).st_size)
            data = file.read()
        manifest = check_manifest(path, data, step)
        ours = [name for name in os.listdir(path.parent) if _FILE.fullmatch(name)]
        if surplus := sorted(set(ours) - manifest.files.keys()):
            # Never read, but whoever put it there may have mixed up more.
            raise CorruptCheckpoint(f"{path.with_name(surplus[0])} is not in its manifest")
        return manifest

    def claim(self) -> None:
        """Makes this process the only one that may change the root, until it ends or `release`."""
        make_directory(self.root)
        self._lock.take()

    def release(self) -> None:
        self._lock.release()

    def begin(self, step: int, rejected: Collection[int]) -> str:
        """Makes the directory of an attempt and returns its token. Moves steps aside that were found damaged."""
        self.claim()
        require_growth(self.root, step, [other for other in self.steps() if other not in rejected])
        self._sweep()
        token = secrets.token_hex(8)
        for other in set(rejected).intersection(self.steps()):
            aside = self.root / f"{self.path(other).name}.rejected-{token}"
            os.rename(self.path(other), aside)
            logger.warning("step %d was damaged and is now %s", other, aside)
        self.attempt(step, token).path.mkdir()
        return token

    def commit(self, step: int, token: str, parts: list[Part], about: About) -> None:
        """Makes what the ranks wrote a step: the manifest last, then one rename."""
        attempt = self.attempt(step, token).path
        manifest = merge(parts, step=step, token=token, about=about)
        manifest.check()
        unseen = [name for name in manifest.files if not (attempt / name).exists()]
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see {attempt / unseen[0]}; the root must be one that all ranks share"
            )
        write_file(attempt / MANIFEST, [encode(manifest)])
        publish(attempt, self.path(step))

    def abandon(self, step: int, token: str) -> None:
        """Gives back the room of a failed attempt; what cannot be deleted now is swept by the next save."""
        shutil.rmtree(self.attempt(step, token).path, ignore_errors=True)

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes committed steps. They are renamed first: one that is deleted by half never looks like a step."""
        token = secrets.token_hex(8)
        gone = []
        for step in steps:
            gone.append(self.root / f".{self.path(step).name}.gone-{token}")
            os.rename(self.path(step), gone[-1])
        if gone:
            sync(self.root)
            discard(gone)

    def _sweep(self) -> None:
        """Deletes what killed saves and killed deletions left behind."""
        names = [entry.name for entry in os.scandir(self.root)]
        discard(self.root / name for name in names if _LEFTOVER.fullmatch(name))
