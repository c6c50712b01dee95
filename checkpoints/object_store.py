"""Steps in an object store, where nothing can be renamed and nothing locked: the manifest, put last, is the commit.

An object is there whole or not at all and is at once seen by all. A step's files are put under the token of the attempt,
so no two attempts ever write to one name; a step is there if and only if its manifest is.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from checkpoints.commit import Readable
from checkpoints.digest import BLOCK, digesting
from checkpoints.errors import CheckpointError, CorruptCheckpoint
from checkpoints.local_store import LocalStore, check_manifest, require_growth, require_short, step_of
from checkpoints.manifest import MANIFEST, About, File, Manifest, Part, encode, merge

logger = logging.getLogger(__name__)

_PIECE = 1 << 26
"""Bytes that are given to a file of fsspec at once: it keeps a copy."""


def open_root(root: Path | str) -> LocalStore | ObjectStore:
    """A URL is an object store's; anything else is a directory."""
    return ObjectStore(root) if isinstance(root, str) and "://" in root else LocalStore(Path(root).absolute())


class ObjectFiles:
    """A place in an object store."""

    readers = 1  # Some of fsspec's stores give all who open a file the same one.

    def __init__(self, filesystem: Any, prefix: str) -> None:
        self._filesystem = filesystem
        self._prefix = prefix

    def location(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> File:
        size = 0
        with digesting() as digest:
            with self._filesystem.open(self.location(name), "wb") as file:
                for part in parts:
                    size += len(part)
                    digest.update(part)
                    for begin in range(0, len(part), _PIECE):
                        file.write(part[begin : begin + _PIECE])
            return File(size, digest.hexdigest())

    @contextmanager
    def open(self, name: str, size: int) -> Iterator[Readable]:
        location = self.location(name)
        try:
            found = self._filesystem.size(location)
            if found != size:
                raise CorruptCheckpoint(f"{location} has {found} bytes, {size} were committed")
            with self._filesystem.open(location, "rb") as file:
                yield file
        except (FileNotFoundError, IsADirectoryError, EOFError) as error:
            raise CorruptCheckpoint(f"{location} cannot be read: {error!r}") from error

    def digest(self, name: str, size: int) -> str:
        with self.open(name, size) as file, digesting() as digest:
            while block := file.read(BLOCK):
                digest.update(block)
            return digest.hexdigest()


class ObjectStore:
    """The steps under a URL: `step-00000120/manifest.json` and, beside it, `<token>/rank00000.safetensors` and the like."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._filesystem, self._prefix = fsspec.url_to_fs(self.root)
        self._known: set[int] | None = None

    def path(self, step: int) -> str:
        return f"{self.root}/step-{step:08d}"

    def step_files(self, step: int, manifest: Manifest) -> ObjectFiles:
        """Where a committed step is read."""
        return self.attempt(step, manifest.token)

    def attempt(self, step: int, token: str) -> ObjectFiles:
        """Where a step is written, before it is committed and after."""
        return ObjectFiles(self._filesystem, f"{self._step(step)}/{token}")

    def saved(self, step: int) -> datetime:
        """When a step was committed, in local time."""
        saved: datetime = self._filesystem.modified(self._manifest(step))
        return saved.astimezone().replace(tzinfo=None)

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return [step for step in self._begun() if self._filesystem.exists(self._manifest(step))]

    def manifest(self, step: int) -> Manifest:
        """The manifest of a committed step, checked; raises `CorruptCheckpoint` if it is not this step's."""
        path = self._manifest(step)
        try:
            require_short(path, self._filesystem.size(path))
            data = self._filesystem.cat_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{self.root} holds no step {step}; it holds {self.steps() or 'no steps'}") from None
        return check_manifest(path, data, step)

    def claim(self) -> None:
        """Notes which steps are there, and clears away what killed runs left; others that come later are another run's."""
        if self._known is None:
            self._known = set(self.steps())
            for step in self._begun():
                self._sweep(step)

    def release(self) -> None:
        self._known = None

    def begin(self, step: int, rejected: Collection[int]) -> str:
        """The token of an attempt. Takes damaged steps out of the way by renaming their manifests."""
        self.claim()
        assert self._known is not None
        steps = self.steps()
        if foreign := sorted(set(steps) - self._known):
            raise CheckpointError(
                f"another run has saved steps {foreign} to {self.root} since this one began; two runs cannot share it: "
                "stop that one, or give this one another directory"
            )
        require_growth(self.root, step, [other for other in steps if other not in rejected])
        token = secrets.token_hex(8)
        for other in set(rejected).intersection(steps):
            self._filesystem.cp_file(self._manifest(other), f"{self._manifest(other)}.rejected-{token}")
            self._filesystem.rm_file(self._manifest(other))
            logger.warning("step %d was damaged and its manifest is now %s.rejected-%s", other, MANIFEST, token)
        return token

    def commit(self, step: int, token: str, parts: list[Part], about: About) -> None:
        """Makes what the ranks wrote a step, by its manifest alone."""
        manifest = merge(parts, step=step, token=token, about=about)
        manifest.check()
        step_files = self.attempt(step, token)
        for name, file in manifest.files.items():
            with step_files.open(name, file.size):
                pass  # All ranks see one store, and what they put into it is there.
        assert self._known is not None
        self._known.add(step)
        try:
            self._filesystem.pipe_file(self._manifest(step), encode(manifest), mode="create")
        except FileExistsError:
            self._known.remove(step)
            raise CheckpointError(f"another run has just saved step {step} to {self.root}") from None

    def abandon(self, step: int, token: str) -> None:
        """Takes back a failed attempt, and its manifest where it is not known whether that was put."""
        with suppress(CheckpointError, OSError):
            if self.manifest(step).token == token:
                self._filesystem.rm_file(self._manifest(step))
        self._remove(f"{self._step(step)}/{token}")

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes committed steps, their manifests first."""
        for step in steps:
            self._filesystem.rm_file(self._manifest(step))
            self._sweep(step)

    def _sweep(self, step: int) -> None:
        """Deletes a step that is not committed. Where a damaged one was put aside, all stays: some of it is that one's."""
        self._filesystem.invalidate_cache()
        if not any(name.startswith(MANIFEST) for name in self._names(self._step(step))):
            self._remove(self._step(step))

    def _begun(self) -> list[int]:
        """The steps of which anything is there, oldest first."""
        self._filesystem.invalidate_cache()
        return sorted(step for step in map(step_of, self._names(self._prefix)) if step is not None)

    def _names(self, path: str) -> list[str]:
        try:
            return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in self._filesystem.ls(path, detail=False)]
        except FileNotFoundError:
            return []

    def _remove(self, path: str) -> None:
        self._filesystem.invalidate_cache()
        try:
            for found in self._filesystem.find(path):
                self._filesystem.rm_file(found)  # Other ways to delete take brackets in a name for a pattern.
        except OSError as error:
            logger.warning("%s could not be removed (%s); the next run tries again", path, error)

    def _step(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"

    def _manifest(self, step: int) -> str:
        return f"{self._step(step)}/{MANIFEST}"
