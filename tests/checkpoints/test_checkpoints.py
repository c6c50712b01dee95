"""A load returns the saved state to the bit; damaged, foreign and unfit steps are refused."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import random
import resource
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from checkpoints import About, CheckpointError, CheckpointStore, CorruptCheckpoint, Retention
from checkpoints.digest import digesting, file_digest, threads
from checkpoints.manifest import File, Span, decode, encode
from checkpoints.tensor_file import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(64, 8, generator=generator), "b": torch.randn(3, generator=generator)},
        "step": seed,
    }


def bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Return all comparable properties of a tensor."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()


def frozen(value: Any) -> Any:
    """Return a nested state with tensors as `bits`: `==` then compares bits."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(frozen, value))
    return struct.pack("d", value) if isinstance(value, float) else value


def saved(root: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(root, Retention(keep=100))
    for step in steps:
        store.save(step, state(step), {"data/stream/0003": f"{step}".encode()})
    return store


def loaded(store: CheckpointStore, step: int) -> dict[str, Any]:
    target = state(-1)
    store.load(step, target)
    return target


# One process


def test_a_run_that_never_saved_has_no_latest_step(tmp_path):
    store = CheckpointStore(tmp_path / "not" / "there")
    assert (store.latest(), store.steps(), store.rejected) == (None, [], {})


def test_a_step_comes_back_to_the_bit(tmp_path):
    store = saved(tmp_path, 1, 2)
    assert store.latest() == 2
    assert frozen(loaded(store, 2)) == frozen(state(2))
    assert frozen(loaded(store, 1)) == frozen(state(1))


def test_the_files_of_a_step_are_where_the_documentation_says(tmp_path):
    path = CheckpointStore(tmp_path).save(120, state(1), {"a": 1})
    assert path == tmp_path / "step-00000120"
    assert sorted(os.listdir(path)) == ["manifest.json", "rank00000.safetensors", "rank00000.values"]
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000120"]


def test_the_tensors_of_one_process_open_as_any_safetensors_file(tmp_path):
    path = CheckpointStore(tmp_path).save(1, state(1))
    with safetensors.safe_open(path / "rank00000.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["model.b", "model.w"]
        assert torch.equal(file.get_tensor("model.w"), state(1)["model"]["w"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (7,), (3, 5, 2)], ids=str)
def test_every_type_and_shape_comes_back_to_the_bit(tmp_path, dtype, shape):
    count = math.prod(shape)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    CheckpointStore(tmp_path).save(1, {"odd": torch.ones(1, dtype=torch.uint8), "t": tensor})
    target = {"odd": torch.zeros(1, dtype=torch.uint8), "t": torch.zeros(shape, dtype=dtype)}
    CheckpointStore(tmp_path).load(1, target)
    assert bits(target["t"]) == bits(tensor)


def test_strided_views_are_saved_by_their_values_and_filled_in_place(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    CheckpointStore(tmp_path).save(1, {"t": base.t()[1:4], "p": nn.Parameter(base)})
    memory = torch.zeros(8, 4)
    parameter = nn.Parameter(torch.zeros(4, 6))
    CheckpointStore(tmp_path).load(1, {"t": memory[::2].t()[:3].t()[:, :3].t()[:, :4], "p": parameter})
    assert torch.equal(memory[::2, :3], base.t()[1:4].t())
    assert torch.equal(parameter, base)


@pytest.mark.parametrize("ranks_of_the_host", [1, 1000])
def test_pieces_of_any_size_read_by_any_number_of_threads_give_the_same(tmp_path, monkeypatch, ranks_of_the_host):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_of_the_host))
    assert threads() == (min(2 * len(os.sched_getaffinity(0)), 32) if ranks_of_the_host == 1 else 2)
    whole = {f"w{n}": torch.arange(12 * n + 12.0).view(-1, 3) for n in range(9)}
    CheckpointStore(tmp_path).save(1, whole)
    for piece in (1, 12, 50, 10_000):
        monkeypatch.setattr("checkpoints.storage._PIECE", piece)
        direct = {key: torch.zeros_like(tensor) for key, tensor in whole.items()}
        strided = {key: torch.zeros(3, len(tensor)).t() for key, tensor in whole.items()}
        for target in (direct, strided):
            CheckpointStore(tmp_path).load(1, target)
            assert frozen(target) == frozen(whole)


def test_plain_values_come_back_as_they_were_and_tuples_where_the_state_has_tuples(tmp_path):
    plain = {
        "none": None,
        "flag": True,
        "low": -(2**63),
        "high": 2**64 - 1,
        "nan": math.nan,
        "inf": -math.inf,
        "tiny": 5e-324,
        "text": "Grüße\0",
        "blob": bytes(range(256)),
        "betas": (0.9, 0.95),
        "list": [1, [2, (3, [4])]],
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}, {"lr": 0.1, "betas": (0.0, 1.0)}],
        7: {"number as a key": []},
    }
    CheckpointStore(tmp_path).save(1, plain)
    target = dict.fromkeys(plain)
    target |= {"betas": (), "list": [0, [0, (0, [0])]], "groups": [{"lr": 0, "betas": ()}, {"lr": 0, "betas": ()}]}
    target |= {7: {"number as a key": None}}
    CheckpointStore(tmp_path).load(1, target)
    assert frozen(target) == frozen(plain)


