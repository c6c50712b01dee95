"""One rank's share of a step, to files and back. DCP's planner says who writes and who reads which part of a tensor.

A checkpoint holds safetensors (raw bytes behind a JSON header), MessagePack and JSON. Nothing is ever pickled or
unpickled from a file: reading one cannot run code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, groupby, pairwise
from typing import Literal, NamedTuple

import msgspec
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

from checkpoints.commit import Place, Readable, read_into
from checkpoints.digest import digesting
from checkpoints.errors import CheckpointError, CorruptCheckpoint
from checkpoints.manifest import DTYPE_NAMES, DTYPES, TENSORS, VALUES, Chunk, Manifest, Part, Span, Tensor
from checkpoints.staging import Staging

BlobKey = tuple[Literal["plain", "values"], str]


class Offer(NamedTuple):
    """What a rank could write: DCP's plan for its tensors and the SHA-256 of each of its values."""

    plan: SavePlan
    digests: dict[BlobKey, bytes]


class Share(NamedTuple):
    """What a rank is to write: its files' stem, the tensors and the values that no other rank writes."""

    stem: str
    plan: SavePlan
    blobs: list[BlobKey]


class StepWriter:
    """One rank's part in a save: every rank makes an `offer`, rank 0 makes shares of them, every rank writes its own.

    Replicas of a tensor are written once and taken to be equal. Values are small, so theirs are compared.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], blobs: dict[BlobKey, bytes]) -> None:
        self._blobs = blobs
        self._planner = DefaultSavePlanner(flatten_state_dict=False)
        self._planner.set_up_planner(tensors)
        self._plan = self._planner.create_local_plan()
        self._staged: dict[MetadataIndex, torch.Tensor] = {}

    def stage(self, staging: Staging) -> StepWriter:
        """Copies all that this rank could write; from then on the tensors may change. Returns itself."""
        self._staged = staging.copy({item.index: self._local(item) for item in self._plan.items})
        return self

    def offer(self) -> Offer:
        digests = {key: hashlib.sha256(blob).digest() for key, blob in self._blobs.items()}
        return Offer(self._plan, digests)

    def divide(self, offers: list[Offer]) -> list[Share]:
        """Gives each chunk to one of the ranks that hold it, evenly by bytes, and each value to the lowest such rank.

        Raises:
            CheckpointError: Two ranks offer different values under one key.
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
                        "what belongs to one rank needs a key of its own"
                    )
        return shares

    def write(self, place: Place, share: Share) -> Part:
        """Writes this rank's share; when it returns, the bytes are on the disk but not yet part of any step."""
        part = Part()
        items = self._planner.finish_plan(share.plan).items
        if items:
            self._write_tensors(place, share.stem + TENSORS, items, part)
        if share.blobs:
            self._write_blobs(place, share.stem + VALUES, share.blobs, part)
        return part

    def _write_tensors(self, place: Place, name: str, items: list[WriteItem], part: Part) -> None:
        # Wide elements first: then every tensor starts at a multiple of its element's size.
        items = sorted(items, key=lambda item: -_data(item).properties.dtype.itemsize)
        ends = list(accumulate((_bytes_in(_data(item)) for item in items), initial=0))
        header = _header(items, ends)
        part.files[name] = place.write(name, self._tensor_parts(header, items))
        for item, (begin, end) in zip(items, pairwise(ends), strict=True):
            data = _data(item)
            span = Span(name, len(header) + begin, len(header) + end)
            tensor = Tensor(DTYPE_NAMES[data.properties.dtype], tuple(data.size), [])
            chunk = Chunk(tuple(data.chunk.offsets), tuple(data.chunk.sizes), span)
            part.tensors.setdefault(item.index.fqn, tensor).chunks.append(chunk)

    def _tensor_parts(self, header: bytes, items: list[WriteItem]) -> Iterator[bytes | memoryview]:
        yield header
        for item in items:
            # Free of a copy for what lies contiguous in host memory; else one tensor's copy at a time.
            yield _bytes_of(self._local(item).cpu().contiguous())

    def _local(self, item: WriteItem) -> torch.Tensor:
        if item.index in self._staged:
            return self._staged[item.index]
        tensor = self._planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.shape == _data(item).chunk.sizes, item.index
        return tensor.detach()

    def _write_blobs(self, place: Place, name: str, keys: list[BlobKey], part: Part) -> None:
        blobs = [self._blobs[key] for key in keys]
        part.files[name] = place.write(name, blobs)
        ends = accumulate(map(len, blobs))
        for (section, key), blob, end in zip(keys, blobs, ends, strict=True):
            spans = part.plain if section == "plain" else part.values
            spans[key] = Span(name, end - len(blob), end)


