"""Flatten a nested state into tensors and plain values.

Touches no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from checkpoints.tensor_file import DTYPE_NAMES


class Leaf(NamedTuple):
    """A plain value with `container[key]`, the place to replace the value."""

    container: Any
    key: Any
    value: Any


class FlatState(NamedTuple):
    """The leaves of a nested state by dotted key, such as `optimizer.param_groups.0.lr`."""

    tensors: dict[str, torch.Tensor]
    plain: dict[str, Leaf]


def flatten(state: dict[str, Any]) -> FlatState:
    """Split nested dicts, and lists of dicts or tensors, into leaves.

    A tuple, or a list of plain values only, is a single leaf.

    Example: `{"model": {"w": tensor}, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}` has the
    tensor `model.w` and the plain values `groups.0.lr` and `groups.0.betas`.

    Raises:
        ValueError: Two leaves have equal keys, or a tensor cannot be stored.
    """
    flat = FlatState({}, {})
    for key, leaf in _walk(state, ""):
        if key in flat.tensors or key in flat.plain:
            raise ValueError(f"two entries of the state have the key {key!r}; rename one of them")
        if isinstance(leaf.value, torch.Tensor):
            _require_storable(key, leaf.value)
            flat.tensors[key] = leaf.value
        else:
            flat.plain[key] = leaf
    return flat


def restore_tuples(value: Any, like: Any) -> Any:
    """Return `value` with a tuple for a list wherever `like` has a tuple."""
    match value, like:
        case list(), list() | tuple():
            likes = [*like, *[None] * (len(value) - len(like))]
            items = [restore_tuples(item, other) for item, other in zip(value, likes, strict=False)]
            return tuple(items) if isinstance(like, tuple) else items
        case dict(), dict():
            return {key: restore_tuples(item, like.get(key)) for key, item in value.items()}
    return value


def _walk(container: Any, prefix: str) -> Iterator[tuple[str, Leaf]]:
    entries = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in entries:
        name = f"{prefix}{key}"
        if isinstance(value, dict) or (isinstance(value, list) and _is_branch(value)):
            yield from _walk(value, f"{name}.")
        else:
            yield name, Leaf(container, key, value)


def _is_branch(value: Any) -> bool:
    """Return True if an item of a list gets a separate key.

    Tuples are no branches: a tuple cannot be filled in place.
    """
    return isinstance(value, dict | torch.Tensor) or (isinstance(value, list) and any(map(_is_branch, value)))


def _require_storable(key: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided or tensor.is_meta:
        raise ValueError(
            f"{key!r} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; give a strided tensor "
            f"with memory, of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}"
        )