def test_values_come_back_by_prefix_and_a_state_need_not_know_them(tmp_path):
    store = CheckpointStore(tmp_path)
    values = {"data/stream/0003": b"\0\xff", "data/identity": {"rows": 3, "ratio": math.inf}, "rng": [1, (2, None)]}
    store.save(1, {"w": torch.ones(2)}, values)
    assert store.values(1) == {**values, "rng": [1, [2, None]]}
    assert store.values(1, "data/stream/") == {"data/stream/0003": b"\0\xff"}
    assert store.values(1, "other") == {}
    store.load(1, {"w": torch.zeros(2)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**64, "64 bits"),
        ({1, 2}, "builtins.set"),
        (..., "builtins.ellipsis"),
        ([torch.float32], "torch.dtype"),
        (torch.Size([1]), "torch.Size"),
        ({(1, 2): 3}, "keys are str or int"),
        (nn.Linear(1, 1), "Linear"),
        ((torch.ones(1),), "torch.Tensor"),
    ],
    ids=repr,
)
def test_a_value_that_would_not_come_back_as_it_was_is_refused_by_name(tmp_path, value, message):
    store = CheckpointStore(tmp_path)
    for arguments in ({"here": (value,)}, {}), ({}, {"here": (value,)}):
        with pytest.raises(CheckpointError, match=f"here.*{message}"):
            store.save(1, *arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_name(tmp_path, tensor, message):
    with pytest.raises(CheckpointError, match=f"'a.b'.*{message}"):
        CheckpointStore(tmp_path).save(1, {"a": {"b": tensor}})


def test_two_entries_under_one_key_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"have the key 'a\.b'"):
        CheckpointStore(tmp_path).save(1, {"a": {"b": 1}, "a.b": 2})
    with pytest.raises(CheckpointError, match="have the key '0'"):
        CheckpointStore(tmp_path).save(1, {0: 1, "0": 2})


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", 2**63])
def test_a_step_that_is_not_a_count_is_refused(tmp_path, step):
    with pytest.raises(CheckpointError, match="the step is"):
        CheckpointStore(tmp_path).save(step, {})


def test_steps_only_grow(tmp_path):
    store = saved(tmp_path, 10, 20)
    for step in (20, 15):
        with pytest.raises(CheckpointError, match=f"already holds step 20, so step {step} cannot be saved"):
            store.save(step, state(0))
    assert frozen(loaded(store, 20)) == frozen(state(20))


