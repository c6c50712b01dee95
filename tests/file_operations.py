"""The file operations of this process, to be looked at or to fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

See = Callable[[str, str, Any], None]


def watch(patch: pytest.MonkeyPatch, see: See) -> None:
    """Calls `see(operation, path, detail)` before every operation of this process that changes a file system."""

    def of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def where(path: Any, dir_fd: int | None) -> str:
        return os.fspath(path) if dir_fd is None else f"{of(dir_fd)}/{path}"

    def announce(name: str, describe: Callable[..., tuple[str, str, Any] | None]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            operation = describe(*arguments, **options)
            if operation:
                see(*operation)
            return real(*arguments, **options)

        patch.setattr(os, name, call)

    announce(
        "open", lambda p, flags, mode=0, dir_fd=None: ("create", where(p, dir_fd), 0) if flags & os.O_CREAT else None
    )
    announce("write", lambda descriptor, data: ("write", of(descriptor), bytes(data)))
    announce("fsync", lambda descriptor: ("fsync", of(descriptor), None))
    announce("mkdir", lambda path, mode=0: ("mkdir", os.fspath(path), None))
    announce("rename", lambda source, target: ("rename", os.fspath(source), os.fspath(target)))
    announce("unlink", lambda path, dir_fd=None: ("remove", where(path, dir_fd), None))
    announce("rmdir", lambda path, dir_fd=None: ("remove", where(path, dir_fd), None))


@contextmanager
def failing(number: int | None, code: int) -> Iterator[Callable[[], bool]]:
    """The operation of this number fails, counted from 0; gives a function that says whether there was one."""
    left = iter(range(number, -1, -1)) if number is not None else iter(())
    failed = []

    def see(operation: str, path: str, detail: Any) -> None:
        if next(left, None) == 0:
            failed.append(operation)
            raise OSError(code, os.strerror(code), path)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, see)
        yield lambda: bool(failed)
