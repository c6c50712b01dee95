"""Frozen weights in 4 bits have the numbers of bitsandbytes, on any topology. Needs bitsandbytes."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import peft
import pytest
import runs
import torch
from gloo_ranks import run_ranks
from safetensors.torch import load_file
from test_parity import topology
from tiny_llama import loss_of, pack_of, public_llama
from torch.autograd.graph import saved_tensors_hooks

from trainer.comparison import CAPACITY, Check, compare, random_pack
from trainer.config_file import parse_config
from trainer.estimate import estimate
from trainer.llama.blocks import prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.hf_config import read_config
from trainer.llama.lora.files import load_adapters, read_adapter_config
from trainer.llama.lora.layers import LoraConfig
from trainer.llama.lora.nf4 import count_weights, quantized, require_blocks
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import window
from trainer.llama.weights import layout, load_weights
from trainer.training.optimizer import OptimizerConfig, build_optimizer
from trainer.training.step import train_step

functional = pytest.importorskip("bitsandbytes.functional")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 512,  # more than 256 blocks of a matrix, which share a scale
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
FAMILIES = {"llama": {}, "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True}}
TOPOLOGIES = [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family, keys in FAMILIES.items():
        base = public_llama(**SIZES | keys)
        base.save_pretrained(root / family)
        base.name_or_path = str(root / family)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(base, lora).save_pretrained(root / f"{family} adapter")
    return root


def spread(root: Path, family: str, dp: int, tp: int) -> Llama:
    ranks = topology(dp, tp)
    lora = msgspec.structs.replace(read_adapter_config(root / f"{family} adapter").lora, quantize="nf4")
    model = build(read_config(root / family), ranks.mesh, ranks.device, capacity=CAPACITY, lora=lora)
    load_weights(model, root / family)
    load_adapters(model, root / f"{family} adapter")
    return model


def on_a_rank(rank: int, root: str, spreads: list[tuple[int, int]]) -> list[tuple[dict[str, list[Check]], int, float]]:
    return [computed(Path(root), dp, tp) for dp, tp in spreads]


def computed(root: Path, dp: int, tp: int) -> tuple[dict[str, list[Check]], int, float]:
    """Return the checks by family, the number of weights that differ from bitsandbytes, and the loss after a step."""
    ranks, checks, different = topology(dp, tp), {}, 0
    for family in FAMILIES:
        model = spread(root, family, dp, tp)
        optimizer = build_optimizer(model, OptimizerConfig())
        checks[family] = compare(model, root / family, ranks, torch.float32, root / f"{family} adapter")
        stored = load_file(root / family / "model.safetensors")
        pieces = layout(model.config)
        for name, weight in quantized(model).items():
            whole = torch.cat([restored(stored[p.tensor])[p.start : p.start + p.rows] for p in pieces[name]])
            rows, columns = window(weight.codes)
            mine = whole[rows, 2 * columns.start : 2 * columns.stop]
            different += int((weight.weight(torch.float32) != mine).sum())
        loss = 0.0
        for _ in range(3):
            packs = [random_pack(model.config.vocab_size, number) for number in range(2)]
            tokens = sum(pack.trained_tokens for pack in packs)
            mine = packs[ranks.shard.index :: ranks.shard.count]
            result = train_step(model, optimizer, mine, ranks, trained_tokens=tokens, learning_rate=1e-2, clip=1.0)
            loss = result.loss
    return checks, different, loss


def restored(weight: torch.Tensor) -> torch.Tensor:
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)


def test_weights_logits_loss_and_gradients_equal_those_of_peft_and_bitsandbytes(models: Path) -> None:
    losses = []
    for size in (1, 2, 4):
        spreads = [(dp, tp) for dp, tp in TOPOLOGIES if dp * tp == size]
        for number, ranks in enumerate(
            zip(*run_ranks(size, on_a_rank, str(models), spreads, timeout=300), strict=True)
        ):
            checks = [check for family in ranks[0][0].values() for check in family]
            assert len(checks) == 2 * 5
            assert [check for check in checks if not check.holds] == [], spreads[number]
            assert max(check.limit for check in checks) < 2e-5
            assert [different for _, different, _ in ranks] == [0] * size
            losses += [loss for _, _, loss in ranks]
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)


def test_the_backward_pass_makes_each_weight_again_and_keeps_none(models: Path) -> None:
    (shapes,) = run_ranks(1, on_one_rank, str(models))
    assert shapes
    assert (1024, 64) not in shapes
    assert (64, 512) not in shapes


def on_one_rank(rank: int, root: str) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a feed-forward keeps for its backward pass."""
    mlp = spread(Path(root), "llama", 1, 1).blocks[0].mlp
    found: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(torch.zeros(40, 64, requires_grad=True), torch.zeros(40, 64))
    return found


