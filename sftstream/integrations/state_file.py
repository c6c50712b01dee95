"""Keep the data state in a file of another trainer's checkpoint, written last."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sftstream.inspection.stored import read_state
from sftstream.ledger.files import publish
from sftstream.state import DataState

STATE_FILE = "data_state.json"
"""Name of the file in the directory of a checkpoint."""


def write_state_file(directory: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state dict into the directory of a checkpoint, as its last file.

    The file is complete or absent, so a checkpoint with the file is complete.
    """
    path = Path(directory) / STATE_FILE
    partial = path.with_name(f".{STATE_FILE}.partial")
    partial.write_bytes(msgspec.json.encode(state))
    publish(partial, path)


def read_state_file(directory: str | os.PathLike[str]) -> DataState:
    """Return the data state of a checkpoint.

    Raises ValueError if the checkpoint has none, since the trainer was killed while it saved, or
    ran without this package, and if the file is damaged.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        found = last_checkpoint(path.parent.parent)
        remedy = f"resume from {found}, the newest complete checkpoint there" if found else "start a new run"
        raise ValueError(
            f"{path.parent} has no {STATE_FILE}: its save was interrupted, or it was saved without sftstream's data "
            f"state; {remedy}"
        )
    return read_state(path)


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint in `directory` that has a data state; None if there is none.

    Checkpoints are directories named with their step at the end, such as `checkpoint-500`. A
    checkpoint whose save was interrupted has no data state, and is passed over.
    """
    found = {
        int(number[1]): path.parent
        for path in Path(directory).glob(f"*/{STATE_FILE}")
        if (number := re.search(r"(\d+)$", path.parent.name))
    }
    return str(found[max(found)]) if found else None