def verify(place: Place, manifest: Manifest, names: Iterable[str]) -> None:
    """Reads the named files whole; raises `CorruptCheckpoint` for the first that is not what was committed."""
    for name in names:
        file = manifest.files[name]
        if place.digest(name, file.size) != file.sha256:
            raise CorruptCheckpoint(f"{place.where(name)} does not match its SHA-256")


def read_values(place: Place, manifest: Manifest, spans: Mapping[str, Span]) -> dict[str, bytes]:
    """The bytes of values, from files that are verified."""
    files: dict[str, bytes] = {}
    for name in {span.file for span in spans.values()}:
        with place.open(name, manifest.files[name].size) as file, digesting() as digest:
            files[name] = file.read()
            digest.update(files[name])
            if digest.hexdigest() != manifest.files[name].sha256:
                raise CorruptCheckpoint(f"{place.where(name)} does not match its SHA-256")
    return {key: files[span.file][span.begin : span.end] for key, span in spans.items()}


def read_tensors(place: Place, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    """Fills tensors in place, whatever their sharding, with what this rank needs of each. Files are not verified here.

    Each key must be in the manifest with the same shape and type.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), _metadata(manifest))
    chunks = {
        MetadataIndex(key, chunk.offsets): chunk for key, tensor in manifest.tensors.items() for chunk in tensor.chunks
    }
    # A rank's plan depends on no other rank's, so there is nothing to agree on.
    reads = [(chunks[item.storage_index], item) for item in planner.create_local_plan().items]
    reads.sort(key=lambda read: (read[0].span.file, read[0].span.begin))
    for name, group in groupby(reads, key=lambda read: read[0].span.file):
        with place.open(name, manifest.files[name].size) as file:
            for chunk, item in group:
                _read_box(file, chunk, item, planner.resolve_tensor(item).detach())


def _read_box(file: Readable, chunk: Chunk, item: ReadItem, target: torch.Tensor) -> None:
    """Reads a box of a chunk. Whole rows are read, straight into the target where they are all of it."""
    if not target.numel():
        return
    rows = (*item.lengths[:1], *chunk.sizes[1:])
    begin = chunk.span.begin
    if chunk.sizes:
        begin += item.storage_offsets[0] * math.prod(chunk.sizes[1:]) * target.itemsize
    if target.shape == rows and target.is_cpu and target.is_contiguous():
        read_into(file, begin, _bytes_of(target))
        return
    buffer = torch.empty(rows, dtype=target.dtype)
    read_into(file, begin, _bytes_of(buffer))
    for axis in range(1, len(rows)):
        buffer = buffer.narrow(axis, item.storage_offsets[axis], item.lengths[axis])
    target.copy_(buffer)


def _metadata(manifest: Manifest) -> Metadata:
    """The manifest's tensors as DCP's planner knows them."""
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


def _header(items: list[WriteItem], ends: list[int]) -> bytes:
    """The head of a safetensors file: its length as 8 bytes, then JSON padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for item, (begin, end) in zip(items, pairwise(ends), strict=True):
        data = _data(item)
        whole = data.chunk.sizes == data.size
        name = item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"
        if name in entries:
            raise ValueError(f"two tensors would be called {name!r} in one file; rename one of them")
        dtype, shape = DTYPE_NAMES[data.properties.dtype], list(data.chunk.sizes)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _bytes_in(data: TensorWriteData) -> int:
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, not a copy of it."""
    return tensor.view(-1).view(torch.uint8).numpy().data
