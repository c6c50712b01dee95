"""Compare a state with a step over all ranks: keys, shapes and types must be equal, both ways."""

from __future__ import annotations

from typing import NamedTuple

from checkpoints.errors import CheckpointError
from checkpoints.manifest import Manifest
from checkpoints.state import FlatState
from checkpoints.tensor_file import DTYPES


class Misfit(NamedTuple):
    """The differences between a step and the state of a single rank.

    `token` names the attempt that wrote the step, as this rank read the manifest. `missing` are
    keys of the state without a tensor or value in the step, `surplus` keys of the step without an
    entry in the state. `changed` holds a phrase for each key of another shape or type.
    """

    token: str
    missing: set[str]
    surplus: set[str]
    changed: set[str]


def misfit(flat: FlatState, manifest: Manifest) -> Misfit:
    """Return the differences between a flat state and the step of a manifest."""
    in_state = {key: f"{tensor.dtype} {list(tensor.shape)}" for key, tensor in flat.tensors.items()}
    in_state |= dict.fromkeys(flat.plain, "a plain value")
    in_step = {key: f"{DTYPES[tensor.dtype]} {list(tensor.shape)}" for key, tensor in manifest.tensors.items()}
    in_step |= dict.fromkeys(manifest.plain, "a plain value")
    changed = {
        f"{key} is {in_step[key]} in the step and {in_state[key]} in the state"
        for key in in_step.keys() & in_state.keys()
        if in_step[key] != in_state[key]
    }
    return Misfit(manifest.token, in_state.keys() - in_step.keys(), in_step.keys() - in_state.keys(), changed)


def require_fit(step: int, misfits: list[Misfit]) -> None:
    """Raise CheckpointError if a step does not fit the state of all ranks together.

    Ranks may hold different parts of a model: a key is surplus only if every rank lacks the key.
    """
    if len({misfit.token for misfit in misfits}) > 1:
        raise CheckpointError(
            f"the ranks see different directories as step {step}; the root must be a directory that all ranks share"
        )
    complaints = {
        "not in the step": set[str]().union(*(misfit.missing for misfit in misfits)),
        "only in the step": set.intersection(*(misfit.surplus for misfit in misfits)),
        "changed": set[str]().union(*(misfit.changed for misfit in misfits)),
    }
    faults = [f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in complaints.items() if keys]
    if faults:
        raise CheckpointError(
            f"step {step} does not fit this state: {'; '.join(faults)}; load it into the model that saved it"
        )


def _some(keys: set[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join([*shown, "..."] if len(keys) > len(shown) else shown)
