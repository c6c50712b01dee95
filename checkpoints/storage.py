"""The share of a single rank in a step: tensors and values to files and back.

The planner of PyTorch's distributed checkpoint (DCP) decides which rank writes and reads each part
of a tensor. A checkpoint holds safetensors, MessagePack and JSON; nothing is pickled: reading a
file cannot run code.

Example: two ranks hold a DTensor `w` of shape (4, 3) in float32, sharded over rows, and the
replicated plain value `step`. Rank 0 offers the chunk at (0, 0) and `step`, rank 1 the chunk at (2,
0) and `step`. The shares are

    rank 0: rank00000.safetensors with `w@0,0` of shape (2, 3), rank00000.values with `step`
    rank 1: rank00001.safetensors with `w@2,0` of shape (2, 3)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby, pairwise
from typing import Literal, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem

from checkpoints.commit import Marker, Readable, StepFiles, read_into
from checkpoints.errors import CheckpointError, CorruptCheckpoint
from checkpoints.manifest import TENSORS, VALUES, Chunk, Manifest, Part, Span, Tensor
from checkpoints.staging import Staging
from checkpoints.tensor_file import DTYPE_NAMES, DTYPES, TensorSpec, header, memory

_PIECE = 1 << 24
"""Bytes per read. Each thread of a load needs memory for a read, or for a row if larger."""

BlobKey = tuple[Literal["plain", "values"], str]
"""The section of the manifest and the key of a value."""


class Offer(NamedTuple):
    """The writable parts of a rank: DCP's plan for the tensors, and the SHA-256 of each value."""

    plan: SavePlan
    digests: dict[BlobKey, bytes]


class Share(NamedTuple):
    """The parts to be written by a rank: stem of the file names, tensors, and keys of values."""

    stem: str
    plan: SavePlan
    blobs: list[BlobKey]


