"""Encode the state of a logical stream, with the lists of its waiting rows apart.

The lists are nearly all of a state's bytes. A worker encodes them as texts, so that a state dict is
made without reading through the lists.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

WAITING = ("planned", "leftovers", "digests", "row_parts")
"""Fields of `StreamState` with an entry for each waiting row; texts in a state dict."""
_FIELDS = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])


class EncodedStream(NamedTuple):
    """The state of a stream, encoded in parts."""

    fields: bytes
    """Map of all fields that are set, as MessagePack. The fields in `waiting` are empty lists
    here."""
    waiting: Mapping[str, str]
    """Name of each field of `WAITING` that is set -> its list, as the base64 of MessagePack."""

    @property
    def whole(self) -> bytes:
        """The state as one map, as checkpoints store it."""
        lists = {name: msgspec.Raw(base64.b64decode(text)) for name, text in self.waiting.items()}
        return msgspec.msgpack.encode(_FIELDS.decode(self.fields) | lists)


def encode_stream(state: msgspec.Struct) -> EncodedStream:
    """Return a `StreamState` encoded in parts."""
    lists = {name: value for name in WAITING if (value := getattr(state, name)) is not UNSET}
    fields = msgspec.structs.replace(state, **dict.fromkeys(lists, ()))
    return EncodedStream(msgspec.msgpack.encode(fields), {name: _text(value) for name, value in lists.items()})


def with_texts(streams: Mapping[int, EncodedStream]) -> dict[str, dict[str, Any]]:
    """Return the fields of each stream as plain values, and the lists of waiting rows as texts."""
    fields = {str(number): msgspec.Raw(stream.fields) for number, stream in streams.items()}
    values = msgspec.to_builtins(msgspec.msgpack.decode(msgspec.msgpack.encode(fields)), str_keys=True)
    return {str(number): values[str(number)] | stream.waiting for number, stream in streams.items()}


def _text(values: object) -> str:
    return base64.b64encode(msgspec.msgpack.encode(values)).decode()
