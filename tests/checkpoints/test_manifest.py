"""A damaged, inconsistent or hostile manifest is refused before any file is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import CorruptCheckpoint
from checkpoints.manifest import ITEM_BYTES, About, Chunk, File, Manifest, Part, Span, Tensor, decode, encode, merge
from checkpoints.tensor_file import DTYPES

DIGEST = "ab" * 32
ABOUT = About(mesh={"dp": 1, "tp": 2}, validation_loss=0.1, digests={"data": DIGEST}, versions={"torch": "2.13.0+cpu"})


def manifest() -> Manifest:
    """A (4, 6) float32 tensor in two column chunks on two ranks, and a value."""
    left = Chunk((0, 0), (4, 2), Span("rank00000.safetensors", 104, 136))
    right = Chunk((0, 2), (4, 4), Span("rank00001.safetensors", 104, 168))
    return merge(
        [
            Part(
                files={"rank00000.safetensors": File(136, DIGEST), "rank00000.values": File(10, DIGEST)},
                tensors={"w": Tensor("F32", (4, 6), [left])},
                plain={"step": Span("rank00000.values", 0, 1)},
                values={"data/stream/0003": Span("rank00000.values", 1, 10)},
            ),
            Part(
                files={"rank00001.safetensors": File(168, DIGEST)},
                tensors={"w": Tensor("F32", (4, 6), [right])},
            ),
        ],
        step=120,
        token="0123456789abcdef",
        about=ABOUT,
    )


def seal(body: bytes) -> bytes:
    """Return any body with a matching digest, as an attacker would."""
    return b'{"sha256":"%s","manifest":%s}' % (hashlib.sha256(body).hexdigest().encode(), body)


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    builtins = msgspec.to_builtins(manifest())
    change(builtins)
    return seal(msgspec.json.encode(builtins))


def test_decoding_what_was_encoded_gives_the_same_manifest():
    assert decode(encode(manifest())) == manifest()


def test_the_file_is_plain_json_that_carries_its_own_digest():
    data = encode(manifest())
    assert seal(msgspec.json.encode(manifest())) == data
    assert json.loads(data)["manifest"]["tensors"]["w"]["chunks"][1]["span"]["end"] == 168


def test_any_flipped_bit_is_refused():
    data = encode(manifest())
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CorruptCheckpoint):
            decode(bytes(damaged))


def test_any_truncation_or_addition_is_refused():
    data = encode(manifest())
    for end in range(len(data)):
        with pytest.raises(CorruptCheckpoint):
            decode(data[:end])
    for extra in (b" ", b"\n", b"\0", data):
        with pytest.raises(CorruptCheckpoint):
            decode(data + extra)


def first_chunk(m: dict[str, Any]) -> dict[str, Any]:
    return m["tensors"]["w"]["chunks"][0]


def rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(m: dict[str, Any]) -> None:
        m["files"][name] = m["files"].pop("rank00000.safetensors")
        first_chunk(m)["span"]["file"] = name

    return change


HOSTILE = {
    "a parent directory": (rename_file("../rank00000.safetensors"), "regex"),
    "an absolute name": (rename_file("/etc/rank00000.safetensors"), "regex"),
    "a line break": (rename_file("rank00000.safetensors\n"), "regex"),
    "a NUL": (rename_file("rank00000.safetensors\0"), "regex"),
    "a foreign digit": (rename_file("rank0000٣.safetensors"), "regex"),
    "a pickle's name": (rename_file(".metadata"), "regex"),
    "an unknown version": (lambda m: m.update(version=1), "version"),
    "a bool for an int": (lambda m: m.update(step=True), "step"),
    "a float for an int": (lambda m: m.update(step=120.0), "step"),
    "a negative step": (lambda m: m.update(step=-1), "step"),
    "a step of 65 bits": (lambda m: m.update(step=2**64), "step"),
    "a null": (lambda m: m.update(files=None), "files"),
    "an unknown field": (lambda m: m.update(code="os.system"), "unknown field"),
    "an unknown field of a chunk": (lambda m: first_chunk(m).update(code=1), "unknown field"),
    "a missing field": (lambda m: m.pop("plain"), "plain"),
    "a short digest": (lambda m: m["files"]["rank00000.values"].update(sha256="ab"), "regex"),
    "no digest": (lambda m: m["files"]["rank00000.values"].pop("sha256"), "sha256"),
    "an unknown type": (lambda m: m["tensors"]["w"].update(dtype="OBJECT"), "'OBJECT'"),
    "another type of other size": (lambda m: m["tensors"]["w"].update(dtype="F64"), "bytes"),
    "a negative size": (lambda m: first_chunk(m).update(sizes=[-4, 2]), "sizes"),
    "a size of 2**63": (lambda m: m["tensors"]["w"].update(shape=[2**63, 6]), "shape"),
    "a shape that overflows 64 bits": (lambda m: m["tensors"]["w"].update(shape=[2**62, 2**62]), "elements"),
    "fewer dimensions": (lambda m: first_chunk(m).update(offsets=[0], sizes=[8]), "dimensions"),
    "a chunk outside": (lambda m: first_chunk(m).update(offsets=[0, 5]), "outside"),
    "a chunk twice": (lambda m: m["tensors"]["w"]["chunks"].append(first_chunk(m)), "elements"),
    "a missing chunk": (lambda m: m["tensors"]["w"]["chunks"].pop(), "elements"),
    "overlapping chunks": (lambda m: first_chunk(m).update(offsets=[0, 1]), "overlap"),
    "a span past the end": (
        lambda m: first_chunk(m)["span"].update(begin=120, end=152),
        "after the 136 bytes of the file",
    ),
    "a span backwards": (lambda m: m["plain"]["step"].update(begin=1, end=0), "lies in no .values file"),
    "a span of a file that is not listed": (
        lambda m: m["plain"]["step"].update(file="rank00001.values"),
        "in no .values file",
    ),
    "a tensor in a values file": (
        lambda m: m["plain"]["step"].update(file="rank00000.safetensors"),
        "in no .values file",
    ),
    "two values in the same bytes": (lambda m: m["plain"]["step"].update(end=2), "overlaps"),
    "nothing about it": (lambda m: m.pop("about"), "about"),
    "an unknown field about it": (lambda m: m["about"].update(code=1), "unknown field"),
    "a mesh of text": (lambda m: m["about"]["mesh"].update(dp="1"), "mesh"),
    "a loss of text": (lambda m: m["about"].update(validation_loss="0.1"), "validation_loss"),
    "a short digest of the data": (lambda m: m["about"]["digests"].update(data="ab"), "regex"),
    "a version that moves the cursor": (lambda m: m["about"]["versions"].update(torch="\x1b[2J"), "regex"),
    "a version without a name": (lambda m: m["about"]["versions"].update({"": "1"}), "regex"),
    "no version": (lambda m: m["about"].pop("versions"), "does not match"),
    "a list nested deeply": (lambda m: m.update(plain={"x": nested(500)}), "Expected"),
}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sealed_but_hostile_manifest_is_refused_and_the_reason_named(name):
    change, reason = HOSTILE[name]
    with pytest.raises(CorruptCheckpoint, match=reason):
        decode(changed(change))


def test_duplicate_keys_are_refused_though_a_decoder_would_take_the_last():
    body = msgspec.json.encode(manifest())
    for old, new in [(b'{"version":2', b'{"version":2,"version":2'), (b'"plain":{', b'"plain":{"step":null,')]:
        assert old in body
        with pytest.raises(CorruptCheckpoint):
            decode(seal(body.replace(old, new)))


def test_nesting_of_any_depth_is_refused_without_exhausting_the_stack():
    for depth in (10_000, 1_000_000):
        with pytest.raises(CorruptCheckpoint):
            decode(seal(b'{"version":2,"step":' + b"[" * depth + b"]" * depth + b"}"))
        with pytest.raises(CorruptCheckpoint):
            decode(b"[" * depth)


def comb(teeth: int) -> Tensor:
    """Strips along one dimension over strips along the other: any sweep has half open at once."""
    boxes = [((0, i), (teeth, 1)) for i in range(teeth)] + [((teeth + i, 0), (1, teeth)) for i in range(teeth)]
    spans = [Span("rank00000.safetensors", 4 * teeth * n, 4 * teeth * (n + 1)) for n in range(2 * teeth)]
    chunks = [Chunk(offsets, sizes, span) for (offsets, sizes), span in zip(boxes, spans, strict=True)]
    return Tensor("F32", (2 * teeth, teeth), chunks)


def test_a_hundred_thousand_chunks_that_share_every_line_are_checked_in_linear_time():
    """A check of all pairs would take hours."""
    tensor = comb(50_000)
    found = tiled(tensor.shape, tensor.chunks)
    found.check()
    chunks = found.tensors["w"].chunks
    chunks[7] = msgspec.structs.replace(chunks[7], offsets=(0, 8))
    with pytest.raises(CorruptCheckpoint, match="overlap and leave gaps"):
        found.check()


def test_a_tensor_cut_along_many_dimensions_is_refused_before_its_corners_are_counted():
    with pytest.raises(CorruptCheckpoint, match="elements"):
        tiled((2,) * 60, [Chunk((0,) * 60, (1,) * 60, Span("rank00000.safetensors", 0, 4))]).check()
    corners = enumerate(itertools.product((0, 1), repeat=9))
    chunks = [Chunk(step_files, (1,) * 9, Span("rank00000.safetensors", 4 * n, 4 * n + 4)) for n, step_files in corners]
    with pytest.raises(CorruptCheckpoint, match="cut along 9 dimensions; at most 8 are allowed"):
        tiled((2,) * 9, chunks).check()


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Chunk]]:
    """A shape and the chunks of a grid over the shape, in any order, with some empty chunks."""
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for line in cuts:
        sides = [(a, b - a) for a, b in pairwise(line)]
        boxes = [((*offsets, o), (*sizes, s)) for offsets, sizes in boxes for o, s in sides]
    chunks, at = [], 0
    for offsets, sizes in draw(st.permutations(boxes)):
        end = at + 4 * math.prod(sizes)
        chunks.append(Chunk(offsets, sizes, Span("rank00000.safetensors", at, end)))
        at = end
    if shape:
        chunks.append(Chunk(tuple(shape), tuple(0 for _ in shape), Span("rank00000.safetensors", at, at)))
    return tuple(shape), chunks


def tiled(shape: tuple[int, ...], chunks: list[Chunk]) -> Manifest:
    size = max(chunk.span.end for chunk in chunks)
    part = Part(files={"rank00000.safetensors": File(size, DIGEST)}, tensors={"w": Tensor("F32", shape, chunks)})
    return merge([part], step=1, token="0123456789abcdef", about=About())


@given(tilings(), st.randoms(use_true_random=False))
def test_every_grid_of_chunks_passes_and_none_with_a_chunk_lost_doubled_or_moved(tiling, choice: random.Random):
    shape, chunks = tiling
    tiled(shape, chunks).check()
    index = choice.randrange(len(chunks))
    victim = chunks[index]
    if not victim.volume:
        return
    broken = [chunks[:index] + chunks[index + 1 :], [*chunks, victim]]
    for axis, offset in enumerate(victim.offsets):
        for moved in {0, max(offset - 1, 0), offset + 1} - {offset}:
            offsets = (*victim.offsets[:axis], moved, *victim.offsets[axis + 1 :])
            broken.append([*chunks[:index], Chunk(offsets, victim.sizes, victim.span), *chunks[index + 1 :]])
    for chunks in broken:
        if chunks:
            with pytest.raises(CorruptCheckpoint):
                tiled(shape, chunks).check()


def test_the_sizes_of_elements_are_those_of_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
