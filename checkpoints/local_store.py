"""Steps as directories under a root of a file system.

`step-00000120/` is a committed step. A name with a dot in front is an attempt or a deletion under
way. `checkpoints.commit` shows a save by literal names. Rank 0 alone calls the methods that change
the root.
"""

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

# No leading zeros beyond eight digits: a step has exactly one name.
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,18})")
_FILE = re.compile(FILE_NAME)
_LEFTOVER = re.compile(r"\.step-[0-9]{8,19}\.(tmp|gone)-[0-9a-f]{16}")

_MANIFEST_LIMIT = 1 << 28
"""Limit on the bytes of a manifest, about two million chunks. A longer manifest is not read."""


def step_of(name: str) -> int | None:
    """Return 120 for the directory name `step-00000120`, None for names of other forms."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def require_growth(root: Path | str, step: int, steps: list[int]) -> None:
    """Raise CheckpointError unless `step` is above all of `steps`."""
    newest = max(steps, default=-1)
    if step <= newest:
        raise CheckpointError(
            f"{root} already holds step {newest}, so step {step} cannot be saved; to go on from an earlier "
            "step, move the later steps away or save to another directory"
        )


def check_manifest(path: Path | str, data: bytes, step: int) -> Manifest:
    """Return the manifest in `data`. Raises CorruptCheckpoint if damaged or of another step."""
    try:
        manifest = decode(data)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    if manifest.step != step:
        raise CorruptCheckpoint(f"{path} is the manifest of step {manifest.step}, not of step {step}")
    return manifest


def require_short(path: Path | str, size: int) -> None:
    """Raise CorruptCheckpoint if a manifest of `size` bytes is too long to be read."""
    if size > _MANIFEST_LIMIT:
        raise CorruptCheckpoint(f"{path} has {size} bytes; a manifest of more than {_MANIFEST_LIMIT} is not read")


class LocalStore:
    """The steps under a directory. `ObjectStore` has equal methods."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = Lock(root / ".lock")

    def path(self, step: int) -> Path:
        """Return the directory of a committed step."""
        return self.root / f"step-{step:08d}"

    def step_files(self, step: int, _manifest: Manifest) -> LocalFiles:
        """Return the files of a committed step, for reading."""
        return LocalFiles(self.path(step))

    def attempt(self, step: int, token: str) -> LocalFiles:
        """Return the files of an attempt, for writing before the commit."""
        return LocalFiles(self.root / f".{self.path(step).name}.tmp-{token}")

    def saved(self, step: int) -> datetime:
        """Return the local time at which a step was committed."""
        return datetime.fromtimestamp((self.path(step) / MANIFEST).stat().st_mtime)

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first. Links do not count."""
        try:
            names = [entry.name for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        return sorted(step for step in map(step_of, names) if step is not None)

    def manifest(self, step: int) -> Manifest:
        """Return the checked manifest of a committed step.

        Raises CheckpointError if the step does not exist, CorruptCheckpoint if the manifest is
        damaged, belongs to another step, or does not list every file of the directory.
        """
        steps = self.steps()
        if step not in steps:
            raise CheckpointError(f"{self.root} holds no step {step}; name one of {steps or 'another root'}")
        path = self.path(step) / MANIFEST
        with open_file(path) as file:
            require_short(path, os.fstat(file.fileno()).st_size)
            data = file.read()
        manifest = check_manifest(path, data, step)
        names = [name for name in os.listdir(path.parent) if _FILE.fullmatch(name)]
        if surplus := sorted(set(names) - manifest.files.keys()):
            # Never read, but a mixed-up directory may hold other wrong files.
            raise CorruptCheckpoint(
                f"{path.with_name(surplus[0])} is not in the manifest of step {step}; move the file away"
            )
        return manifest

    def claim(self) -> None:
        """Let only this process change the root, until `release` or the end of the process."""
        make_directory(self.root)
        self._lock.take()

    def release(self) -> None:
        """Allow changes of the root by any process again."""
        self._lock.release()

    def begin(self, step: int, rejected: Collection[int]) -> str:
        """Begin an attempt at a step: make a directory and return a token.

        The token is 16 hexadecimal characters. Steps in `rejected` were found damaged and are
        renamed to `step-<number>.rejected-<token>`. Leftovers of killed saves are deleted.
        """
        self.claim()
        require_growth(self.root, step, [other for other in self.steps() if other not in rejected])
        self._sweep()
        token = secrets.token_hex(8)
        for other in set(rejected).intersection(self.steps()):
            aside = self.root / f"{self.path(other).name}.rejected-{token}"
            os.rename(self.path(other), aside)
            logger.warning("step %d is damaged and was renamed to %s", other, aside)
        self.attempt(step, token).path.mkdir()
        return token

    def commit(self, step: int, token: str, parts: list[Part], about: About) -> None:
        """Commit the files of all ranks: write the manifest, then rename the directory.

        Raises CheckpointError if rank 0 does not see a file of another rank.
        """
        attempt = self.attempt(step, token).path
        manifest = merge(parts, step=step, token=token, about=about)
        manifest.check()
        unseen = [name for name in manifest.files if not (attempt / name).exists()]
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see {attempt / unseen[0]}; the root must be a directory that all ranks share"
            )
        write_file(attempt / MANIFEST, [encode(manifest)])
        publish(attempt, self.path(step))

    def abandon(self, step: int, token: str) -> None:
        """Delete a failed attempt. A later save deletes any leftovers."""
        shutil.rmtree(self.attempt(step, token).path, ignore_errors=True)

    def delete(self, steps: Iterable[int]) -> None:
        """Delete committed steps.

        Every step is renamed first: a half-deleted step never looks committed.
        """
        token = secrets.token_hex(8)
        gone = []
        for step in steps:
            gone.append(self.root / f".{self.path(step).name}.gone-{token}")
            os.rename(self.path(step), gone[-1])
        if gone:
            sync(self.root)
            discard(gone)

    def _sweep(self) -> None:
        """Delete leftovers of killed saves and killed deletions."""
        names = [entry.name for entry in os.scandir(self.root)]
        discard(self.root / name for name in names if _LEFTOVER.fullmatch(name))
