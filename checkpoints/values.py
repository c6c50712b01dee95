"""Encode plain values as bytes, and read the values of a step. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from checkpoints.commit import StepFiles
from checkpoints.digest import digesting
from checkpoints.errors import CorruptCheckpoint, one_line
from checkpoints.manifest import Manifest, Span

MOST_LEVELS = 100
"""Limit of lists and dicts inside each other in a plain value."""

_SCALARS = (type(None), bool, float, str, bytes)


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
        raise CorruptCheckpoint(f"the value of {key!r} cannot be read: {one_line(error)}") from error


def read_step_values(step_files: StepFiles, manifest: Manifest, spans: Mapping[str, Span]) -> dict[str, Any]:
    """Return the values at `spans` by key.

    Raises CorruptCheckpoint if a file with a value is damaged.
    """
    files: dict[str, bytes] = {}
    for name in {span.file for span in spans.values()}:
        with step_files.open(name, manifest.files[name].size) as file, digesting() as digest:
            files[name] = file.read()
            digest.update(files[name])
            if digest.hexdigest() != manifest.files[name].sha256:
                raise CorruptCheckpoint(f"{step_files.location(name)} does not match its SHA-256")
    return {key: decode_value(key, files[span.file][span.begin : span.end]) for key, span in spans.items()}


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
