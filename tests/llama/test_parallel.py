"""A model spread over ranks starts with the bits of one process and computes equal numbers."""

import tempfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_llama import CONFIG, QWEN2, QWEN3, TIED, PackTensors, loss_of, pack_of, trained_loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sftstream import IGNORE_INDEX
from trainer.comparison import CAPACITY as PARITY_CAPACITY
from trainer.comparison import random_pack
from trainer.distributed.mesh import ParallelConfig, Topology, data_and_tensor_mesh
from trainer.llama.attention import Segments
from trainer.llama.config import LlamaConfig
from trainer.llama.export import export
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.parallel import build, check_divisible, parallelize
from trainer.llama.sharding import window
from trainer.llama.weights import load_weights
from trainer.llama.working import working_copies
from trainer.training.optimizer import OptimizerConfig, build_optimizer, clipped_step, global_norm
from trainer.training.step import accumulate_gradients

CPU = torch.device("cpu")
CAPACITY = 24
# Sums run in another order. Measured: up to 1.3e-6 of a parameter's largest gradient.
TOLERANCE = 1e-5


class Case(NamedTuple):
    dp: int
    tp: int
    config: LlamaConfig
    replicas: int = 1

    def __str__(self) -> str:
        tied = "tied" if self.config.tie_word_embeddings else "untied"
        return f"dp {self.dp}, tp {self.tp}, replicas {self.replicas}, {self.config.model_type}, {tied}"


CASES = [Case(dp, tp, config) for dp, tp in ((1, 2), (2, 1), (2, 2), (1, 4)) for config in (CONFIG, TIED)]
CASES += [Case(2, 2, QWEN2), Case(1, 4, QWEN2), Case(2, 2, QWEN3), Case(1, 4, QWEN3)]
CASES += [Case(2, 2, TIED, replicas=2), Case(4, 1, CONFIG, replicas=2), Case(4, 1, TIED, replicas=4)]
CASES += [Case(3, 1, TIED)]  # nothing is a multiple of three

Arrays = dict[str, NDArray[np.float32]]


class Outcome(NamedTuple):
    """Results of one topology: full tensors by parameter."""

    initial: Arrays
    loss: float
    gradients: Arrays
    norm: float
    means: Arrays
    """AdamW's running means of the clipped gradients, after the first step."""
    trained_only: Arrays
    stepped: Arrays


def packs(count: int) -> list[PackTensors]:
    """Return a global batch; the last pack has no trained token, as at the end of a stream."""
    made = [pack_of(9, 4, 11, seed=n) for n in range(count)]
    made[-1] = made[-1]._replace(labels=torch.full((CAPACITY,), IGNORE_INDEX))
    return made


def whole(tensors: dict[str, torch.Tensor]) -> Arrays:
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().float().numpy().copy() for name, t in full.items()}


def backward(model: Llama, mine: list[PackTensors], *, trained_only: bool = False) -> float:
    """Set the gradients of the global batch, and return the loss of the packs of this rank."""
    model.zero_grad()
    total = 0.0
    copies = working_copies(model)
    with copies.step(len(mine)) if copies else nullcontext():
        for number, pack in enumerate(mine, 1):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(number == len(mine))
            loss = trained_loss_of(model, pack) if trained_only else loss_of(model, pack)
            loss.backward()
            total += loss.item()
    return total


def compute(model: Llama, mine: list[PackTensors]) -> Outcome:
    initial = whole(dict(model.named_parameters()))
    backward(model, mine, trained_only=True)
    global_norm(model.parameters())  # completes partial sums
    trained_only = whole({name: p.grad for name, p in model.named_parameters()})
    loss = backward(model, mine)
    norm = global_norm(model.parameters())
    gradients = whole({name: p.grad for name, p in model.named_parameters()})
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))
    clipped_step(optimizer, norm, norm.item() / 3)
    means = whole({name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()})
    after = whole(dict(model.named_parameters()))
    return Outcome(initial, loss, gradients, norm.item(), means, trained_only, after)


def on_a_rank(rank: int, cases: list[Case]) -> list[Outcome]:
    return [spread(*case) for case in cases]  # one process group for all cases: starting ranks takes most of the time


