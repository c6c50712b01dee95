"""The manifest of a step: every file, tensor and value, byte by byte.

A manifest is accepted only if sealed by a digest, in canonical form, and consistent.

Example (digests shortened, whitespace added): a step of a single rank with a float32 tensor `w`
of shape (2, 3) and no values. The header of the safetensors file takes 96 bytes:

    {"sha256": "5f0c...", "manifest": {
      "version": 2, "step": 120, "token": "0123456789abcdef", "world_size": 1,
      "about": {"mesh": {}, "validation_loss": null, "digests": {},
                "versions": {"torch": "2.11.0"}},
      "files": {"rank00000.safetensors": {"size": 120, "sha256": "9a31..."}},
      "tensors": {"w": {"dtype": "F32", "shape": [2, 3], "chunks": [
        {"offsets": [0, 0], "sizes": [2, 3],
         "span": {"file": "rank00000.safetensors", "begin": 96, "end": 120}}]}},
      "plain": {}, "values": {}}}
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from checkpoints.errors import CorruptCheckpoint, one_line

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of an element by the name of its type in the safetensors format. A table of its own, beside
the types of torch in `tensor_file`, so that a manifest is read without torch."""

_CUTS = 8
"""Limit of dimensions cut by the chunks of a tensor. A check takes 2**cuts steps per chunk."""

_DIMENSIONS = 64
"""Limit of dimensions of a tensor, as in NumPy."""

MANIFEST = "manifest.json"
TENSORS = ".safetensors"
VALUES = ".values"

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Token = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
# Names and versions are printed: no control characters for the terminal.
Word = Annotated[str, Meta(pattern=r"\A[ -~]{1,80}\Z")]
FILE_NAME = r"\Arank[0-9]{5}\.(safetensors|values)\Z"
# File names are the only part of a manifest that reaches the file system.
FileName = Annotated[str, Meta(pattern=FILE_NAME)]


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """Size of a file in bytes, and digest by blocks (see `checkpoints.digest`)."""

    size: Count
    sha256: Digest


class Span(Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes `[begin, end)` of a file."""

    file: FileName
    begin: Count
    end: Count


class Chunk(Struct, frozen=True, forbid_unknown_fields=True):
    """A box of a tensor: `sizes` elements from `offsets` on, stored in row-major order."""

    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]
    span: Span

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


class Tensor(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole tensor: element type, global shape, and the chunks that tile the tensor."""

    dtype: str
    shape: tuple[Count, ...]
    chunks: list[Chunk]


class Part(Struct, frozen=True):
    """The files of a single rank; the tensors, plain values and values in these files."""

    files: dict[FileName, File] = {}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Span] = {}
    values: dict[str, Span] = {}


def _torch_version() -> str:
    """Return the version of torch; torch is imported when a step is saved, not when one is read."""
    import torch

    return str(torch.__version__)