class StepWriter:
    """The part of a single rank in a save.

    Each rank makes an offer, rank 0 divides the offers into shares, each rank writes a share.
    Replicas of a tensor are written once and assumed to be equal. Values are small, and replicas
    are compared.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], blobs: dict[BlobKey, bytes]) -> None:
        self._blobs = blobs
        self._planner = DefaultSavePlanner(flatten_state_dict=False)
        self._planner.set_up_planner(tensors)
        self._plan = self._planner.create_local_plan()
        self._staged: dict[MetadataIndex, torch.Tensor] = {}

    def stage(self, share: Share, staging: Staging) -> None:
        """Copy the tensors of this rank's share; the originals may change afterwards."""
        self._staged = staging.copy({item.index: self._local(item) for item in share.plan.items})

    def offer(self) -> Offer:
        """Return the writable parts of this rank."""
        digests = {key: hashlib.sha256(blob).digest() for key, blob in self._blobs.items()}
        return Offer(self._plan, digests)

    def divide(self, offers: list[Offer]) -> list[Share]:
        """Return the share of each rank.

        Each chunk goes to a rank with a copy, evenly by bytes; each value to the lowest rank with a
        copy.

        Raises:
            CheckpointError: Two ranks offer different values under the same key.
        """
        plans, _ = self._planner.create_global_plan([offer.plan for offer in offers])
        shares = [Share(f"rank{rank:05d}", plan, []) for rank, plan in enumerate(plans)]
        owners: dict[BlobKey, int] = {}
        for rank, offer in enumerate(offers):
            for key, digest in offer.digests.items():
                owner = owners.setdefault(key, rank)
                if owner == rank:
                    shares[rank].blobs.append(key)
                elif offers[owner].digests[key] != digest:
                    raise CheckpointError(
                        f"ranks {owner} and {rank} save different values under {key[1]!r}; "
                        "give each rank a key of its own"
                    )
        return shares

    def write(self, step_files: StepFiles, share: Share) -> Part:
        """Write the share of this rank.

        On return the bytes are on the disk, but belong to no step yet.
        """
        part = Part()
        items = self._planner.finish_plan(share.plan).items
        if items:
            self._write_tensors(step_files, share.stem + TENSORS, items, part)
        if share.blobs:
            self._write_blobs(step_files, share.stem + VALUES, share.blobs, part)
        return part

    def _write_tensors(self, step_files: StepFiles, name: str, items: list[WriteItem], part: Part) -> None:
        # Wide types first, so that every tensor starts at a multiple of its element size.
        items = sorted(items, key=lambda item: -_data(item).properties.dtype.itemsize)
        specs = _specs(items)
        head = header(specs)
        part.files[name] = step_files.write(name, self._tensor_parts(head, items))
        ends = accumulate((spec.nbytes for spec in specs.values()), initial=len(head))
        for item, (begin, end) in zip(items, pairwise(ends), strict=True):
            data = _data(item)
            span = Span(name, begin, end)
            tensor = Tensor(DTYPE_NAMES[data.properties.dtype], tuple(data.size), [])
            chunk = Chunk(tuple(data.chunk.offsets), tuple(data.chunk.sizes), span)
            part.tensors.setdefault(item.index.fqn, tensor).chunks.append(chunk)

    def _tensor_parts(self, head: bytes, items: list[WriteItem]) -> Iterator[bytes | memoryview]:
        yield head
        for item in items:
            # No copy of contiguous host memory; else a copy of one tensor at a time.
            yield memory(self._local(item).cpu().contiguous())

    def _local(self, item: WriteItem) -> torch.Tensor:
        if item.index in self._staged:
            return self._staged[item.index]
        tensor = self._planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.shape == _data(item).chunk.sizes, item.index
        return tensor.detach()

    def _write_blobs(self, step_files: StepFiles, name: str, keys: list[BlobKey], part: Part) -> None:
        blobs = [self._blobs[key] for key in keys]
        part.files[name] = step_files.write(name, blobs)
        ends = accumulate(map(len, blobs))
        for (section, key), blob, end in zip(keys, blobs, ends, strict=True):
            spans = part.plain if section == "plain" else part.values
            spans[key] = Span(name, end - len(blob), end)


def verify(step_files: StepFiles, manifest: Manifest, names: Iterable[str]) -> dict[str, Marker]:
    """Read the named files whole, and return their markers.

    Raises CorruptCheckpoint at the first file with another digest or size.
    """
    markers = {}
    for name in names:
        file = manifest.files[name]
        checked = step_files.check(name, file.size)
        if checked.digest != file.sha256:
            raise CorruptCheckpoint(f"{step_files.location(name)} does not match its SHA-256")
        markers[name] = checked.marker
    return markers


def read_tensors(
    step_files: StepFiles, manifest: Manifest, markers: Mapping[str, Marker], tensors: dict[str, torch.Tensor]
) -> None:
    """Fill tensors in place, whatever the sharding; each rank reads only the local parts.

    `markers` come from `verify`, of all ranks together: CorruptCheckpoint is raised if a file has
    changed since. Each key must be in the manifest, with equal shape and type.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), _metadata(manifest))
    chunks = {
        MetadataIndex(key, chunk.offsets): chunk for key, tensor in manifest.tensors.items() for chunk in tensor.chunks
    }
    # The plan of a rank depends on no other rank: no collective is needed.
    boxes = [
        box
        for item in planner.create_local_plan().items
        for box in _boxes(chunks[item.storage_index], item, planner.resolve_tensor(item).detach())
    ]
    boxes.sort(key=lambda box: (box.span.file, box.span.begin))
    # Every thread has at least one piece to read: a small state is read by this thread.
    shares = _evenly(boxes, min(step_files.readers, 1 + sum(box.size for box in boxes) // _PIECE))
    if len(shares) < 2:
        for share in shares:
            _read_boxes(step_files, manifest, markers, share)
        return
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(lambda share: _read_boxes(step_files, manifest, markers, share), shares))


class _Box(NamedTuple):
    """Whole rows of a chunk in a file, and a tensor to fill with all or some columns of the rows.

    `shape` is the shape of the rows in the file, `columns` selects the part for `target`.
    """

    span: Span
    shape: tuple[int, ...]
    columns: tuple[slice, ...]
    target: torch.Tensor

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.span.end - self.span.begin

    @property
    def direct(self) -> bool:
        """True if the bytes in the file are the bytes of the target's memory."""
        return self.target.shape == self.shape and self.target.is_cpu and self.target.is_contiguous()


