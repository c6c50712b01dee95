"""Replace a small file of a run, which is whole after a kill or a power cut, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

DAMAGED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of decoding a file that no run wrote. `sftstream.UNDECODABLE` would import torch."""


def write_whole(path: Path, record: Any) -> None:
    """Replace the file by the JSON of `record`, and force it to the disk. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(msgspec.json.encode(record) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
