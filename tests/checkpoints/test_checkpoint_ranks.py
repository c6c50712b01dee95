"""Ranks save and fail together, and any sharding loads the save of any sharding, to the bit."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from checkpoints import CheckpointError, CheckpointStore

TP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
LAYOUTS = {"one": (1, 1), "tp2": (1, 2), "dp2": (2, 1)}
"""Data-parallel (FSDP2) and tensor-parallel sizes."""

MORE_LAYOUTS = {"dp3": (3, 1), "dp2 tp2": (2, 2), "dp3 tp2": (3, 2), "dp4": (4, 1)}
"""With uneven shards, empty shards, and dimensions that are sharded twice."""


class Block(nn.Module):
    """Layers of sizes not divisible by 3 or 4; on four ranks, `tiny` leaves a rank empty."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.tiny = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x)))).sum() * self.tiny.sum()


def training(seed: int, dp: int, tp: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and AdamW with two parameter groups, sharded, after two steps."""
    torch.manual_seed(seed)
    model = Block()
    if dp * tp > 1:
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        if tp > 1:
            parallelize_module(model, mesh["tp"], TP_PLAN)
        if dp > 1:
            fully_shard(model, mesh=mesh["dp"])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2 / (seed + 1), betas=(0.9, 0.95))
    for _ in range(2):
        model(torch.randn(4, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def frozen(value: Any) -> Any:
    """Return a nested state with tensors as bytes: `==` then compares bits."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return str(whole.dtype), tuple(whole.shape), whole.detach().contiguous().view(-1).numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return type(value)(map(frozen, value)) if isinstance(value, list | tuple) else value


def save_layout(rank: int, root: Path, dp: int, tp: int) -> Any:
    state = state_of(*training(0, dp, tp))
    CheckpointStore(root).save(2, state, {f"rng/rank{rank:05d}": bytes([rank])})
    return frozen(state)


def load_layouts(rank: int, roots: list[Path], dp: int, tp: int) -> list[Any]:
    """Return the state after loading each root into a model and an optimizer trained otherwise."""
    return [load_layout(root, dp, tp) for root in roots]


def load_layout(root: Path, dp: int, tp: int) -> Any:
    model, optimizer = training(1, dp, tp)
    state = state_of(model, optimizer)
    store = CheckpointStore(root)
    step = store.latest()
    assert step == 2
    store.load(step, state)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return frozen(state_of(model, optimizer))


def assert_every_layout_loads_every_other(root: Path, layouts: dict[str, tuple[int, int]]) -> None:
    roots = [root / name for name in layouts]
    saved = [
        run_ranks(dp * tp, save_layout, path, dp, tp)[0] for path, (dp, tp) in zip(roots, layouts.values(), strict=True)
    ]
    for name, (dp, tp) in layouts.items():
        for loaded in run_ranks(dp * tp, load_layouts, roots, dp, tp):
            assert loaded == saved, f"loaded under {name}"


def test_model_and_adamw_load_to_the_bit_under_one_process_tp_and_fsdp(tmp_path):
    assert_every_layout_loads_every_other(tmp_path, LAYOUTS)
    assert CheckpointStore(tmp_path / "dp2").values(2) == {"rng/rank00000": b"\0", "rng/rank00001": b"\1"}


@pytest.mark.slow
def test_model_and_adamw_load_to_the_bit_under_uneven_empty_and_double_shards(tmp_path):
    assert_every_layout_loads_every_other(tmp_path, LAYOUTS | MORE_LAYOUTS)


def test_one_process_without_a_group_loads_what_two_ranks_saved(tmp_path):
    saved = run_ranks(2, save_layout, tmp_path, 1, 2)[0]
    assert load_layout(tmp_path, 1, 1) == saved


def test_each_rank_writes_its_half_and_replicas_are_written_once(tmp_path):
    run_ranks(2, save_layout, tmp_path, 2, 1)
    files = sorted((tmp_path / "step-00000002").iterdir())
    assert [path.name for path in files] == [
        "manifest.json",
        "rank00000.safetensors",
        "rank00000.values",
        "rank00001.safetensors",
        "rank00001.values",
    ]
    ours, theirs = (path.stat().st_size for path in files if path.suffix == ".safetensors")
    elements = sum(p.numel() for p in Block().parameters())
    assert 4 * 3 * elements <= ours + theirs < 4 * 3 * elements + 8000
    assert 0.7 < ours / theirs < 1.4


# Values of several ranks


def save_values(rank: int, root: Path, values: list[dict[str, Any]], plain: list[Any]) -> str | None:
    try:
        CheckpointStore(root).save(1, {"w": torch.ones(2), "plain": plain[rank]}, values[rank])
    except CheckpointError as error:
        return str(error)
    return None


def dcp_save_and_load(rank: int, root: Path) -> int:
    state = {"position": 100 + rank}
    dcp.save(state, checkpoint_id=root)
    dcp.load(state, checkpoint_id=root)
    return state["position"]


def test_dcp_gives_all_ranks_one_ranks_value_and_we_refuse_to_save(tmp_path):
    assert len(set(run_ranks(2, dcp_save_and_load, tmp_path / "dcp"))) == 1

    for values, plain in ([{"position": 100}, {"position": 101}], [0, 0]), ([{}, {}], [100, 101]):
        answers = run_ranks(2, save_values, tmp_path / "ours", values, plain)
        assert answers[0] == answers[1]
        assert "ranks 0 and 1 save different values under" in answers[0]
        assert not (tmp_path / "ours").exists()


def test_the_step_holds_the_values_of_all_ranks_and_equal_ones_once(tmp_path):
    both = {"data/identity": {"rows": 3}}
    values = [both | {"data/stream/0000": b"a"}, both | {"data/stream/0001": b"b"}]
    assert run_ranks(2, save_values, tmp_path, values, [0, 0]) == [None, None]
    assert CheckpointStore(tmp_path).values(1) == values[0] | values[1]
    assert CheckpointStore(tmp_path).values(1, "data/stream/") == {"data/stream/0000": b"a", "data/stream/0001": b"b"}


def save_parts(rank: int, root: Path) -> list[float]:
    """Save a different layer on each rank, as in a pipeline."""
    CheckpointStore(root).save(1, {f"layer{rank}": torch.full((2,), float(rank)), f"plain{rank}": rank})
    target = {f"layer{rank}": torch.zeros(2), f"plain{rank}": -1}
    CheckpointStore(root).load(1, target)
    return [*target[f"layer{rank}"].tolist(), target[f"plain{rank}"]]


def test_ranks_may_hold_different_parts_of_a_state(tmp_path):
    assert run_ranks(2, save_parts, tmp_path) == [[0, 0, 0], [1, 1, 1]]


# Failures


@contextmanager
def no_room(size: int) -> Any:
    """Fail every write of this process beyond `size` bytes of a file, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def big_state(rank: int) -> dict[str, Any]:
    return {f"w{rank}": torch.full((10_000,), float(rank)), "step": 0}


def save_without_room(rank: int, root: Path, full: int) -> tuple[str, list[str], list[int], int | None]:
    store = CheckpointStore(root)
    store.save(1, big_state(rank))
    error = ""
    with no_room(2000 if rank == full else 1 << 30):
        try:
            store.save(2, big_state(rank))
        except CheckpointError as raised:
            error = str(raised)
    dist.barrier()
    names = sorted(os.listdir(root))
    dist.barrier()
    store.save(2, big_state(rank))
    store.load(2, big_state(rank))
    return error, names, store.steps(), store.latest()


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_one_rank_is_an_error_on_all_and_the_same_step_can_be_saved_later(tmp_path, full):
    for error, names, steps, latest in run_ranks(2, save_without_room, tmp_path, full):
        assert error.startswith(f"saving step 2 failed on rank {full}: OSError: [Errno 27]")
        assert names == [".lock", "step-00000001"]
        assert (steps, latest) == ([1, 2], 2)


def attempt(rank: int, root: Path, act: Callable[[int, CheckpointStore], Any]) -> str:
    try:
        act(rank, CheckpointStore(root))
    except CheckpointError as error:
        return str(error)
    return "no error"


def save_what_one_rank_cannot_encode(rank: int, store: CheckpointStore) -> None:
    store.save(3, {}, {"a": object()} if rank == 1 else {})


def save_different_steps(rank: int, store: CheckpointStore) -> None:
    store.save(3 + rank, {})


def load_unfit_on_one_rank(rank: int, store: CheckpointStore) -> None:
    store.load(2, {"w": torch.zeros(2 + rank)})


def load_different_steps(rank: int, store: CheckpointStore) -> None:
    store.load(1 + rank, {"w": torch.zeros(2)})


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (save_what_one_rank_cannot_encode, "saving step 3 failed on rank 1: TypeError: 'a' holds a builtins.object"),
        (save_different_steps, "the ranks save different steps, [3, 4]; all ranks must save the same step"),
        (load_unfit_on_one_rank, "step 2 does not fit this state: 1 changed (w is torch.float32 [2]"),
        (load_different_steps, "the ranks see different directories as step"),
    ],
)
def test_a_mistake_of_one_rank_is_an_error_on_all(tmp_path, act, message):
    for step in (1, 2):
        CheckpointStore(tmp_path).save(step, {"w": torch.full((2,), float(step))})
    for error in run_ranks(2, attempt, tmp_path, act):
        assert error.startswith(message)


def load_damaged(rank: int, root: Path) -> tuple[int | None, list[int], list[float]]:
    store = CheckpointStore(root)
    step = store.latest()
    assert step is not None
    target = big_state(rank)
    store.load(step, target)
    return step, list(store.rejected), target[f"w{rank}"][:1].tolist()


def save_two(rank: int, root: Path) -> None:
    for step in (1, 2):
        CheckpointStore(root).save(step, big_state(rank), {f"v{rank}": step})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two ranks")
    run_ranks(2, save_two, root)
    return root


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "rank00000.safetensors", "rank00000.values", "rank00001.safetensors", "rank00001.values"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_damage_in_any_ranks_file_is_seen_by_all_ranks(tmp_path, two_steps, name, ranks):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step-00000002" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\xaa")
    if ranks == 1:
        store = CheckpointStore(tmp_path)
        assert (store.latest(), list(store.rejected)) == (1, [2])
    else:
        assert run_ranks(2, load_damaged, tmp_path) == [(1, [2], [0]), (1, [2], [1])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_an_nccl_group_is_joined_by_a_gloo_group_of_our_own(tmp_path):
    assert run_ranks(1, save_on_gpu, tmp_path) == ["nccl"]


def save_on_gpu(rank: int, root: Path) -> str:
    dist.destroy_process_group()
    meeting = f"file://{root / 'meeting'}"
    dist.init_process_group("nccl", init_method=meeting, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    weights = torch.randn(1000, 1000, device="cuda", dtype=torch.bfloat16)
    target = torch.zeros_like(weights)
    store = CheckpointStore(root / "store")
    store.save(1, {"w": weights})
    assert store.latest() == 1
    store.load(1, {"w": target})
    assert torch.equal(weights, target)
    return str(dist.get_backend())