def test_a_missing_step_is_named_with_the_existing_steps(tmp_path):
    store = saved(tmp_path, 10, 20)
    for read in (store.values, lambda step: store.load(step, state(0))):
        with pytest.raises(CheckpointError, match=r"holds no step 30; name one of \[10, 20\]"):
            read(30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].pop("b"), r"1 only in the step \(model\.b\)"),
        (lambda s: s.update(extra=1), r"1 not in the step \(extra\)"),
        (
            lambda s: s["model"].update(b=torch.zeros(4)),
            r"model\.b is torch\.float32 \[3\] in the step and torch\.float32 \[4\]",
        ),
        (
            lambda s: s["model"].update(b=torch.zeros(3).bfloat16()),
            r"float32 \[3\] in the step and torch\.bfloat16 \[3\]",
        ),
        (lambda s: s["model"].update(b=0), r"model\.b is torch\.float32 \[3\] in the step and a plain value"),
        (lambda s: s.update(step=torch.zeros(())), r"step is a plain value in the step and torch\.float32 \[\]"),
        (lambda s: s.update(step=[{}]), r"1 only in the step \(step\)"),
    ],
)
def test_a_state_of_other_keys_shapes_or_types_is_refused_untouched(tmp_path, change, message):
    store = saved(tmp_path, 1)
    target = state(5)
    change(target)
    before = frozen(target)
    with pytest.raises(CheckpointError, match=message):
        store.load(1, target)
    assert frozen(target) == before


def test_many_unfit_keys_are_counted_and_some_of_them_named(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {f"k{i}": i for i in range(100)})
    with pytest.raises(CheckpointError, match=r"100 only in the step \(k0, k1, k10, k11, k12, \.\.\.\)"):
        store.load(1, {})


def test_old_steps_are_deleted_and_foreign_files_left_alone(tmp_path):
    store = CheckpointStore(tmp_path, Retention(keep=2))
    foreign = ["step-00000001.backup", "step-1", "best", ".step-00000001.tmp", "step-000000001"]
    for name in foreign:
        (tmp_path / name).mkdir()
    for step in (1, 2, 3, 4):
        store.save(step, state(step))
    assert store.steps() == [3, 4]
    assert sorted(os.listdir(tmp_path)) == sorted([".lock", *foreign, "step-00000003", "step-00000004"])


def test_leftovers_of_killed_saves_are_swept_by_the_next_save(tmp_path):
    store = saved(tmp_path, 1)
    for name in (".step-00000002.tmp-0123456789abcdef", ".step-00000000.gone-0123456789abcdef"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    assert store.steps() == [1]
    store.save(2, state(2))
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001", "step-00000002"]


def test_multiples_of_keep_every_stay_besides_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, Retention(keep=1, keep_every=20))
    for step in (0, 10, 20, 30, 40, 50):
        store.save(step, state(step))
    assert store.steps() == [0, 20, 40, 50]


def test_the_steps_of_the_lowest_validation_loss_stay_besides_the_newest(tmp_path):
    losses = {0: 3.0, 10: 1.5, 20: None, 30: 1.0, 40: 1.5, 50: 2.0, 60: None}
    for step, loss in losses.items():
        # A store that did not see the others saved: after a restart.
        store = CheckpointStore(tmp_path, Retention(keep=1, keep_best=2))
        store.save(step, state(step), about=About(validation_loss=loss))
    assert store.steps() == [10, 30, 60]
    assert store.manifest(30).about.validation_loss == 1.0
    flip(tmp_path / "step-00000030" / "manifest.json")
    store = CheckpointStore(tmp_path, Retention(keep=1, keep_best=1))
    store.save(70, state(70))
    assert store.steps() == [10, 70]


def test_a_step_that_was_damaged_is_judged_by_the_loss_it_gets_when_it_is_saved_again(tmp_path):
    store = CheckpointStore(tmp_path, Retention(keep=1, keep_best=2))
    for step, loss in ((1, 2.0), (2, 1.0)):
        store.save(step, state(step), about=About(validation_loss=loss))
    flip(tmp_path / "step-00000002" / "rank00000.values")
    assert store.latest() == 1
    for step, loss in ((2, 9.0), (3, 4.0), (4, 5.0)):
        store.save(step, state(step), about=About(validation_loss=loss))
    assert store.steps() == [1, 3, 4]


