"""Refuse what is no file in the place of a file: a pipe would be waited for without end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def require_files(paths: Iterable[Path]) -> None:
    """Raise ValueError unless each path is a file or does not exist."""
    for path in paths:
        if not path.is_file() and os.path.lexists(path):
            raise ValueError(f"{path} is {_kind(path)}; put a file in its place, or move it away")


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a directory"
    return "a pipe, a socket or a device" if path.exists() else "a link to no file"
