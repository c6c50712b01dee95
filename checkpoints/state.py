"""Flatten a nested state into tensors and plain values; encode plain values as bytes.

Touches no file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import torch

from checkpoints.errors import CorruptCheckpoint
from checkpoints.tensor_file import DTYPE_NAMES

MOST_LEVELS = 100
"""Limit of lists and dicts inside each other in a plain value."""

_SCALARS = (type(None), bool, float, str, bytes)


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


def encode_value(key: str, value: Any) -> bytes:
    """Return a plain value as MessagePack, which keeps NaN, infinities and bytes; JSON does not.

    Raises:
        TypeError: A part of the value is not None, bool, int, float, str, bytes, list, tuple or
            dict.
        ValueError: An int does not fit 64 bits, or the value has more than `MOST_LEVELS` levels.
    """
    _require_plain(key, value)
    return msgspec.msgpack.encode(value)


def decode_value(key: str, data: bytes) -> Any:
    """Return the value in bytes made by `encode_value`; tuples come back as lists.

    Raises CorruptCheckpoint.
    """
    try:
        value = msgspec.msgpack.decode(data)
        _require_plain(key, value)  # MessagePack also has dates and extensions.
        return value
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError) as error:
        raise CorruptCheckpoint(f"the value of {key!r} cannot be read: {error}") from error


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
            f"{key!r} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}; a checkpoint takes strided "
            f"tensors with memory, of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}"
        )


def _require_plain(key: str, value: Any, level: int = 0) -> None:
    if level > MOST_LEVELS:
        raise ValueError(f"{key!r} holds lists and dicts of more than {MOST_LEVELS} levels; save a flatter value")
    kind = type(value)  # Exact: a subclass would come back as its base class.
    if kind is int:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{key!r} holds {value}, which does not fit 64 bits; save it as a str or bytes")
    elif kind is list or kind is tuple:
        for item in value:
            _require_plain(key, item, level + 1)
    elif kind is dict:
        for name, item in value.items():
            if type(name) not in (str, int):
                raise TypeError(f"{key!r} holds a dict with the key {name!r}; keys are str or int")
            _require_plain(key, item, level + 1)
    elif kind not in _SCALARS:
        raise TypeError(
            f"{key!r} holds a {kind.__module__}.{kind.__qualname__}; a checkpoint takes tensors, None, bool, int, "
            "float, str, bytes, and lists, tuples and dicts of plain values"
        )
