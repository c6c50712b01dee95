"""Adapters on frozen, fused and spread layers equal those of `peft`, through files both ways."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from gloo_ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_parity import SPREAD, topology
from tiny_llama import CONFIG, FAMILIES, TIED, built, loss_of, pack_of, public_llama
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.comparison import CAPACITY, Check, compare, public_model, public_name, random_pack, verdict
from trainer.distributed.mesh import ParallelConfig, Topology, data_and_tensor_mesh
from trainer.llama.blocks import Recompute, prepare_blocks
from trainer.llama.export import export_adapter
from trainer.llama.flops import model_flops
from trainer.llama.hf_config import read_config
from trainer.llama.init import init_adapters, init_weights
from trainer.llama.lora.files import load_adapters, read_adapter_config, trained_layout
from trainer.llama.lora.layers import A, Adapter, LoraConfig, Part
from trainer.llama.lora.nf4 import quantize
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.weights import load_weights, unfused_pieces
from trainer.training.optimizer import OptimizerConfig, build_optimizer
from trainer.training.step import train_step

SETTINGS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "queries and values": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5},
    "up and output, rank-stabilized": {"target_modules": ["up_proj", "o_proj"], "use_rslora": True},
    "keys": {"target_modules": ["k_proj"], "r": 1},
    "head and embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": ["gate_proj", "down_proj"], "modules_to_save": ["lm_head"]},
}
UNTIED = "grouped heads, untied"


class Case(NamedTuple):
    family: str
    settings: str = "all-linear"
    dp: int = 1
    tp: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.family}, {self.settings}, dp {self.dp}, tp {self.tp}, {self.dtype}"


CASES = [Case(family) for family in FAMILIES]
CASES += [Case(family, "all-linear", *spread) for family in SPREAD for spread in ((1, 2), (2, 1))]
CASES += [Case(UNTIED, settings, 1, 2) for settings in SETTINGS][1:]
CASES += [Case(UNTIED, settings, 2, 2) for settings in ("head and embedding", "head")]
CASES += [Case(UNTIED, "all-linear", *spread, torch.bfloat16) for spread in ((1, 1), (2, 2))]
RATE = 1e-2


class Found(NamedTuple):
    """Results of a case on rank 0."""

    checks: list[Check]
    stepped: dict[str, torch.Tensor]
    """Trained weights after a step of AdamW, under the names of `trained_layout`."""
    frozen: list[str]
    """Frozen parameters that the step changed, or gave a gradient or an optimizer state."""


def spread(ranks: Any, base: Path, adapter: Path, dtype: torch.dtype) -> Llama:
    lora = read_adapter_config(adapter).lora
    model = build(
        read_config(base),
        ranks.mesh,
        ranks.device,
        capacity=CAPACITY,
        compute_dtype=dtype,
        weights_dtype=dtype,
        replicas=ranks.parallel.groups,
        lora=lora,
    )
    load_weights(model, base)
    load_adapters(model, adapter)
    return model


def on_a_rank(rank: int, root: str, cases: list[Case]) -> list[Found]:
    return [computed(Path(root), case) for case in cases]


def computed(root: Path, case: Case) -> Found:
    ranks = topology(case.dp, case.tp)
    base, adapter = root / case.family, root / f"{case.family}, {case.settings}"
    model = spread(ranks, base, adapter, case.dtype)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    before = {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}
    checks = compare(model, base, ranks, case.dtype, adapter)
    packs = [random_pack(model.config.vocab_size, seed) for seed in range(2 * case.dp)]
    tokens = sum(pack.trained_tokens for pack in packs)
    mine = packs[ranks.shard.index :: ranks.shard.count]
    train_step(model, optimizer, mine, ranks, trained_tokens=tokens, learning_rate=RATE, clip=None)
    touched = [
        name
        for name, p in model.named_parameters()
        if name in before and not (p.grad is None and p not in optimizer.state and torch.equal(whole(p), before[name]))
    ]
    pieces = trained_layout(model.config, model.lora)
    with torch.no_grad():
        return Found(checks, dict(unfused_pieces(pieces, dict(model.named_parameters()))), touched)


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of models of all families, and of adapters of `peft` whose `B` is not 0."""
    root = tmp_path_factory.mktemp("models")
    for family, settings in dict.fromkeys((case.family, case.settings) for case in CASES):
        keys = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | SETTINGS[settings]
        base = public_llama(**FAMILIES[family])
        base.save_pretrained(root / family)
        base.name_or_path = str(root / family)
        model = peft.get_peft_model(base, peft.LoraConfig(**keys, init_lora_weights=False, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / f"{family}, {settings}")
    return root


@pytest.fixture(scope="module")
def found(models: Path) -> dict[Case, list[Found]]:
    """Results of every rank, by case."""
    by_case: dict[Case, list[Found]] = {}
    for size in (1, 2, 4):
        cases = [case for case in CASES if case.dp * case.tp == size]
        by_case |= zip(
            cases, zip(*run_ranks(size, on_a_rank, str(models), cases, timeout=300), strict=True), strict=True
        )
    return by_case


@pytest.mark.parametrize("case", CASES, ids=Case.__str__)
def test_logits_loss_and_gradients_of_packed_conversations_equal_those_of_peft(
    case: Case, found: dict[Case, list[Found]]
) -> None:
    checks = found[case][0].checks
    assert [check for check in checks if not check.holds] == []
    subjects = [check.subject for check in checks]
    assert subjects[:3] == ["logits of packed conversations", "loss", "gradients"]
    assert subjects[-1] == "weights read and gathered that differ"
    if case.dtype == torch.float32:
        assert [check.limit for check in checks] == [1e-5, 1e-5, 1e-5, 0, 0]


@cache
def peft_step(models: Path, family: str, settings: str, dp: int) -> dict[str, torch.Tensor]:
    """Return the trained weights of `peft` after a step of AdamW on the same packs, each
    conversation computed alone."""
    base, adapter = models / family, models / f"{family}, {settings}"
    model = public_model(base, adapter, torch.float32, "eager")
    model.get_input_embeddings().padding_idx = None
    packs = [random_pack(model.config.vocab_size, seed) for seed in range(2 * dp)]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = sum(pack.trained_tokens for pack in packs)
    for pack in packs:
        lengths = pack.cu_seqlens.diff().tolist()
        for ids, labels in zip(pack.input_ids.split(lengths), pack.labels.split(lengths), strict=True):
            logits = model(input_ids=ids[None]).logits[0]
            (torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / tokens).backward()
    optimizer.step()
    return {public_name(name): p.detach() for name, p in trained}


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float32], ids=Case.__str__)
def test_a_step_of_adamw_equals_that_of_peft_and_leaves_the_base_as_it_is(
    case: Case, found: dict[Case, list[Found]], models: Path
) -> None:
    expected = peft_step(models, case.family, case.settings, case.dp)
    for rank in found[case]:
        assert rank.frozen == []
        assert rank.stepped.keys() == expected.keys()
        for name, tensor in expected.items():
            # A step is 0.01 long. AdamW divides by the size of a gradient, so rounding of tiny ones shows.
            assert (rank.stepped[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max() + 1e-5, name


def test_a_new_adapter_changes_no_bit_of_a_model_and_comes_from_the_seed() -> None:
    plain = built(TIED)
    models = [Llama(TIED, LoraConfig(rank=2)) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.load_state_dict(plain.state_dict(), strict=False)
        init_adapters(model, seed)
    pack = pack_of(9, 4, 11)
    for model in models:
        assert torch.equal(model(*pack[:3]), plain(*pack[:3]))
    first, same, other = ({n: p for n, p in model.named_parameters() if n.endswith(A)} for model in models)
    assert len(first) == 4 * TIED.num_hidden_layers
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name])
        bound = tensor.shape[1] ** -0.5
        assert 0.8 * bound < tensor.abs().max() <= bound


def test_the_rows_of_b_are_spread_as_in_the_worked_example() -> None:
    adapter = Adapter((Part("q_proj", 4), Part("k_proj", 2), Part("v_proj", 2)), ("q_proj", "v_proj"), 2, 1.0)
    b = torch.arange(1.0, 25.0).view(12, 2)  # two groups of 4 + 2 rows
    zeros = [0.0, 0.0]
    rows = b.tolist()
    group = [[r + zeros for r in rows[:4]], [zeros + zeros] * 2, [zeros + r for r in rows[4:6]]]
    second = [[r + zeros for r in rows[6:10]], [zeros + zeros] * 2, [zeros + r for r in rows[10:]]]
    assert adapter.spread(b).tolist() == [row for part in group + second for row in part]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_changes_no_bit_of_an_adapters_gradient(recompute: Recompute) -> None:
    gradients = []
    for way in ("none", recompute):
        model = Llama(TIED, LoraConfig(rank=2))
        init_weights(model, 0)
        init_adapters(model, 0)
        prepare_blocks(model, recompute=way, compiled=False)
        loss_of(model, pack_of(9, 4, 11)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_a_frozen_head_computes_no_gradient_of_its_weight() -> None:
    """Count the products of the size of the head's gradient, (64, 32), in a backward pass."""
    counts = []
    for saved in ((), ("lm_head",)):
        model = Llama(CONFIG, LoraConfig(modules_to_save=saved))
        init_weights(model, 0)
        init_adapters(model, 0)
        with Products() as products:
            loss_of(model, pack_of(9, 4, 11)).backward()
        counts.append(products.sizes.count((CONFIG.vocab_size, CONFIG.hidden_size)))
    assert counts == [0, 1]


def test_frozen_weights_get_no_gradient_and_cost_no_product_of_their_size() -> None:
    model = Llama(CONFIG, LoraConfig(rank=2))
    init_weights(model, 0)
    init_adapters(model, 0)
    with Products() as products:
        loss_of(model, pack_of(9, 4, 11)).backward()
    frozen = [tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.ndim == 2]
    assert frozen
    assert set(products.sizes).isdisjoint(frozen)


class Products(TorchDispatchMode):
    """Records the sizes of all products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.sizes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but only 'LORA' is supported"),
        ({"use_dora": True}, "use_dora is True, which is not supported: merge the adapter with peft's"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, which is not supported"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform is [0], which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not supported"),
        ({"target_modules": ["embed_tokens"]}, "Invalid enum value 'embed_tokens'"),
        ({"modules_to_save": ["norm"]}, "Invalid enum value 'norm'"),
        ({"r": 0}, "rank = 0 must be from 1 to 4096"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused_by_its_key(
    keys: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    stored = json.loads((models / f"{UNTIED}, all-linear" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | keys))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_adapter_config(tmp_path)
    assert str(tmp_path / "adapter_config.json") in str(error.value)


def test_a_damaged_or_foreign_adapter_is_refused_by_its_tensor(models: Path, tmp_path: Path) -> None:
    directory = models / f"{UNTIED}, all-linear"
    model = Llama(read_config(models / UNTIED), LoraConfig(rank=5))
    with pytest.raises(ValueError, match=r"down_proj.lora_A.weight has shape \[4, 48\], but .* imply \[5, 48\]"):
        load_adapters(model, directory)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        load_adapters(model, tmp_path)
    stored = load_file(directory / "adapter_model.safetensors")
    first = {name: tensor for name, tensor in stored.items() if ".layers.0." in name}
    save_file(first, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.lora_A.weight has shape none, but .* \[4, 48\]"):
        load_adapters(Llama(read_config(models / UNTIED), LoraConfig(rank=4)), tmp_path)
    save_file({name: tensor.to(torch.int8) for name, tensor in stored.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora_A.weight is stored as I8: use one of F64, F32, F16, BF16"):
        load_adapters(Llama(read_config(models / UNTIED), LoraConfig(rank=4)), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        load_adapters(model, tmp_path)


WAYS = {
    "gradients reduced after each pack": (2, ParallelConfig(reduce_gradients="pack")),
    "weights kept after the forward pass": (2, ParallelConfig(reshard_after_forward=False)),
    "two replicas": (2, ParallelConfig(replicas=2)),
    "two replicas of two shards": (4, ParallelConfig(replicas=2)),
    "two replicas of two tensor-parallel ranks": (4, ParallelConfig(replicas=2, tp=2)),
}


def steps_on_a_rank(rank: int, root: str, ways: list[ParallelConfig]) -> list[dict[str, torch.Tensor]]:
    return [two_steps(root, parallel) for parallel in ways]


def two_steps(root: str, parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """Return the trained weights after two steps of four packs on all ranks."""
    ranks = Topology(data_and_tensor_mesh("cpu", parallel), torch.device("cpu"), parallel)
    model = spread(ranks, Path(root) / UNTIED, Path(root) / f"{UNTIED}, head", torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig())
    for step in range(2):
        packs = [random_pack(model.config.vocab_size, 4 * step + number) for number in range(4)]
        tokens = sum(pack.trained_tokens for pack in packs)
        mine = packs[ranks.shard.index :: ranks.shard.count]
        train_step(model, optimizer, mine, ranks, trained_tokens=tokens, learning_rate=RATE, clip=1.0)
    with torch.no_grad():
        pieces = trained_layout(model.config, model.lora)
        return dict(unfused_pieces(pieces, dict(model.named_parameters())))


def test_every_way_to_spread_adapters_takes_the_steps_of_one_process(models: Path) -> None:
    ((expected,),) = run_ranks(1, steps_on_a_rank, str(models), [ParallelConfig()])
    for size in (2, 4):
        ways = [way for way, (ranks, _) in WAYS.items() if ranks == size]
        for rank in run_ranks(size, steps_on_a_rank, str(models), [WAYS[way][1] for way in ways]):
            for way, found in zip(ways, rank, strict=True):
                for name, tensor in expected.items():
                    assert (found[name] - tensor).abs().max() < 5e-5, (way, name)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_copies_of_frozen_weights_are_made_once_and_those_of_adapters_after_each_step(
    weights_dtype: torch.dtype,
) -> None:
    ((frozen, trained, dtypes),) = run_ranks(1, copied, weights_dtype)
    assert dtypes == {(False, weights_dtype), (True, torch.float32)}
    assert frozen == ([1, 0, 0] if weights_dtype == torch.float32 else [0, 0, 0])
    assert trained == [1, 1, 1]


def copied(rank: int, weights_dtype: torch.dtype) -> tuple[list[int], list[int], set[tuple[bool, torch.dtype]]]:
    """Count in three steps the copies of a frozen weight and of an adapter."""
    ranks = topology(1, 1)
    model = build(
        CONFIG,
        ranks.mesh,
        ranks.device,
        capacity=CAPACITY,
        compute_dtype=torch.bfloat16,
        weights_dtype=weights_dtype,
        lora=LoraConfig(),
    )
    init_weights(model, 0)
    init_adapters(model, 0)
    optimizer = build_optimizer(model, OptimizerConfig())
    watched = [model.get_parameter(f"blocks.0.mlp.down.{name}") for name in ("weight", "lora_A")]
    counts: tuple[list[int], list[int]] = ([], [])
    for step in range(3):
        pack = random_pack(CONFIG.vocab_size, step)
        with Copies() as copies:
            train_step(model, optimizer, [pack], ranks, trained_tokens=9, learning_rate=RATE, clip=None)
        for count, weight in zip(counts, watched, strict=True):
            count.append(copies.sources.count(weight.data_ptr()))
    return *counts, {(p.requires_grad, p.dtype) for p in model.parameters()}


class Copies(TorchDispatchMode):
    """Records the memory from which weights are cast to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._foreach_copy_:
            self.sources += [tensor.data_ptr() for tensor in args[1]]
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_compiled_adapters_stay_near_plain_ones_and_are_compiled_in_the_first_pass_only() -> None:
    gradients = []
    for compiled in (False, True):
        model = Llama(TIED, LoraConfig(rank=2))
        init_weights(model, 0)
        init_adapters(model, 0)
        prepare_blocks(model, recompute="none", compiled=compiled)
        loss_of(model, pack_of(9, 4, 11)).backward()
        with torch._dynamo.config.patch(error_on_recompile=compiled):
            loss_of(model, pack_of(10, 6, 5, 3)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_operations_of_a_step_count_4_for_a_frozen_weight_and_6_for_an_adapters() -> None:
    lora = LoraConfig(rank=2)
    model = Llama(CONFIG, lora)
    frozen = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1 and not p.requires_grad)
    adapters = sum(p.numel() for p in model.blocks.parameters() if p.requires_grad)
    attention = 6 * 1000 * 32 * CONFIG.num_hidden_layers
    head = 7 * 64 * 32
    needless = 4 * 3 * (32 * 32 + 3 * 32 * 48)  # after the attention of the last layer, for 3 tokens of 10
    expected = 10 * (4 * frozen + 6 * adapters) - needless + attention
    assert model_flops(CONFIG, 10, 7, 1000, lora) == expected + 4 * head
    saved = LoraConfig(rank=2, modules_to_save=("lm_head",))
    assert model_flops(CONFIG, 10, 7, 1000, saved) == expected + 6 * head


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_adapter_of_peft_is_written_back_with_the_same_bits(settings: str, models: Path, tmp_path: Path) -> None:
    directory = models / f"{UNTIED}, {settings}"
    lora, base = read_adapter_config(directory)
    model = Llama(read_config(models / UNTIED), lora)
    load_weights(model, models / UNTIED)
    load_adapters(model, directory)
    export_adapter(model, tmp_path / "ours", base)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "ours", directory))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    found, expected = (peft.LoraConfig.from_pretrained(path) for path in (tmp_path / "ours", directory))
    for key in ("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "task_type", "bias"):
        assert getattr(found, key) == getattr(expected, key), key
    assert set(found.target_modules) == {name.rpartition(".")[2] for name in expected.target_modules}
    assert set(found.modules_to_save or ()) == set(expected.modules_to_save or ())
    assert read_adapter_config(tmp_path / "ours").lora.identity == lora.identity


def judged(rank: int, adapter: str) -> int:
    return verdict(adapter, topology(1, 2), torch.float32)


def test_the_parity_command_compares_an_adapter_with_peft(models: Path) -> None:
    adapter = models / f"{UNTIED}, all-linear"
    assert run_ranks(2, judged, str(adapter)) == [0, 0]


def test_4_bits_without_bitsandbytes_are_refused_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=re.escape('needs bitsandbytes; run `pip install -e ".[qlora]"`')):
        quantize(torch.zeros(2, 64))
