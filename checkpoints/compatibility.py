"""Whether a state is the one that a step holds: keys, shapes and types equal, both ways, over all ranks."""

from __future__ import annotations

from typing import NamedTuple

from checkpoints.errors import CheckpointError
from checkpoints.manifest import Manifest
from checkpoints.state import FlatState
from checkpoints.tensor_file import DTYPES


class Misfit(NamedTuple):
    """How a step and a rank's state differ. `changed` are whole phrases, one a key."""

    token: str
    missing: set[str]
    surplus: set[str]
    changed: set[str]


def misfit(flat: FlatState, manifest: Manifest) -> Misfit:
    wanted = {key: f"{tensor.dtype} {list(tensor.shape)}" for key, tensor in flat.tensors.items()}
    wanted |= dict.fromkeys(flat.plain, "a plain value")
    saved = {key: f"{DTYPES[tensor.dtype]} {list(tensor.shape)}" for key, tensor in manifest.tensors.items()}
    saved |= dict.fromkeys(manifest.plain, "a plain value")
    changed = {
        f"{key} is {saved[key]} and {wanted[key]} in the state"
        for key in saved.keys() & wanted.keys()
        if saved[key] != wanted[key]
    }
    return Misfit(manifest.token, wanted.keys() - saved.keys(), saved.keys() - wanted.keys(), changed)


def require_fit(step: int, misfits: list[Misfit]) -> None:
    """A key is surplus if no rank's state has it: ranks may hold different parts of a model."""
    if len({misfit.token for misfit in misfits}) > 1:
        raise CheckpointError(f"the ranks see different directories as step {step}")
    complaints = {
        "not in the step": set[str]().union(*(misfit.missing for misfit in misfits)),
        "only in the step": set.intersection(*(misfit.surplus for misfit in misfits)),
        "changed": set[str]().union(*(misfit.changed for misfit in misfits)),
    }
    found = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in complaints.items() if keys]
    if found:
        raise CheckpointError(f"step {step} does not fit this state: {'; '.join(found)}")


def _some(keys: set[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join([*shown, "..."] if len(keys) > len(shown) else shown)
