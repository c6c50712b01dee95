"""Steps in an object store without renames and locks: the manifest, put last, is the commit.

An object is complete or absent, and at once visible to all readers. The files of a step lie under
the token of the attempt: no two attempts write to the same name. A step is committed exactly if the
manifest exists.

Example: step 120 of two ranks under `s3://bucket/run`, in the order of writing:

    s3://bucket/run/step-00000120/0123456789abcdef/rank00000.safetensors
    s3://bucket/run/step-00000120/0123456789abcdef/rank00001.safetensors
    s3://bucket/run/step-00000120/manifest.json      conditional put, names the token
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

from checkpoints.commit import Checked, Marker, Readable, require_marker
from checkpoints.digest import BLOCK, digesting
from checkpoints.errors import CheckpointError, CorruptCheckpoint, one_line
from checkpoints.local_store import LocalStore, check_manifest, require_growth, require_short, step_of
from checkpoints.manifest import MANIFEST, About, File, Manifest, Part, encode, merge

logger = logging.getLogger(__name__)

_PIECE = 1 << 26
"""Bytes per write to a file of fsspec, which keeps a copy."""
_SERVED = ("http", "https", "ftp", "sftp", "ssh", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf")
"""Schemes whose URLs begin with a host or bucket; `file:///x` and `hdfs:///x` need none."""


def open_root(root: Path | str) -> LocalStore | ObjectStore:
    """Return an `ObjectStore` for a URL (a str with `://`), else a `LocalStore`.

    Raises CheckpointError if a URL names no place, or for a path with a zero byte.
    """
    if "\0" in str(root):
        raise CheckpointError(f"{str(root)!r} is no path; name a directory or URL")
    return ObjectStore(root) if isinstance(root, str) and "://" in root else LocalStore(Path(root).absolute())


class ObjectFiles:
    """The files of a step, or of an attempt at a step, in an object store."""

    readers = 1  # Some file systems of fsspec return one shared file object for all opens.

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
    def open(self, name: str, size: int, marker: Marker | None = None) -> Iterator[Readable]:
        location = self.location(name)
        try:
            actual = self._filesystem.size(location)
            if actual != size:
                raise CorruptCheckpoint(f"{location} has {actual} bytes; {size} were committed")
            if marker is not None:
                require_marker(location, marker, self._marker(location))
            with self._filesystem.open(location, "rb") as file:
                yield file
            if marker is not None:
                require_marker(location, marker, self._marker(location))
        except (FileNotFoundError, IsADirectoryError, EOFError) as error:
            raise CorruptCheckpoint(f"{location} cannot be read: {error!r}") from error

    def check(self, name: str, size: int) -> Checked:
        with self.open(name, size) as file, digesting() as digest:
            marker = self._marker(self.location(name))
            while block := file.read(BLOCK):
                digest.update(block)
            return Checked(digest.hexdigest(), marker)

    def _marker(self, location: str) -> str:
        self._filesystem.invalidate_cache()
        return str(self._filesystem.ukey(location))


class ObjectStore:
    """The steps under a URL."""

    def __init__(self, root: str) -> None:
        scheme, _, place = root.partition("://")
        if not scheme or not place.strip("/") or (scheme in _SERVED and place.startswith("/")):
            raise CheckpointError(
                f"the root {root!r} of checkpoints names no bucket or path; write the whole URL, such as s3://bucket/run"
            )
        self.root = root.rstrip("/")
        try:
            self._filesystem, self._prefix = fsspec.url_to_fs(self.root)
        except (ValueError, ImportError) as error:  # an unknown scheme, or a scheme whose library is not installed
            raise CheckpointError(
                f"the root {root!r} of checkpoints cannot be opened: {one_line(error)}; correct the URL, or install the library"
            ) from error
        self._committed: set[int] | None = None

    def path(self, step: int) -> str:
        """Return the URL of a committed step."""
        return f"{self.root}/step-{step:08d}"

    def step_files(self, step: int, manifest: Manifest) -> ObjectFiles:
        """Return the files of a committed step, for reading."""
        return self.attempt(step, manifest.token)

    def attempt(self, step: int, token: str) -> ObjectFiles:
        """Return the files of an attempt, before and after the commit."""
        return ObjectFiles(self._filesystem, f"{self._step(step)}/{token}")

    def saved(self, step: int) -> datetime:
        """Return the local time at which a step was committed."""
        saved: datetime = self._filesystem.modified(self._manifest(step))
        return saved.astimezone().replace(tzinfo=None)

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first."""
        return [step for step in self._begun() if self._filesystem.exists(self._manifest(step))]

    def manifest(self, step: int) -> Manifest:
        """Return the checked manifest of a committed step.

        Raises CheckpointError if the step does not exist, CorruptCheckpoint if the manifest is
        damaged or belongs to another step.
        """
        path = self._manifest(step)
        try:
            require_short(path, self._filesystem.size(path))
            data = self._filesystem.cat_file(path)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.root} holds no step {step}; name one of {self.steps() or 'another root'}"
            ) from None
        return check_manifest(path, data, step)

    def claim(self) -> None:
        """Note the committed steps and delete leftovers of killed runs.

        There is no lock: a later step that this process has not committed is the step of another
        run.
        """
        if self._committed is None:
            self._committed = set(self.steps())
            for step in self._begun():
                self._sweep(step)

    def release(self) -> None:
        """Forget the committed steps."""
        self._committed = None

    def begin(self, step: int, rejected: Collection[int]) -> str:
        """Begin an attempt at a step and return a token, 16 hexadecimal characters.

        Steps in `rejected` were found damaged; the manifest of such a step is renamed to
        `manifest.json.rejected-<token>`. Raises CheckpointError if another run has saved meanwhile.
        """
        self.claim()
        assert self._committed is not None
        steps = self.steps()
        if foreign := sorted(set(steps) - self._committed):
            raise CheckpointError(
                f"another run has saved steps {foreign} to {self.root} since this run began; two runs cannot share a root: "
                "stop the other run, or give this run another root"
            )
        require_growth(self.root, step, [other for other in steps if other not in rejected])
        token = secrets.token_hex(8)
        for other in set(rejected).intersection(steps):
            self._filesystem.cp_file(self._manifest(other), f"{self._manifest(other)}.rejected-{token}")
            self._filesystem.rm_file(self._manifest(other))
            logger.warning("step %d is damaged; its manifest was renamed to %s.rejected-%s", other, MANIFEST, token)
        return token

    def commit(self, step: int, token: str, parts: list[Part], about: About) -> None:
        """Commit the files of all ranks by putting the manifest.

        Raises CheckpointError if another run has just committed the step.
        """
        manifest = merge(parts, step=step, token=token, about=about)
        manifest.check()
        step_files = self.attempt(step, token)
        for name, file in manifest.files.items():
            with step_files.open(name, file.size):
                pass  # Raises if a rank has put its files into another store.
        assert self._committed is not None
        self._committed.add(step)
        try:
            self._filesystem.pipe_file(self._manifest(step), encode(manifest), mode="create")
        except FileExistsError:
            self._committed.remove(step)
            raise CheckpointError(
                f"another run has just saved step {step} to {self.root}; two runs cannot share a root: stop one of them"
            ) from None

    def abandon(self, step: int, token: str) -> None:
        """Delete a failed attempt.

        Also deletes the manifest of the attempt: a failed put may have reached the store.
        """
        with suppress(CheckpointError, OSError):
            if self.manifest(step).token == token:
                self._filesystem.rm_file(self._manifest(step))
        self._remove(f"{self._step(step)}/{token}")

    def delete(self, steps: Iterable[int]) -> None:
        """Delete committed steps, each manifest first."""
        for step in steps:
            self._filesystem.rm_file(self._manifest(step))
            self._sweep(step)

    def _sweep(self, step: int) -> None:
        """Delete the objects of a step without a manifest.

        A step with a rejected manifest stays whole: some objects belong to the damaged step.
        """
        self._filesystem.invalidate_cache()
        if not any(name.startswith(MANIFEST) for name in self._names(self._step(step))):
            self._remove(self._step(step))

    def _begun(self) -> list[int]:
        """Return the steps with any object, committed or not, oldest first."""
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
            for name in self._filesystem.find(path):
                self._filesystem.rm_file(name)  # `rm` would read brackets in a name as a pattern.
        except OSError as error:
            logger.warning("%s could not be deleted (%s); the next run tries again", path, error)

    def _step(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"

    def _manifest(self, step: int) -> str:
        return f"{self._step(step)}/{MANIFEST}"