@pytest.mark.parametrize("limits", [{"keep": 0}, {"keep_every": 0}, {"keep_best": 0}])
def test_a_retention_limit_below_1_is_refused(limits):
    with pytest.raises(ValueError, match=f"^{next(iter(limits))} = 0 must be at least 1$"):
        Retention(**limits)


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 1
    path.write_bytes(data)


def zero_the_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def link_away(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "a zeroed tail": zero_the_tail,
    "a missing last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "an added byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "no bytes": lambda path: path.write_bytes(b""),
    "no file": Path.unlink,
    "the file of another step": lambda path: shutil.copy(path.parent.with_name("step-00000010") / path.name, path),
    "a link to the right bytes": link_away,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", ["manifest.json", "rank00000.safetensors", "rank00000.values"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_rejects_its_step_aloud_and_the_one_before_is_used(tmp_path, caplog, name, damage):
    store = saved(tmp_path, 10, 20)
    DAMAGE[damage](tmp_path / "step-00000020" / name)
    with pytest.raises(CorruptCheckpoint, match=name):
        store.load(20, state(0))
    with caplog.at_level(logging.WARNING, logger="checkpoints"):
        assert store.latest() == 10
    assert list(store.rejected) == [20]
    assert name in store.rejected[20]
    assert "step 20" in caplog.text
    assert name in caplog.text
    assert frozen(loaded(store, 10)) == frozen(state(10))


@pytest.mark.parametrize("name", ["manifest.json", "rank00000.safetensors", "rank00000.values"])
def test_a_flip_of_any_byte_is_found(tmp_path, name):
    store = saved(tmp_path, 10, 20)
    path = tmp_path / "step-00000020" / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        assert store.latest() == 10
    path.write_bytes(whole)
    assert store.latest() == 20


def test_a_step_under_the_name_of_another_is_rejected(tmp_path):
    store = saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020").rename(tmp_path / "step-00000030")
    assert store.latest() == 10
    assert "the manifest of step 20" in store.rejected[30]


def test_a_link_to_a_directory_is_no_step(tmp_path):
    store = saved(tmp_path, 10)
    (tmp_path / "step-00000020").symlink_to("step-00000010")
    assert store.steps() == [10]


def test_a_file_under_one_of_our_names_that_the_manifest_does_not_list_rejects_the_step(tmp_path):
    store = saved(tmp_path, 10, 20)
    shutil.copy(tmp_path / "step-00000020" / "rank00000.values", tmp_path / "step-00000020" / "rank00001.values")
    assert store.latest() == 10
    assert "rank00001.values is not in the manifest of step 20" in store.rejected[20]


def test_files_under_foreign_names_are_never_read(tmp_path):
    store = saved(tmp_path, 10)
    for name in (".metadata", ".nfs0001", "notes.txt", "rank00000.safetensors.bak"):
        (tmp_path / "step-00000010" / name).write_bytes(b"\x80")
    assert store.latest() == 10
    assert frozen(loaded(store, 10)) == frozen(state(10))


def test_steps_that_are_all_damaged_are_an_error_and_never_a_fresh_start(tmp_path):
    store = saved(tmp_path, 10, 20)
    for step in (10, 20):
        flip(tmp_path / f"step-000000{step}" / "rank00000.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"every step in .* is damaged .*step 20: .*; step 10: "):
        store.latest()


def test_a_save_over_damaged_steps_is_the_explicit_fresh_start_and_renames_them(tmp_path):
    store = saved(tmp_path, 10, 20)
    for step in (10, 20):
        flip(tmp_path / f"step-000000{step}" / "rank00000.safetensors")
    held = {(path.parent.name, path.name): path.read_bytes() for path in tmp_path.glob("step-*/*")}
    with pytest.raises(CorruptCheckpoint):
        store.latest()
    store.save(5, state(5))
    assert (store.steps(), store.latest()) == ([5], 5)
    aside = {(path.parent.name[:13], path.name): path.read_bytes() for path in tmp_path.glob("step-*.rejected-*/*")}
    assert aside == held


def test_damage_after_a_good_verdict_is_found_by_the_next_verdict(tmp_path):
    store = saved(tmp_path, 10, 20)
    assert store.latest() == 20
    flip(tmp_path / "step-00000020" / "rank00000.safetensors")
    assert store.latest() == 10


def test_after_a_fallback_the_damaged_steps_are_moved_aside_undeleted_and_can_be_saved_again(tmp_path):
    store = saved(tmp_path, 10, 20, 30)
    flip(tmp_path / "step-00000020" / "rank00000.safetensors")
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    assert store.latest() == 10
    store.save(20, state(21))
    assert store.steps() == [10, 20]
    assert store.latest() == 20
    assert frozen(loaded(store, 20)) == frozen(state(21))
    assert sorted(path.name[:22] for path in tmp_path.glob("*.rejected-*")) == [
        "step-00000020.rejected",
        "step-00000030.rejected",
    ]
    store.save(30, state(30))
    assert store.steps() == [10, 20, 30]


def test_a_manifest_of_a_gigabyte_is_refused_unread(tmp_path):
    store = saved(tmp_path, 10, 20)
    os.truncate(tmp_path / "step-00000020" / "manifest.json", 1 << 30)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (resource.getpagesize() * memory_pages() + (1 << 28), limits[1]))
    try:
        assert store.latest() == 10
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "1073741824 bytes" in store.rejected[20]


def memory_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0])


