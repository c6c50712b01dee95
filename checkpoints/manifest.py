"""What a step's directory holds, byte by byte. A manifest is believed only whole: sealed, canonical and consistent."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import torch
from msgspec import Meta, Struct

from checkpoints.errors import CorruptCheckpoint
from checkpoints.tensor_file import DTYPES

_CUTS = 8
"""Dimensions that one tensor may be cut along; of others a chunk is as wide as the tensor."""

MANIFEST = "manifest.json"
TENSORS = ".safetensors"
VALUES = ".values"

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Token = Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
# Names and versions are printed, so they can hold nothing that a terminal would obey.
Word = Annotated[str, Meta(pattern=r"\A[ -~]{1,80}\Z")]
FILE_NAME = r"\Arank[0-9]{5}\.(safetensors|values)\Z"
# Names are the only part of a manifest that reaches the file system.
FileName = Annotated[str, Meta(pattern=FILE_NAME)]


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """A file's size in bytes and its digest (hex), a SHA-256 by blocks."""

    size: Count
    sha256: Digest


class Span(Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes `[begin, end)` of a file."""

    file: FileName
    begin: Count
    end: Count


class Chunk(Struct, frozen=True, forbid_unknown_fields=True):
    """A box of a tensor, `sizes` elements from `offsets` on, stored in row-major order."""

    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]
    span: Span

    @property
    def volume(self) -> int:
        return math.prod(self.sizes)


class Tensor(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole tensor: its element type, its global shape, and the chunks that tile it."""

    dtype: str
    shape: tuple[Count, ...]
    chunks: list[Chunk]


class Part(Struct, frozen=True):
    """What one rank wrote of a step."""

    files: dict[FileName, File] = {}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Span] = {}
    values: dict[str, Span] = {}


class About(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run says of a step of its own, so that steps can be told apart and judged without a look into their files."""

    mesh: dict[Word, Count] = {}
    """The sizes of the mesh of ranks, such as dp and tp."""
    validation_loss: float | None = None
    """After this step; the lower the better."""
    digests: dict[Word, Digest] = {}
    """SHA-256 of what the step came from, such as data and config."""
    versions: dict[Word, Word] = msgspec.field(default_factory=lambda: {"torch": str(torch.__version__)})
    """Of the libraries that made it."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of a step. `plain` are the values in the state that are no tensors, `values` those saved beside it.

    `token` names the attempt that wrote the step, `world_size` the number of its ranks.
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
        """Raises `CorruptCheckpoint` unless each tensor is tiled exactly and no two spans share a byte."""
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
                raise CorruptCheckpoint(f"a span overlaps another or lies in no file of its kind: {span}")
            end = span.end
            if end > self.files[file].size:
                raise CorruptCheckpoint(f"a span ends behind its file: {span}")


class _Sealed(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Digest
    manifest: Manifest


def merge(parts: Sequence[Part], *, step: int, token: str, about: About) -> Manifest:
    """The manifest of a step from what each rank wrote, in the ranks' order."""
    manifest = Manifest(2, step, token, len(parts), about, {}, {}, {}, {})
    for part in parts:
        manifest.files.update(part.files)
        manifest.plain.update(part.plain)
        manifest.values.update(part.values)
        for key, tensor in part.tensors.items():
            manifest.tensors.setdefault(key, Tensor(tensor.dtype, tensor.shape, [])).chunks.extend(tensor.chunks)
    return manifest


def encode(manifest: Manifest) -> bytes:
    """The manifest as JSON that carries the digest of itself."""
    digest = hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()
    return msgspec.json.encode(_Sealed(digest, manifest))


def decode(data: bytes) -> Manifest:
    """The manifest that `encode` made into `data`; raises `CorruptCheckpoint` for anything else."""
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a manifest: {error}") from error
    # Only what the encoder prints is taken: duplicate keys, which decoders resolve silently, cannot pass.
    if encode(sealed.manifest) != data:
        raise CorruptCheckpoint("it does not match its own SHA-256")
    sealed.manifest.check()
    return sealed.manifest


def _check_tensor(key: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise CorruptCheckpoint(f"{key!r} has the unknown type {tensor.dtype!r}")
    for chunk in tensor.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
            raise CorruptCheckpoint(f"a chunk of {key!r} has other dimensions than the tensor")
        if any(o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)):
            raise CorruptCheckpoint(f"a chunk of {key!r} lies outside the tensor")
        if chunk.span.end - chunk.span.begin != chunk.volume * DTYPES[tensor.dtype].itemsize:
            raise CorruptCheckpoint(f"a chunk of {key!r} has other bytes than elements")
    stored, total = sum(chunk.volume for chunk in tensor.chunks), math.prod(tensor.shape)
    if stored != total:
        raise CorruptCheckpoint(f"the chunks of {key!r} hold {stored} elements, the tensor {total}")
    if not _tiles(tensor):
        raise CorruptCheckpoint(f"the chunks of {key!r} overlap and leave gaps")


def _tiles(tensor: Tensor) -> bool:
    """Whether each element is in exactly one chunk; in linear time, however hostile the chunks.

    The number of chunks that hold an element is a function of its place. It is 1 everywhere if its mixed derivative is
    that of the whole tensor's box, and the derivative of a sum of boxes is +1 or -1 at the corners of each.
    """
    boxes = [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks if chunk.volume]
    cut = [axis for axis, size in enumerate(tensor.shape) if any(sizes[axis] != size for _, sizes in boxes)]
    if len(cut) > _CUTS:
        raise CorruptCheckpoint(f"a tensor is cut along {len(cut)} dimensions; {_CUTS} are the most")
    corners = Counter[tuple[int, ...]]()
    for offsets, sizes in boxes:
        corners.update(_corners([(offsets[axis], offsets[axis] + sizes[axis]) for axis in cut]))
    if math.prod(tensor.shape):
        corners.subtract(_corners([(0, tensor.shape[axis]) for axis in cut]))
    return not any(corners.values())


def _corners(sides: list[tuple[int, int]]) -> dict[tuple[int, ...], int]:
    """The corners of a box and their signs, which the far end of each side turns."""
    ends = itertools.product(*(((low, 1), (high, -1)) for low, high in sides))
    return {tuple(step_files for step_files, _ in corner): math.prod(sign for _, sign in corner) for corner in ends}
