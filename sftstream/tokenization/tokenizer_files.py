"""The files of a tokenizer, and values computed from their content, kept in the cache."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

import msgspec

from sftstream.cache import Value, keep, kept
from sftstream.regular_files import require_files

READ = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the files that may belong to a tokenizer."""
MAX_BYTES = 256 << 20
"""Largest total size of a tokenizer's files for which values are kept: 256 MiB.

A larger directory holds more than a tokenizer, and hashing its files at each start would be slow.
"""


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
        return kept(kind, *self._parts(parts)) if self._content else None

    def keep(self, value: msgspec.Struct, *parts: object) -> None:
        """Keep a value, unless a file has changed in the meantime."""
        if self._content and self._content == _content(self._directory):
            keep(value, *self._parts(parts))

    def _parts(self, parts: tuple[object, ...]) -> tuple[object, ...]:
        assert self._content is not None
        return *parts, *(metadata.version(library) for library in ("transformers", "tokenizers")), *self._content


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
