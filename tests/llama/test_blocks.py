"""Recomputation changes no bit of plain layers; compilation happens once for all divisions of a pack."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from gloo_ranks import run_ranks
from tiny_llama import CONFIG, PackTensors, built, gradients, loss_of, pack_of, trained_loss_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile

from trainer.distributed.mesh import ParallelConfig, data_and_tensor_mesh
from trainer.llama.blocks import Recompute, prepare_blocks
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import local

PACK = (9, 14, 9)


class Outcome(NamedTuple):
    gradients: dict[str, Tensor]
    stored: int
    """Bytes kept from the forward pass for the backward pass, weights included."""


def outcome(model: Llama) -> Outcome:
    stored: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, pack_of(*PACK))
    loss.backward()
    return Outcome(gradients(model), sum(stored.values()))


@pytest.mark.parametrize(("recompute", "less"), [("selective", "none"), ("full", "selective")])
def test_recomputation_stores_less_and_changes_no_bit(recompute: Recompute, less: Recompute) -> None:
    grads, stored = {}, {}
    for mode in (recompute, less):
        model = built(msgspec.structs.replace(CONFIG, num_hidden_layers=6))
        prepare_blocks(model, recompute=mode, compiled=False)
        grads[mode], stored[mode] = outcome(model)
    assert stored[recompute] < 0.8 * stored[less]
    assert all(torch.equal(grads[recompute][name], grads[less][name]) for name in grads[less])


def products(events: Iterable[Any]) -> int:
    """Return the number of matrix products in a profile.

    A product at which a recomputation stops is begun, but does not come to read its inputs.
    """
    begun = [event for event in events if event.name in ("aten::mm", "aten::addmm")]
    return sum(any(child.name == "aten::resolve_conj" for child in event.cpu_children) for event in begun)


@pytest.mark.parametrize("compiled", [False, True])
def test_full_recomputation_leaves_out_each_last_product_and_the_last_layer(compiled: bool) -> None:
    """A layer has four products: the last one's result is not needed again."""
    layers, counts = 5, []
    modes: tuple[Recompute, ...] = ("none", "full")
    for mode in modes:
        torch._dynamo.reset()
        model = built(msgspec.structs.replace(CONFIG, num_hidden_layers=layers))
        prepare_blocks(model, recompute=mode, compiled=compiled)
        loss_of(model, pack_of(*PACK)).backward()
        with profile() as trace:
            loss_of(model, pack_of(*PACK)).backward()
        counts.append(products(trace.events()))
    assert counts[0] > 3 * 4 * layers
    assert counts[1] - counts[0] == 3 * (layers - 1)


def many_divisions() -> list[PackTensors]:
    """Return 50 packs of 32 tokens, with 1 to 32 conversations."""
    draw = torch.Generator().manual_seed(0)
    packs = []
    for seed in range(50):
        cuts = torch.randperm(31, generator=draw)[: int(torch.randint(32, (1,), generator=draw))]
        borders = torch.cat((torch.tensor([0]), (cuts + 1).sort().values, torch.tensor([32])))
        packs.append(pack_of(*borders.diff().tolist(), seed=seed))
    return packs


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_stay_near_plain_blocks_and_compile_only_once(recompute: Recompute) -> None:
    torch._dynamo.reset()
    model, plain = built(CONFIG), built(CONFIG)
    prepare_blocks(model, recompute=recompute, compiled=True)
    found, expected = outcome(model).gradients, outcome(plain).gradients
    assert_near(found, expected)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pack in many_divisions():
            assert len(pack.segments.lengths) > 0
            loss_of(model, pack).backward()
            loss_of(plain, pack).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pack in many_divisions():
            trained_loss_of(model, pack).backward()
            trained_loss_of(plain, pack).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert_near(gradients(model), gradients(plain))


@pytest.mark.parametrize(
    ("recompute", "float8", "graphs", "breaks"),
    [
        ("none", False, 2, 0),
        ("none", True, 2, 0),
        ("selective", False, 2, 0),
        ("selective", True, 2, 0),
        ("full", False, 3, 1),
        ("full", True, 2, 0),
    ],
)
def test_all_layers_share_a_graph_before_and_a_graph_after_their_attention(
    recompute: Recompute, float8: bool, graphs: int, breaks: int
) -> None:
    """The last layer's end is not compiled for selected tokens."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    # more layers than the compiler compiles one by one
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 8}
    model = built(msgspec.structs.replace(CONFIG, num_hidden_layers=10, **wide))
    prepare_blocks(model, recompute=recompute, compiled=True, float8=float8)
    for lengths in ((100, 156), (256,)):
        trained_loss_of(model, pack_of(*lengths)).backward()
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(counters["graph_break"]) == breaks
    if recompute != "full":
        loss_of(model, pack_of(256)).backward()  # all tokens in the last layer, as in the others
        assert counters["stats"]["unique_graphs"] == graphs


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def compiled_on_a_rank(rank: int, tp: int, recompute: Recompute) -> dict[str, Tensor]:
    mesh = data_and_tensor_mesh("cpu", ParallelConfig(tp=tp))
    found = []
    for compiled in (False, True):
        model = build(CONFIG, mesh, torch.device("cpu"), capacity=32)
        init_weights(model, 0)
        prepare_blocks(model, recompute=recompute, compiled=compiled)
        both_losses_of(model, pack_of(*PACK)).backward()
        if compiled:
            with torch._dynamo.config.patch(error_on_recompile=True):
                for pack in many_divisions()[:10]:
                    both_losses_of(model, pack).backward()
            model.zero_grad()
            both_losses_of(model, pack_of(*PACK)).backward()
        found.append({name: local(p.grad) for name, p in model.named_parameters()})
    assert_near(found[1], found[0])


def both_losses_of(model: Llama, pack: PackTensors) -> Tensor:
    return loss_of(model, pack) + trained_loss_of(model, pack)


@pytest.mark.parametrize(
    ("tp", "recompute"), [(1, "none"), (1, "selective"), (2, "none"), (2, "selective"), (2, "full")]
)
def test_blocks_spread_over_ranks_compile_only_once(tp: int, recompute: Recompute) -> None:
    run_ranks(2, compiled_on_a_rank, tp, recompute, timeout=300)
