"""Read remote files through fsspec: downloaded once into the cache, or from beginning to end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from sftstream.cache import cached, derived
from sftstream.door import Door
from sftstream.excerpt import one_line
from sftstream.sources.location import FileLocation, LocalLocation, any_case
from sftstream.sources.rows import FileIdentity
from sftstream.sources.stored import Stored, stored

_VERSIONS = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "md5", "sha256", "blob_id", "xet_hash", "generation"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created"),
)
"""Fields of fsspec's file information that change when the content of a file changes."""
_BLOCK = 8 << 20
"""Number of bytes downloaded at a time."""
_SERVED = ("http", "https", "ftp", "sftp", "ssh", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf")
"""Schemes whose URLs begin with a host or bucket; `file:///x` and `hdfs:///x` need none."""


def connection_errors() -> tuple[type[Exception], ...]:
    """Return the types of errors of a server that cannot be reached."""
    import aiohttp  # here, since the import is slow and only needed after an error

    return OSError, aiohttp.ClientError


def remote(url: str, *, full: bool = False) -> FileLocation:
    """Return the location of a URL; a `file://` URL gives a local location.

    Raises ValueError if the URL names no host, bucket or path, if the scheme is unknown, or if the
    scheme's package is not installed.
    """
    _require_place(url)
    with Door(f"source {url!r} cannot be opened"):
        filesystem, path = fsspec.url_to_fs(url)
    return (
        LocalLocation(Path(path), full)
        if isinstance(filesystem, LocalFileSystem)
        else RemoteLocation(filesystem, path, full)
    )


def _require_place(url: str) -> None:
    """Raise ValueError if a URL names no scheme, host, bucket or path.

    The parts of a chain such as `zip://a.csv::s3://bucket/b.zip` are URLs of their own. Without
    this check, the S3 library asks the network for credentials, for half a minute.
    """
    for link in url.split("::"):
        scheme, separator, place = link.partition("://")
        if separator and (not scheme or not place.strip("/") or (scheme in _SERVED and place.startswith("/"))):
            raise ValueError(
                f"source {url!r} names no {'host, bucket or path' if scheme else 'scheme'}; write the whole URL, such as "
                "s3://bucket/rows.jsonl"
            )


@dataclass(frozen=True)
class RemoteLocation:
    """A path in a filesystem of fsspec."""

    opened: Any
    """The filesystem object of the process that resolved the path."""
    path: str
    full: bool = False
    """True if digests cover every byte of huge files."""

    @property
    def filesystem(self) -> Any:
        """The filesystem object of this process (fsspec keeps one instance for each process).

        Many filesystems read in threads, and threads do not survive a fork.
        """
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

    def matches(self, suffixes: Iterable[str]) -> list[FileLocation]:
        return self._files(self.filesystem.glob(any_case(self.path, suffixes), detail=True).values())

    def stored(self) -> Stored:
        size, version = self._version()
        # If the server sends neither version nor size, the first downloaded content is kept.
        key = derived("fetched", self.display_name, size, *version)
        fetched = stored(cached(key, ".fetched", lambda: self._blocks(size)), self.display_name, full=self.full)
        return replace(fetched, identity=msgspec.structs.replace(fetched.identity, name=self.name))

    def open(self) -> BufferedReader:
        return BufferedReader(self.filesystem.open(self.path, "rb"))

    def change_marker(self) -> tuple[int | None, list[Any]]:
        """Return the size and the version fields of the file."""
        info = self.filesystem.info(self.path)
        return info.get("size"), [info.get(name) for name in _VERSIONS]

    def watched(self) -> RemoteVersion:
        size, version = marker = self._version()
        if size is None or not any(version):
            raise ValueError(
                f"{self.display_name} has no size or version on its server, so a changed file would go "
                "unnoticed; leave out streaming, or copy the file"
            )
        return RemoteVersion(self, marker, FileIdentity(name=self.name, size=size, sha256=derived(*version)))

    def _version(self) -> tuple[int | None, list[Any]]:
        try:
            return self.change_marker()
        except connection_errors() as error:
            raise ValueError(
                f"{self.display_name} cannot be fetched: {one_line(error)}; check the address and the network, and start again"
            ) from None

    @property
    def _open_options(self) -> dict[str, int]:
        # Block size 0: some web servers cannot send a part of a file.
        return {"block_size": 0} if self.display_name.startswith(("http://", "https://")) else {}

    def _files(self, infos: Any) -> list[FileLocation]:
        paths = sorted(info["name"] for info in infos if info["type"] == "file")
        locations = [replace(self, path=path) for path in paths]
        return [location for location in locations if location.name[:1] != "."]

    def _blocks(self, size: int | None) -> Iterator[bytes]:
        arrived = 0
        try:
            with self.filesystem.open(self.path, "rb", **self._open_options) as file:
                while block := file.read(_BLOCK):
                    arrived += len(block)
                    yield block
        except connection_errors() as error:
            raise ValueError(
                f"{self.display_name} cannot be fetched: {one_line(error)}; check the address and the network, and start again"
            ) from None
        if size is not None and arrived != size:
            raise ValueError(
                f"{self.display_name} arrived with {arrived:,} of {size:,} bytes; start again to fetch the file again"
            )


@dataclass(frozen=True)
class RemoteVersion:
    """A version of a remote file, by the size and the version fields that the server sends."""

    location: RemoteLocation
    marker: object
    identity: FileIdentity

    def require_unchanged(self) -> None:
        if self.location.change_marker() != self.marker:
            raise RuntimeError(
                f"{self.location.display_name} changed while it was read; restore the file, or start again"
            )