def spread(dp: int, tp: int, config: LlamaConfig, replicas: int) -> Outcome:
    mesh = data_and_tensor_mesh("cpu", ParallelConfig(tp=tp, replicas=replicas))
    model = build(config, mesh, torch.device("cpu"), capacity=CAPACITY, replicas=replicas)
    init_weights(model, 0)
    outcome = compute(model, packs(2 * dp)[mesh["dp"].get_local_rank() :: dp])
    loss = torch.tensor(outcome.loss)
    dist.all_reduce(loss, group=mesh["dp"].get_group())
    assert (model.head.weight is model.embedding.weight) == config.tie_word_embeddings
    return outcome._replace(loss=loss.item())


def alone(dp: int, config: LlamaConfig) -> Outcome:
    model = Llama(config)
    init_weights(model, 0)
    return compute(model, packs(2 * dp))


def qkv_rows(rank: int) -> tuple[tuple[int, int], slice]:
    """Return the rows of a fused matrix on this rank, by (dp, tp): the example in parallel.py."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    config = msgspec.structs.replace(CONFIG, num_attention_heads=4, num_key_value_heads=2, head_dim=2)
    with torch.device("meta"):
        model = parallelize(Llama(config), mesh, capacity=CAPACITY)
    rows, columns = window(model.get_parameter("blocks.0.attention.qkv.weight"))
    assert columns == slice(0, config.hidden_size)
    return (mesh["dp"].get_local_rank(), mesh["tp"].get_local_rank()), rows


def test_four_ranks_hold_the_rows_of_the_worked_example() -> None:
    assert dict(run_ranks(4, qkv_rows)) == {
        (0, 0): slice(0, 4),
        (1, 0): slice(4, 8),
        (0, 1): slice(8, 12),
        (1, 1): slice(12, 16),
    }


@pytest.fixture(scope="module")
def outcomes() -> dict[Case, list[Outcome]]:
    """Outcome of every rank, by case."""
    by_case: dict[Case, list[Outcome]] = {}
    for size in (2, 3, 4):
        cases = [case for case in CASES if case.dp * case.tp == size]
        by_case |= zip(cases, zip(*run_ranks(size, on_a_rank, cases, timeout=180), strict=True), strict=True)
    return by_case


@pytest.fixture(params=CASES, ids=Case.__str__)
def both(request: pytest.FixtureRequest, outcomes: dict[Case, list[Outcome]]) -> tuple[list[Outcome], Outcome]:
    return outcomes[request.param], alone(request.param.dp, request.param.config)


def assert_near(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE * np.abs(array).max(), err_msg=name)


def test_every_topology_starts_from_the_same_bits(both: tuple[list[Outcome], Outcome]) -> None:
    ranks, expected = both
    for rank in ranks:
        assert all(np.array_equal(rank.initial[name], array) for name, array in expected.initial.items())


def test_every_topology_has_the_loss_and_gradients_of_one_process(both: tuple[list[Outcome], Outcome]) -> None:
    ranks, expected = both
    for rank in ranks:
        assert rank.loss == pytest.approx(expected.loss, rel=1e-6)
        assert_near(rank.gradients, expected.gradients)


def test_every_topology_gets_the_gradients_from_trained_positions_alone(both: tuple[list[Outcome], Outcome]) -> None:
    ranks, expected = both
    for rank in ranks:
        assert_near(rank.trained_only, expected.gradients)


def test_every_rank_clips_to_the_norm_of_the_full_gradient(both: tuple[list[Outcome], Outcome]) -> None:
    ranks, expected = both
    assert len({rank.norm for rank in ranks}) == 1
    for rank in ranks:
        assert rank.norm == pytest.approx(expected.norm, rel=1e-6)
        assert_near(rank.means, expected.means)


def test_an_optimizer_step_gives_every_topology_the_weights_of_one_process(both: tuple[list[Outcome], Outcome]) -> None:
    ranks, expected = both
    for rank in ranks:
        # A step is 0.01. Adam divides by the size of the gradient, so rounding shows.
        for name, array in expected.stepped.items():
            np.testing.assert_allclose(rank.stepped[name], array, rtol=0, atol=5e-5, err_msg=name)


def unsharded(rank: int) -> list[tuple[bool, bool]]:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = parallelize(Llama(CONFIG), mesh, capacity=CAPACITY, compute_dtype=dtype)
        wrapped = isinstance(model, FSDPModule) or any(isinstance(p, DTensor) for p in model.parameters())
        found.append((wrapped, working_copies(model) is not None))
    return found


def test_one_process_is_never_sharded_and_copies_weights_only_to_compute_in_another_dtype() -> None:
    assert run_ranks(1, unsharded) == [[(False, False), (False, True)]]


def rounded(rank: int, weights_dtype: torch.dtype) -> tuple[float, Arrays]:
    mesh = data_and_tensor_mesh("cpu", ParallelConfig(tp=2))
    model = build(TIED, mesh, CPU, capacity=CAPACITY, compute_dtype=torch.bfloat16, weights_dtype=weights_dtype)
    init_weights(model, 0)
    loss = torch.tensor(backward(model, packs(4)[mesh["dp"].get_local_rank() :: 2]))
    dist.all_reduce(loss, group=mesh["dp"].get_group())
    optimizer = build_optimizer(model, OptimizerConfig())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()
    state = [value for values in optimizer.state.values() for name, value in values.items() if name != "step"]
    assert {tensor.dtype for tensor in [*gradients.values(), *model.parameters(), *state]} == {weights_dtype}
    return loss.item(), whole(gradients)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_computing_in_bfloat16_on_four_ranks_stays_near_fp32_on_one(weights_dtype: torch.dtype) -> None:
    expected = alone(2, TIED)
    for loss, gradients in run_ranks(4, rounded, weights_dtype):
        assert loss == pytest.approx(expected.loss, rel=0.01)
        for name, array in expected.gradients.items():
            assert np.linalg.norm(gradients[name] - array) < 0.05 * np.linalg.norm(array), name


def projected(rank: int) -> None:
    topology = Topology(data_and_tensor_mesh("cpu", ParallelConfig(tp=2)), CPU)
    model = build(TIED, topology.mesh, CPU, capacity=CAPACITY)
    init_weights(model, 0)
    pack = packs(2)[0]
    trained = torch.nonzero(pack.labels != IGNORE_INDEX).flatten()
    assert 0 < len(trained) < CAPACITY
    inputs = pack.input_ids, pack.position_ids, pack.segments, trained
    assert model(*inputs).to_local().shape == (len(trained), TIED.vocab_size // 2)
    hidden = torch.randn(len(trained), TIED.hidden_size, requires_grad=True)
    with Operations() as seen:
        model.head.loss(hidden, pack.labels[trained], torch.ones(())).backward()
    assert {name: count for name, count in seen.counts.items() if "all" in name} == {"allreduce_": 2}


def test_only_trained_positions_are_projected_and_logits_are_never_gathered() -> None:
    run_ranks(2, projected)


def completed(rank: int) -> dict[str, int]:
    model = build(TIED, data_and_tensor_mesh("cpu", ParallelConfig(tp=2)), CPU, capacity=CAPACITY)
    init_weights(model, 0)
    backward(model, packs(2))
    partial = [p for p in model.parameters() if isinstance(p.grad, DTensor) and p.grad.placements[0].is_partial()]
    assert len(partial) == 2 * CONFIG.num_hidden_layers + 1  # the norms
    with Operations() as seen:
        global_norm(model.parameters())
    return dict(seen.counts)


def test_partial_gradients_of_all_norms_are_summed_in_a_single_exchange() -> None:
    """The other exchange sums the squares of the split matrices."""
    assert [counts["allreduce_"] for counts in run_ranks(2, completed)] == [2, 2]


def few_trained(rank: int, tp: int) -> list[tuple[float, Arrays]]:
    mesh = data_and_tensor_mesh("cpu", ParallelConfig(tp=tp))
    found = []
    for trained in FEW:
        model = build(CONFIG, mesh, CPU, capacity=CAPACITY)
        init_weights(model, 0)
        pack = pack_of(9, 4, 11)
        labels = torch.full((CAPACITY,), IGNORE_INDEX)
        labels[trained] = 7
        loss = trained_loss_of(model, pack._replace(labels=labels))
        loss.backward()
        global_norm(model.parameters())
        found.append((loss.item(), whole({name: p.grad for name, p in model.named_parameters()})))
    return found


FEW: list[list[int]] = [[], [5], [5, 23], [0, 1, 2, 3, 4, 5], list(range(12, 24)), list(range(24))]
"""Trained tokens of a pack of 24: none in some slices of four ranks, or in all."""


@pytest.mark.parametrize("tp", [2, 4])
def test_slices_without_a_trained_token_change_nothing(tp: int) -> None:
    (expected,) = run_ranks(1, few_trained, 1)
    for rank in run_ranks(tp, few_trained, tp):
        for (loss, gradients), (exact, plain) in zip(rank, expected, strict=True):
            assert loss == pytest.approx(exact, rel=1e-6)
            assert_near(gradients, plain)


class Operations(TorchDispatchMode):
    """Counts of the operations run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[op.__name__.partition(".")[0]] += 1
        return op(*args, **(kwargs or {}))


