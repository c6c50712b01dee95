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
from sftstream.sources.location import FileLocation, LocalLocation
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


def remote(url: str, *, full: bool = False) -> FileLocation:
    """Raises ValueError where the scheme is unknown, or its package is not installed."""
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"source {url!r} cannot be opened: {error}") from None
    return (
        LocalLocation(Path(path), full)
        if isinstance(filesystem, LocalFileSystem)
        else RemoteLocation(filesystem, path, full)
    )


@dataclass(frozen=True)
class RemoteLocation:
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
    def display_name(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        return self.path.partition("?")[0].rpartition("/")[2]

    def is_file(self) -> bool:
        return bool(self.filesystem.isfile(self.path))

    def is_directory(self) -> bool:
        return bool(self.filesystem.isdir(self.path))

    def child(self, name: str) -> RemoteLocation:
        return replace(self, path=f"{self.path.rstrip('/')}/{name}")

    def files(self) -> list[FileLocation]:
        return self._files(self.filesystem.ls(self.path, detail=True))

    def matches(self) -> list[FileLocation]:
        return self._files(self.filesystem.glob(self.path, detail=True).values())

    def stored(self) -> Stored:
        size, version = self._told()
        # Of a server that tells neither version nor size, the first answer is kept.
        key = derived("fetched", self.display_name, size, *version)
        fetched = stored(cached(key, ".fetched", lambda: self._blocks(size)), self.display_name, full=self.full)
        return replace(fetched, identity=msgspec.structs.replace(fetched.identity, name=self.name))

    def open(self) -> BufferedReader:
        return BufferedReader(self.filesystem.open(self.path, "rb"))

    def change_marker(self) -> tuple[int | None, list[Any]]:
        """Size, and what changes with the content."""
        info = self.filesystem.info(self.path)
        return info.get("size"), [info.get(name) for name in _VERSIONS]

    def fingerprint(self) -> tuple[object, FileIdentity]:
        size, version = marker = self._told()
        if size is None or not any(version):
            raise ValueError(
                f"nothing tells {self.display_name} from another version of it, so that a resume "
                "could not be exact; leave out streaming"
            )
        return marker, FileIdentity(name=self.name, size=size, sha256=derived(*version))

    def _told(self) -> tuple[int | None, list[Any]]:
        try:
            return self.change_marker()
        except lost() as error:
            raise ValueError(f"{self.display_name} cannot be fetched: {error}") from None

    @property
    def _whole(self) -> dict[str, int]:
        # A web server need not know how to give a part of a file.
        return {"block_size": 0} if self.display_name.startswith(("http://", "https://")) else {}

    def _files(self, found: Any) -> list[FileLocation]:
        paths = sorted(info["name"] for info in found if info["type"] == "file")
        locations = [replace(self, path=path) for path in paths]
        return [location for location in locations if location.name[:1] != "."]

    def _blocks(self, size: int | None) -> Iterator[bytes]:
        arrived = 0
        try:
            with self.filesystem.open(self.path, "rb", **self._whole) as file:
                while block := file.read(_BLOCK):
                    arrived += len(block)
                    yield block
        except lost() as error:
            raise ValueError(f"{self.display_name} cannot be fetched: {error}") from None
        if size is not None and arrived != size:
            raise ValueError(f"{self.display_name} arrived with {arrived:,} of {size:,} bytes; start again")
