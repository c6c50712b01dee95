"""Any damage to a file is found and costs only its step; random bytes are decoded or refused."""

from __future__ import annotations

import math
import os
import random
import shutil
import string
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gloo_ranks import run_ranks
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_manifest import manifest, seal

from checkpoints import CheckpointStore, CorruptCheckpoint
from checkpoints.manifest import Manifest, decode, encode
from checkpoints.values import decode_value, encode_value

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))


def mine(rank: int, step: int) -> dict[str, Any]:
    """State of a rank; sizes differ by step, except for `same`, told apart by bytes only."""
    generator = torch.Generator().manual_seed(step + rank)
    return {
        f"own{rank}": torch.randn(50 + step, generator=generator),
        f"same{rank}": torch.randn(40, generator=generator),
    }


def save_three(rank: int, root: Path) -> None:
    store = CheckpointStore(root)
    for step in (1, 2, 3):
        store.save(step, mine(rank, step), {f"value{rank}": random.Random(step + rank).randbytes(200)})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 2 and 3 of two ranks."""
    root = tmp_path_factory.mktemp("three")
    run_ranks(2, save_three, root)
    return root


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def scramble(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    begin = draw.randrange(len(data))
    end = min(len(data), begin + draw.randint(1, 64))
    data[begin:end] = bytes(byte ^ 0xFF for byte in data[begin:end])
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def zero_the_tail(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    end = max(i for i, byte in enumerate(data) if byte)
    begin = draw.randint(0, end)
    path.write_bytes(data[:begin] + bytes(len(data) - begin))


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 100)))


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def add(path: Path, draw: random.Random) -> None:
    shutil.copy(path, path.with_name(f"rank{draw.randint(2, 99999):05d}.{draw.choice(['safetensors', 'values'])}"))


def swap(path: Path, draw: random.Random) -> None:
    other = draw.choice([other for other in path.parent.iterdir() if other != path])
    path.rename(path.with_name("between"))
    other.rename(path)
    path.with_name("between").rename(other)


def make_stale(path: Path, draw: random.Random) -> None:
    shutil.copy(path.parent.with_name(f"step-0000000{draw.choice([1, 2])}") / path.name, path)


DAMAGE = [flip, scramble, truncate, zero_the_tail, lengthen, delete, add, swap, make_stale]


def damage_at_random(three: Path, top: Path, draws: int, kind: Callable[[Path, random.Random], None]) -> None:
    draw = random.Random(f"{SEED}/{kind.__name__}")
    for number in range(draws):
        root = Path(shutil.copytree(three, top / f"{number}"))
        path = draw.choice(sorted((root / "step-00000003").iterdir()))
        kind(path, draw)
        store = CheckpointStore(root)
        seen = f"seed {SEED}, draw {number}: {kind.__name__} {path.name}"
        assert store.latest() == 2, seen
        assert list(store.rejected) == [3], seen
        target = mine(0, 2) | mine(1, 2)
        for tensor in target.values():
            tensor.zero_()
        store.load(2, target)
        for rank in range(2):
            assert all(torch.equal(target[key], value) for key, value in mine(rank, 2).items()), seen
        shutil.rmtree(root)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_at_random_costs_the_step_and_no_other(three, tmp_path, kind):
    damage_at_random(three, tmp_path, 8, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_much_damage_at_random_costs_the_step_and_no_other(three, tmp_path, kind):
    damage_at_random(three, tmp_path, 150, kind)


# Decoders

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@patient
@given(st.binary(max_size=300))
def test_any_bytes_are_no_manifest(data):
    with pytest.raises(CorruptCheckpoint):
        decode(data)
    with pytest.raises(CorruptCheckpoint):
        decode(seal(data))


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["../rank00000.values", "rank00000.values", "rank00001.safetensors", "F32", "U8", "0" * 64]),
    st.recursive(
        st.integers(0, 9), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Yield every container of a nested value with each key."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [step_files for key in keys for step_files in ((value, key), *places(value[key]))]


@patient
@given(st.data())
def test_a_manifest_changed_anywhere_to_anything_is_refused_or_as_sound_as_any(data):
    builtins = msgspec.to_builtins(manifest())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(builtins)))
        if data.draw(st.booleans()):
            container[key] = data.draw(HOSTILE)
        elif isinstance(container, dict):
            container[data.draw(st.text(string.printable, max_size=12))] = container.pop(key)
        else:
            container.insert(key, container[key])
    try:
        found = decode(seal(msgspec.json.encode(builtins)))
    except CorruptCheckpoint:
        return
    assert decode(encode(found)) == found
    assert_sound(found)


def assert_sound(found: Manifest) -> None:
    """Assert by brute force, byte by byte and element by element, the assumptions of a load."""
    taken: dict[str, set[int]] = {}
    spans = [chunk.span for tensor in found.tensors.values() for chunk in tensor.chunks]
    for span in [*spans, *found.plain.values(), *found.values.values()]:
        if span.end - span.begin > 10_000:
            continue
        own = set(range(span.begin, span.end))
        assert not own & taken.setdefault(span.file, set())
        assert span.end <= found.files[span.file].size
        taken[span.file] |= own
    for tensor in found.tensors.values():
        if math.prod(tensor.shape) > 10_000:
            continue
        cells = torch.zeros(tensor.shape, dtype=torch.int32)
        for chunk in tensor.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            cells[box] += 1
        assert bool((cells == 1).all())


@patient
@given(st.binary(max_size=200))
@example(b"\xd4\x00\x00")  # an extension of MessagePack
@example(b"\xd6\xff\x00\x00\x00\x00")  # its date
def test_any_bytes_are_a_plain_value_or_refused(data):
    with suppress(CorruptCheckpoint):
        assert_plain(decode_value("key", data))


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        for item in [*value.keys(), *value.values()]:
            assert_plain(item)
    elif isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (bool, int, float, str, bytes), type(value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 99), inner, max_size=4),
    max_leaves=20,
)


@patient
@given(PLAIN)
def test_any_plain_value_comes_back_as_it_was(value):
    assert repr(decode_value("key", encode_value("key", value))) == repr(value)


@patient
@given(PLAIN, st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_in_a_value_is_still_plain_data_or_refused(value, step_files, bit):
    data = bytearray(encode_value("key", value))
    data[step_files % len(data)] ^= 1 << bit
    with suppress(CorruptCheckpoint):
        assert_plain(decode_value("key", bytes(data)))