class Traffic(NamedTuple):
    gathers: int
    scatters: int
    reduces: int
    """All-reduces: gradients between replicas, and the loss."""


def traffic(rank: int, parallel: ParallelConfig, config: LlamaConfig = CONFIG) -> tuple[Traffic, Arrays]:
    """Return the collectives and the gradients of a step of three packs per rank."""
    topology = Topology(data_and_tensor_mesh("cpu", parallel), CPU, parallel)
    model = build(
        config,
        topology.mesh,
        CPU,
        capacity=PARITY_CAPACITY,
        reshard_after_forward=parallel.reshards,
        replicas=parallel.groups,
    )
    init_weights(model, 0)
    with Operations() as seen:
        accumulate_gradients(model, [random_pack(config.vocab_size, n + 3 * rank) for n in range(3)], topology, 99)
    return (
        Traffic(*(seen.counts[name] for name in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_"))),
        whole({name: p.grad for name, p in model.named_parameters()}),
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # FSDP2 has four groups of weights: two layers, the head, and the embedding with the norm.
        ({}, Traffic(3 * (4 + 2), 4, 1)),
        ({"reshard_after_forward": False}, Traffic(4, 4, 1)),
        ({"reduce_gradients": "pack"}, Traffic(3 * (4 + 2), 3 * 4, 1)),
        ({"reshard_after_forward": False, "reduce_gradients": "pack"}, Traffic(4, 3 * 4, 1)),
        ({"replicas": 2}, Traffic(3 * (4 + 2), 4, 4 + 1)),
        ({"replicas": 2, "reduce_gradients": "pack"}, Traffic(3 * (4 + 2), 3 * 4, 4 + 1)),
    ],
    ids=str,
)
def test_a_step_runs_exactly_the_collectives_of_the_policy(settings: dict[str, Any], expected: Traffic) -> None:
    parallel = ParallelConfig(**settings)
    ranks = run_ranks(2 * parallel.groups, traffic, parallel)
    assert {seen for seen, _ in ranks} == {expected}
    gradients = ranks[0][1]
    model = Llama(CONFIG)
    init_weights(model, 0)
    for n in range(3 * len(ranks)):
        pack = random_pack(CONFIG.vocab_size, n)
        segments = Segments(pack.cu_seqlens, pack.max_seqlen)
        (model(pack.input_ids, pack.position_ids, segments, labels=pack.labels) / 99).backward()
    assert_near(gradients, whole({name: p.grad for name, p in model.named_parameters()}))


def test_a_tied_head_is_gathered_with_the_embedding() -> None:
    assert {seen for seen, _ in run_ranks(2, traffic, ParallelConfig(), TIED)} == {Traffic(3 * (3 + 2), 3, 1)}


def through_files(rank: int, directory: str, out: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="tp 2 does not divide capacity 23"):
        parallelize(Llama(CONFIG), mesh, capacity=23)
    model = parallelize(Llama(TIED), mesh, capacity=CAPACITY)
    assert model.head.weight is model.embedding.weight
    load_weights(model, directory)
    export(model, TIED, out)


def test_weights_loaded_and_exported_by_four_ranks_keep_their_bits() -> None:
    with tempfile.TemporaryDirectory() as root:
        model = Llama(TIED)
        init_weights(model, 0)
        export(model, TIED, Path(root) / "in")
        run_ranks(4, through_files, f"{root}/in", f"{root}/out")
        before, after = (load_file(f"{root}/{name}/model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("tp", "capacity", "message"),
    [
        (
            3,
            24,
            r"tp 3 does not divide num_attention_heads 8, num_key_value_heads 4, vocab_size 64: choose a tp of \[1",
        ),
        (4, 22, r"tp 4 does not divide capacity 22: choose a tp of \[1, 2\]"),
        (8, 24, r"tp 8 does not divide num_key_value_heads 4: choose a tp of \[1, 2, 4\]"),
    ],
)
def test_a_size_not_divisible_by_tp_is_refused(tp: int, capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_divisible(CONFIG, capacity, tp)