def _boxes(chunk: Chunk, item: ReadItem, target: torch.Tensor) -> Iterator[_Box]:
    """Yield the rows of a chunk for `target`, in boxes of at most `_PIECE` bytes or one row."""
    if not target.numel():
        return
    # A tensor of shape () is read as a row of one element.
    sizes, lengths, offsets = chunk.sizes or (1,), tuple(item.lengths) or (1,), tuple(item.storage_offsets) or (0,)
    width = math.prod(sizes[1:]) * target.itemsize
    columns = (slice(None), *(slice(o, o + n) for o, n in zip(offsets[1:], lengths[1:], strict=True)))
    begin = chunk.span.begin + offsets[0] * width
    for rows in target.view(lengths).split(max(1, _PIECE // width)):
        span = Span(chunk.span.file, begin, begin + len(rows) * width)
        yield _Box(span, (len(rows), *sizes[1:]), columns, rows)
        begin = span.end


def _evenly(boxes: list[_Box], count: int) -> list[list[_Box]]:
    """Return boxes in at most `count` runs of about equal bytes."""
    ends = list(accumulate(box.size for box in boxes))
    runs = groupby(zip(boxes, ends, strict=True), key=lambda pair: (pair[1] - 1) * count // ends[-1])
    return [[box for box, _ in run] for _, run in runs]


def _read_boxes(step_files: StepFiles, manifest: Manifest, markers: Mapping[str, Marker], boxes: list[_Box]) -> None:
    indirect = [box for box in boxes if not box.direct]
    # One buffer for all boxes: allocating memory takes longer than copying into it.
    buffer = torch.empty(
        max((box.size for box in indirect), default=0),
        dtype=torch.uint8,
        pin_memory=any(not box.target.is_cpu for box in indirect),
    )
    for name, group in groupby(boxes, key=lambda box: box.span.file):
        with step_files.open(name, manifest.files[name].size, markers[name]) as file:
            for box in group:
                _read_box(file, box, buffer[: box.size])


def _read_box(file: Readable, box: _Box, buffer: torch.Tensor) -> None:
    if box.direct:
        read_into(file, box.span.begin, memory(box.target))
        return
    read_into(file, box.span.begin, memory(buffer))
    box.target.copy_(buffer.view(box.target.dtype).view(box.shape)[box.columns])


def _metadata(manifest: Manifest) -> Metadata:
    """Return the tensors of a manifest as metadata for DCP's planner."""
    return Metadata(
        {
            key: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[tensor.dtype]),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks],
            )
            for key, tensor in manifest.tensors.items()
        }
    )


def _specs(items: list[WriteItem]) -> dict[str, TensorSpec]:
    """Return the tensors of a file by name in the header.

    A part of a tensor is called `key@offsets`, such as `w@2,0`. Raises ValueError if two names are
    equal.
    """
    specs: dict[str, TensorSpec] = {}
    for item in items:
        data = _data(item)
        is_whole = data.chunk.sizes == data.size
        name = item.index.fqn if is_whole else f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"
        if name in specs:
            raise ValueError(f"two tensors would be called {name!r} in one file; rename one of them")
        specs[name] = TensorSpec(data.properties.dtype, tuple(data.chunk.sizes))
    return specs


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data