def digest_of(blob: bytes) -> str:
    with digesting() as digest:
        digest.update(blob)
        return digest.hexdigest()


def test_a_files_digest_is_that_of_the_digests_of_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints.digest.BLOCK", 10)
    blob = bytes(range(256))
    blocks = [hashlib.sha256(blob[i : i + 10]).digest() for i in range(0, 256, 10)]
    for cuts in ([0, 256], [0, 3, 10, 11, 64, 255, 256], range(257)):
        with digesting() as digest:
            for begin, end in pairwise(cuts):
                digest.update(blob[begin:end])
            assert digest.hexdigest() == hashlib.sha256(b"".join(blocks)).hexdigest()
    (tmp_path / "file").write_bytes(blob)
    with (tmp_path / "file").open("rb") as file:
        assert file_digest(file.fileno(), 256) == digest.hexdigest()
        with pytest.raises(EOFError):
            file_digest(file.fileno(), 257)


class Payload:
    """An object that writes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_planted_pickle_never_runs(tmp_path):
    marker = tmp_path / "code ran"
    attack = pickle.dumps(Payload(marker))
    pickle.loads(attack)
    assert marker.exists()
    marker.unlink()

    store = saved(tmp_path / "store", 10, 20)
    path = tmp_path / "store" / "step-00000020"
    for name in (".metadata", "__0.metadata", "__0_0.distcp", "rank00000.pkl"):
        (path / name).write_bytes(attack)
    store.load(20, state(0))
    for name in ("rank00000.values", "rank00000.safetensors", "manifest.json"):
        (path / name).write_bytes(attack)
        assert store.latest() == 10
        with pytest.raises(CorruptCheckpoint):
            store.load(20, state(0))
        with pytest.raises(CorruptCheckpoint):
            store.values(20)
    assert not marker.exists()


@pytest.mark.parametrize(
    "blob", [pickle.dumps(Payload(Path("code ran"))), b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b""]
)
def test_a_sealed_step_with_a_hostile_value_is_refused_in_bounded_memory_and_runs_nothing(tmp_path, monkeypatch, blob):
    """The seal finds damage, not attackers: write access is enough for a valid seal.

    A hostile step is still only data.
    """
    monkeypatch.chdir(tmp_path)
    store = CheckpointStore(tmp_path / "store")
    path = store.save(10, {"a": 1}, {"b": 2})
    (path / "rank00000.values").write_bytes(blob)
    file, span = File(len(blob), digest_of(blob)), Span("rank00000.values", 0, len(blob))
    old = decode((path / "manifest.json").read_bytes())
    for plain, values in ({"a": span}, {}), ({}, {"b": span}):
        new = msgspec.structs.replace(old, files={"rank00000.values": file}, plain=plain, values=values)
        (path / "manifest.json").write_bytes(encode(new))
        assert store.latest() == 10
        with pytest.raises(CorruptCheckpoint, match="cannot be read"):
            store.load(10, {"a": 0}) if plain else store.values(10)
    assert os.listdir(tmp_path) == ["store"]


# What DCP does on its own, and what we do


def test_dcp_drops_a_key_that_only_the_checkpoint_has_and_we_refuse(tmp_path):
    dcp.save({"w": torch.ones(2), "gone": torch.ones(3), "epoch": 7}, checkpoint_id=tmp_path / "dcp")
    target = {"w": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    assert target["w"].tolist() == [1, 1]

    CheckpointStore(tmp_path / "ours").save(1, {"w": torch.ones(2), "gone": torch.ones(3), "epoch": 7})
    with pytest.raises(CheckpointError, match=r"2 only in the step \(epoch, gone\)"):
        CheckpointStore(tmp_path / "ours").load(1, {"w": torch.zeros(2)})


def test_dcp_casts_to_the_type_of_the_target_and_we_refuse(tmp_path):
    dcp.save({"w": torch.tensor([1.0001])}, checkpoint_id=tmp_path / "dcp")
    target = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    assert target["w"].item() == 1

    CheckpointStore(tmp_path / "ours").save(1, {"w": torch.tensor([1.0001])})
    with pytest.raises(
        CheckpointError, match=r"w is torch\.float32 \[1\] in the step and torch\.bfloat16 \[1\] in the state"
    ):
        CheckpointStore(tmp_path / "ours").load(1, target)


def test_dcp_loads_one_entry_of_a_list_of_two_and_we_refuse(tmp_path):
    dcp.save({"buffer": [{"row": 5}, {"row": 6}]}, checkpoint_id=tmp_path / "dcp")
    target = {"buffer": [{"row": 0}]}
    dcp.load(target, checkpoint_id=tmp_path / "dcp")
    assert target == {"buffer": [{"row": 5}]}

    CheckpointStore(tmp_path / "ours").save(1, {"buffer": [{"row": 5}, {"row": 6}]})
    with pytest.raises(CheckpointError, match=r"buffer\.1\.row"):
        CheckpointStore(tmp_path / "ours").load(1, {"buffer": [{"row": 0}]})


def test_dcp_loads_nothing_into_a_fresh_optimizer_and_we_refuse(tmp_path):
    model = nn.Linear(2, 2)
    trained = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    trained.step()
    dcp.save({"optimizer": trained.state_dict()}, checkpoint_id=tmp_path / "dcp")
    fresh = {"optimizer": torch.optim.AdamW(model.parameters()).state_dict()}
    dcp.load(fresh, checkpoint_id=tmp_path / "dcp")
    assert fresh["optimizer"]["state"] == {}

    CheckpointStore(tmp_path / "ours").save(1, {"optimizer": trained.state_dict()})
    with pytest.raises(CheckpointError, match=r"6 only in the step \(optimizer\.state\.0\.exp_avg, "):
        CheckpointStore(tmp_path / "ours").load(1, fresh)


def test_dcp_runs_code_from_a_checkpoint(tmp_path):
    dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "code ran")))
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"w": torch.zeros(1)}, checkpoint_id=tmp_path / "dcp")
    assert (tmp_path / "code ran").exists()
