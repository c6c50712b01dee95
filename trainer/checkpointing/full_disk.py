"""Name the place and the remedy in an error of a full disk."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, a used up quota, and a limit of the size of files."""


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """Name the file, or `directory` for a write without a name, in an error of a full disk.

    The system names the file of a failed `open`, but not that of a failed `write`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = error.filename or f"a file, probably in {directory},"
        remedy = (
            "raise the limit of the size of files (ulimit -f)"
            if error.errno == errno.EFBIG
            else "free room on the disk"
        )
        raise OSError(
            f"{place} cannot be written: {error.strerror}; {remedy}, then give the same command again"
        ) from error