def test_compiled_and_recomputed_layers_in_4_bits_have_the_gradients_of_plain_layers(models: Path) -> None:
    ((found, expected),) = run_ranks(1, plain_and_compiled, str(models))
    assert len(found) == 2 * 8
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def plain_and_compiled(rank: int, root: str) -> list[dict[str, torch.Tensor]]:
    gradients = []
    for compiled in (True, False):
        model = spread(Path(root), "llama", 1, 1)
        for block in model.blocks if compiled else ():
            block.before = torch.compile(block.before, backend="aot_eager")
            block.after = torch.compile(block.after, backend="aot_eager")
        prepare_blocks(model, recompute="full" if compiled else "none", compiled=False)
        loss_of(model, pack_of(9, 4, 11)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    return gradients


def test_columns_that_are_not_whole_blocks_are_refused_by_their_size() -> None:
    shape = LlamaConfig(**SIZES, vocab_size=64, num_hidden_layers=1)
    require_blocks(shape, 2)
    with pytest.raises(
        ValueError,
        match=re.escape("num_attention_heads x head_dim / tp = 32; remove lora.quantize, or lower parallel.tp"),
    ):
        require_blocks(shape, 4)
    narrow = LlamaConfig(**SIZES | {"intermediate_size": 32}, vocab_size=64, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"intermediate_size = 32; remove lora\.quantize$"):
        require_blocks(narrow, 1)


def test_the_estimate_counts_the_bytes_of_the_codes_and_a_matrix_at_a_time() -> None:
    tables = runs.run_config("nowhere", "nowhere.jsonl", run={"steps": 1, "weights_dtype": "bfloat16"})
    tables |= {"model": {"init_from": "nowhere"}, "lora": {"rank": 4, "quantize": "nf4"}}
    tables["run"] |= {"recompute": "full", "compile": True}
    tables["data"] |= {"capacity": 4096, "global_batch": 1, "streams": 1}
    shape = LlamaConfig(**SIZES, vocab_size=512, num_hidden_layers=3)
    found = estimate(parse_config(tables), shape, 1)
    model = Llama(shape, LoraConfig(rank=4, quantize="nf4"))
    codes = sum(buffer.nbytes for buffer in model.buffers())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert found.memory["weights"] == codes + 2 * frozen + 4 * trained
    # bfloat16 copies of the adapters, and the fused gate and up projection
    assert found.memory["working weights"] == 2 * trained + 2 * 2 * 512 * 64
    plain = Llama(shape, LoraConfig(rank=4))
    assert (found.parameters, found.trained) == (count_weights(model), trained)
    assert found.parameters == sum(p.numel() for p in plain.parameters())
    matrices = sum(p.numel() for p in (*plain.blocks.parameters(), plain.head.weight) if p.ndim > 1)
    blocks = sum(p.numel() for p in plain.blocks.parameters() if p.ndim > 1)
    flops = 4096 * (4 * matrices + 2 * trained + 2 * blocks)
    assert found.seconds_per_step == pytest.approx(flops / (0.45 * 989e12))


def test_an_8b_model_in_4_bits_is_planned_below_14_gib() -> None:
    tables = runs.run_config("nowhere", "nowhere.jsonl", run={"steps": 1, "recompute": "full"})
    tables |= {"model": {"init_from": "nowhere"}, "lora": {"rank": 16, "quantize": "nf4"}}
    tables["data"] |= {"capacity": 4096, "global_batch": 1, "streams": 1}
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    memory = estimate(parse_config(tables), shape, 1).memory
    rows = 32 * (6144 + 4096 + 2 * 14336 + 4096)
    # 6.98e9 weights of 4.127 bits and 12 bytes for each row; embedding, head and norms in bfloat16; adapters in float32
    assert memory["weights"] == pytest.approx(
        6_979_321_856 * 4.127 / 8 + 12 * rows + 2 * 1_050_939_392 + 4 * 41_943_040, rel=1e-4
    )
    assert 8 * 2**30 < sum(memory.values()) < 14 * 2**30
