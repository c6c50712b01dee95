"""The safetensors format: names of element types, the header of a file, the bytes of a tensor.

A file is the length of the header (8 bytes, little-endian), the header as JSON padded with spaces
to a multiple of 8 bytes, and the bytes of all tensors, row-major and without gaps
(https://github.com/huggingface/safetensors). The library's own writer takes all tensors of a file
at once. Here the header is made from types and shapes, and the tensors follow, each in turn.

Example: `header({"w": TensorSpec(torch.bfloat16, (2, 3))})` returns 104 bytes:

    60 00 00 00 00 00 00 00    (96, the length of the JSON)
    {"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}

and 7 spaces. The 12 bytes of `w` complete the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import torch

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Element types by name in the safetensors format."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """The element type and shape of a tensor, known before the tensor itself."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the bytes of a safetensors file before the tensors, stored in the order of `specs`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data
