"""The files of a tokenizer, and values computed from their content, kept in the cache."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

from sftstream.cache import Unwritable, cached, found
from sftstream.regular_files import require_files
from sftstream.sources.rows import derived

READ = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the files that may belong to a tokenizer."""
MAX_BYTES = 256 << 20
"""Largest total size of a tokenizer's files for which values are kept: 256 MiB.

A larger directory holds more than a tokenizer, and hashing its files at each start would be slow.
"""

Value = TypeVar("Value", bound=msgspec.Struct)


class TokenizerFiles:
    """The files of a tokenizer in `directory`, with the content at the time of the call.

    A kept value belongs to the content, to the versions of the libraries that read the files, and
    to `parts`: the version of the computation, or its arguments. Nothing is kept for a directory
    without a tokenizer.json or with files of more than `MAX_BYTES`.

    Raises ValueError if something else than a file, such as a pipe, is in the place of a file.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        require_files(path for path in directory.glob("*") if path.suffix in READ)
        self._content = _content(directory)

    def read(self, kind: type[Value], *parts: object) -> Value | None:
        """Return the kept value of the type `kind`, or None."""
        with suppress(OSError):  # the value is computed again
            if self._content and (path := found(self._key(kind, parts), _suffix(kind))):
                return msgspec.msgpack.decode(path.read_bytes(), type=kind)
        return None

    def keep(self, value: msgspec.Struct, *parts: object) -> None:
        """Keep a value, unless a file has changed in the meantime."""
        if self._content and self._content == _content(self._directory):
            with suppress(Unwritable, OSError):  # without a cache each start takes as long as the first
                cached(self._key(type(value), parts), _suffix(type(value)), lambda: (msgspec.msgpack.encode(value),))

    def _key(self, kind: type[msgspec.Struct], parts: tuple[object, ...]) -> str:
        assert self._content is not None
        readers = (metadata.version(library) for library in ("transformers", "tokenizers"))
        return derived(_suffix(kind), *kind.__struct_fields__, *parts, *readers, *self._content)


def _suffix(kind: type[msgspec.Struct]) -> str:
    return f".{kind.__name__.lower()}"


def _content(directory: Path) -> list[str] | None:
    """Return path and digest of each file, or None if no value is kept for the directory."""
    try:
        inside = (*directory.glob("*"), *directory.glob("additional_chat_templates/*"))
        files = sorted(path for path in inside if path.suffix in READ and path.is_file())
        if directory / "tokenizer.json" not in files or sum(path.stat().st_size for path in files) > MAX_BYTES:
            return None
        digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
        return [f"{path.relative_to(directory)} {digest}" for path, digest in zip(files, digests, strict=True)]
    except OSError:
        return None  # the library that reads the files reports the error
