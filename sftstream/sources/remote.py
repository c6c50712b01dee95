"""Files of other machines, by any scheme that fsspec knows: fetched once into the cache, and read there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from sftstream.cache import cached
from sftstream.sources.location import Local, Place
from sftstream.sources.rows import FileIdentity, Stored, derived, stored

_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "md5", "sha256", "blob_id", "xet_hash", "generation"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created"),
)
"""What filesystems call that which changes with a file's content."""
_BLOCK = 8 << 20


def lost() -> tuple[type[Exception], ...]:
    """What is raised where a file is out of reach."""
    import aiohttp  # takes a while to import, and is needed when something was raised

    return OSError, aiohttp.ClientError


def remote(url: str, *, full: bool = False) -> Place:
    """Raises ValueError where the scheme is unknown, or its package is not installed."""
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"source {url!r} cannot be opened: {error}") from None
    return Local(Path(path), full) if isinstance(filesystem, LocalFileSystem) else Remote(filesystem, path, full)


@dataclass(frozen=True)
class Remote:
    """A path of a filesystem."""

    opened: Any
    """The filesystem, as the process that resolved the path has it."""
    path: str
    full: bool = False
    """Huge files are known by every byte."""

    @property
    def filesystem(self) -> Any:
        """As this process has it, once: the threads that many of them read by do not survive a fork."""
        return type(self.opened)(*self.opened.storage_args, **self.opened.storage_options)

    @property
    def shown(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        return self.path.partition("?")[0].rpartition("/")[2]

    def is_file(self) -> bool:
        return bool(self.filesystem.isfile(self.path))

    def is_directory(self) -> bool:
        return bool(self.filesystem.isdir(self.path))

    def child(self, name: str) -> Remote:
        return replace(self, path=f"{self.path.rstrip('/')}/{name}")

    def files(self) -> list[Place]:
        return self._files(self.filesystem.ls(self.path, detail=True))

    def matches(self) -> list[Place]:
        return self._files(self.filesystem.glob(self.path, detail=True).values())

    def stored(self) -> Stored:
        size, version = self._told()
        # Of a server that tells neither version nor size, the first answer is kept.
        key = derived("fetched", self.shown, size, *version)
        fetched = stored(cached(key, ".fetched", lambda: self._blocks(size)), self.shown, full=self.full)
        return replace(fetched, identity=msgspec.structs.replace(fetched.identity, name=self.name))

    def open(self) -> BufferedReader:
        return BufferedReader(self.filesystem.open(self.path, "rb"))

    def mark(self) -> tuple[int | None, list[Any]]:
        """Size, and what changes with the content."""
        info = self.filesystem.info(self.path)
        return info.get("size"), [info.get(name) for name in _VERSIONS]

    def known(self) -> tuple[object, FileIdentity]:
        size, version = mark = self._told()
        if size is None or not any(version):
            raise ValueError(
                f"nothing tells {self.shown} from another version of it, so that a resume could not be exact; leave out streaming"
            )
        return mark, FileIdentity(name=self.name, size=size, sha256=derived(*version))

    def _told(self) -> tuple[int | None, list[Any]]:
        try:
            return self.mark()
        except lost() as error:
            raise ValueError(f"{self.shown} cannot be fetched: {error}") from None

    @property
    def _whole(self) -> dict[str, int]:
        # A web server need not know how to give a part of a file.
        return {"block_size": 0} if self.shown.startswith(("http://", "https://")) else {}

    def _files(self, found: Any) -> list[Place]:
        paths = sorted(info["name"] for info in found if info["type"] == "file")
        places = [replace(self, path=path) for path in paths]
        return [place for place in places if place.name[:1] != "."]

    def _blocks(self, size: int | None) -> Iterator[bytes]:
        arrived = 0
        try:
            with self.filesystem.open(self.path, "rb", **self._whole) as file:
                while block := file.read(_BLOCK):
                    arrived += len(block)
                    yield block
        except lost() as error:
            raise ValueError(f"{self.shown} cannot be fetched: {error}") from None
        if size is not None and arrived != size:
            raise ValueError(f"{self.shown} arrived with {arrived:,} of {size:,} bytes; start again")