class About(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts about the run for the manifest, to compare steps by their manifests alone."""

    mesh: dict[Word, Count] = {}
    """Sizes of the mesh of ranks by dimension, such as dp and tp."""
    validation_loss: float | None = None
    """Validation loss after this step; lower is better. None without a validation."""
    digests: dict[Word, Digest] = {}
    """SHA-256 of the inputs of the step, such as data and config."""
    versions: dict[Word, Word] = msgspec.field(default_factory=lambda: {"torch": _torch_version()})
    """Versions of the libraries that wrote the step."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a step.

    `token` names the attempt that wrote the step, `world_size` the number of ranks. `plain` are the
    plain values of the state, `values` the values saved beside the state, by key.
    """

    version: Literal[2]
    step: Count
    token: Token
    world_size: Count
    about: About
    files: dict[FileName, File]
    tensors: dict[str, Tensor]
    plain: dict[str, Span]
    values: dict[str, Span]

    def check(self) -> None:
        """Raise CorruptCheckpoint unless chunks tile every tensor and no two spans overlap."""
        for key, tensor in self.tensors.items():
            _check_tensor(key, tensor)
        spans = [chunk.span for tensor in self.tensors.values() for chunk in tensor.chunks]
        self._check_spans(spans, TENSORS)
        self._check_spans([*self.plain.values(), *self.values.values()], VALUES)

    def _check_spans(self, spans: list[Span], suffix: str) -> None:
        file, end = "", 0
        for span in sorted(spans, key=lambda span: (span.file, span.begin, span.end)):
            if span.file != file:
                file, end = span.file, 0
            if not (file.endswith(suffix) and file in self.files and end <= span.begin <= span.end):
                raise CorruptCheckpoint(f"{span} overlaps another span or lies in no {suffix} file of the step")
            end = span.end
            if end > self.files[file].size:
                raise CorruptCheckpoint(f"{span} ends after the {self.files[file].size} bytes of the file")


class _Sealed(Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest and the SHA-256 of the manifest as JSON."""

    sha256: Digest
    manifest: Manifest


def merge(parts: Sequence[Part], *, step: int, token: str, about: About) -> Manifest:
    """Return the manifest of a step from the parts of all ranks, in rank order."""
    manifest = Manifest(2, step, token, len(parts), about, {}, {}, {}, {})
    for part in parts:
        manifest.files.update(part.files)
        manifest.plain.update(part.plain)
        manifest.values.update(part.values)
        for key, tensor in part.tensors.items():
            manifest.tensors.setdefault(key, Tensor(tensor.dtype, tensor.shape, [])).chunks.extend(tensor.chunks)
    return manifest


def encode(manifest: Manifest) -> bytes:
    """Return a manifest as JSON, with the digest of the manifest."""
    digest = hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()
    return msgspec.json.encode(_Sealed(digest, manifest))


def decode(data: bytes) -> Manifest:
    """Return the manifest in bytes made by `encode`, or raise CorruptCheckpoint."""
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a manifest: {one_line(error)}") from error
    # Only the output of the encoder is accepted: decoders would resolve duplicate keys silently.
    if encode(sealed.manifest) != data:
        raise CorruptCheckpoint("the manifest does not match its own SHA-256")
    sealed.manifest.check()
    return sealed.manifest


def _check_tensor(key: str, tensor: Tensor) -> None:
    if tensor.dtype not in ITEM_BYTES:
        raise CorruptCheckpoint(f"{key!r} has the unknown element type {tensor.dtype!r}")
    # An empty tensor has no bytes that would bound its other sizes.
    extent = math.prod(max(size, 1) for size in tensor.shape[:_DIMENSIONS]) * ITEM_BYTES[tensor.dtype]
    if len(tensor.shape) > _DIMENSIONS or (0 in tensor.shape and extent >= 2**63):
        raise CorruptCheckpoint(
            f"{key!r} has more than {_DIMENSIONS} dimensions, or is empty with sizes beyond 64 bits"
        )
    for chunk in tensor.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
            raise CorruptCheckpoint(
                f"a chunk of {key!r} does not have the {len(tensor.shape)} dimensions of the tensor"
            )
        if any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)):
            raise CorruptCheckpoint(f"a chunk of {key!r} lies outside the tensor")
        if chunk.span.end - chunk.span.begin != chunk.volume * ITEM_BYTES[tensor.dtype]:
            raise CorruptCheckpoint(f"a chunk of {key!r} does not have the bytes of {chunk.volume} elements")
    stored, total = sum(chunk.volume for chunk in tensor.chunks), math.prod(tensor.shape)
    if stored != total:
        raise CorruptCheckpoint(f"the chunks of {key!r} hold {stored} elements; the tensor has {total}")
    if not _tiles(tensor):
        raise CorruptCheckpoint(f"the chunks of {key!r} overlap and leave gaps")


def _tiles(tensor: Tensor) -> bool:
    """Return True if each element of a tensor is in exactly one chunk; linear in the chunks.

    Let f(i) be the number of chunks with the element at the indices i. f is 1 everywhere if the
    mixed difference of f equals the mixed difference of the box of the whole tensor. The mixed
    difference of a sum of boxes is +1 or -1 at the corners of each box, and 0 elsewhere.

    Example: a tensor of shape (4,) is stored in two chunks. The chunk [0, 3) adds +1 at 0 and -1 at
    3, the chunk [3, 4) adds +1 at 3 and -1 at 4. The sum is +1 at 0 and -1 at 4, equal to the box
    [0, 4) of the whole tensor.
    """
    boxes = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks if chunk.volume]
    cut = [axis for axis, size in enumerate(tensor.shape) if any(sizes[axis] != size for _, sizes in boxes)]
    if len(cut) > _CUTS:
        raise CorruptCheckpoint(f"a tensor is cut along {len(cut)} dimensions; at most {_CUTS} are allowed")
    corners = Counter[tuple[int, ...]]()
    for offsets, sizes in boxes:
        corners.update(_corners([(offsets[axis], offsets[axis] + sizes[axis]) for axis in cut]))
    if math.prod(tensor.shape):
        corners.subtract(_corners([(0, tensor.shape[axis]) for axis in cut]))
    return not any(corners.values())


def _corners(sides: list[tuple[int, int]]) -> dict[tuple[int, ...], int]:
    """Return the corners of a box with signs; the far end of each side flips the sign."""
    ends = itertools.product(*(((low, 1), (high, -1)) for low, high in sides))
    return {tuple(index for index, _ in corner): math.prod(sign for _, sign in corner) for corner in ends}
