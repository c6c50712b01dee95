"""An estimate equals the memory, packs and steps of the run, exactly for countable parts."""

import io
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import runs
import torch
from rich.console import Console
from tiny_llama import CONFIG, TIED, loss_of, pack_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.activations import activations
from trainer.choices import with_memory_settings
from trainer.config import TrainConfig
from trainer.config_file import parse_config
from trainer.estimate import estimate, show
from trainer.llama.blocks import Recompute, prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.init import init_adapters, init_weights
from trainer.llama.lora.layers import LoraConfig
from trainer.llama.model import Llama
from trainer.main import main
from trainer.memory import memory
from trainer.out_of_memory import explained, out_of_memory

GIB = 2**30
LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
SHORT = msgspec.structs.replace(LLAMA_70B, num_hidden_layers=4)
"""A model with fewer layers, since wrapping takes time per layer."""
LLAMA_1B = msgspec.structs.replace(
    LLAMA_70B,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    tie_word_embeddings=True,
)

LLAMA_8B = msgspec.structs.replace(
    LLAMA_70B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
)


def config(**changes: dict[str, Any]) -> TrainConfig:
    tables: dict[str, dict[str, Any]] = {
        "run": {"steps": 1000, "weights_dtype": "float32", "recompute": "none"},
        "data": {
            "sources": [{"path": "nowhere.jsonl"}],
            "tokenizer": {"path": "nowhere"},
            "streams": 64,
            "capacity": 8192,
            "global_batch": 64,
        },
        "model": msgspec.to_builtins(LLAMA_70B),
        "parallel": {"tp": 8, "replicas": 1},
        "optimizer": {},
    }
    return parse_config({name: table | changes.get(name, {}) for name, table in tables.items()})


def memory_with_muon() -> int:
    return estimate(config(optimizer={"kind": "muon"}), LLAMA_70B, 32).memory["optimizer"]


def test_a_70b_model_is_estimated_without_a_gpu_a_weight_or_a_row() -> None:
    found = estimate(config(), LLAMA_70B, 32)
    assert found.parameters == 70_553_706_496
    assert (found.dp, found.packs_per_rank, found.tokens_per_step, found.steps) == (4, 16, 524_288, 1000)
    # The 161 norms of 8192 weights are sharded over dp only.
    held = (found.parameters - 161 * 8192) // 32 + 161 * 8192 // 4
    assert found.memory["weights"] == 4 * held
    assert found.memory["optimizer"] == 8 * held
    # Muon has one mean for the matrices of the blocks; embedding and head have two.
    ends = 2 * 128256 * 8192
    matrices = (found.parameters - 161 * 8192 - ends) // 32
    assert memory_with_muon() == 8 * held - 4 * matrices
    assert found.memory["gradients"] == 4 * ((found.parameters - 161 * 8192) // 8 + 161 * 8192)
    # 6 operations per weight and token, except for the embedding, which is a lookup.
    flops = 6 * 524_288 * (found.parameters - 161 * 8192 - 128256 * 8192)
    assert found.seconds_per_step == pytest.approx(flops / (32 * 0.45 * 989e12))


def test_the_examples_fit_gpus_of_80_gib() -> None:
    sizes = {
        "one_gpu": (2048, 8192, 16, 32),
        "eight_gpus": (4096, 14336, 32, 32),
        "several_nodes": (8192, 28672, 80, 64),
    }
    for (name, (hidden, wide, layers, heads)), gpus in zip(sizes.items(), (1, 8, 32), strict=True):
        table = tomllib.loads((Path(__file__).parents[2] / "examples" / f"{name}.toml").read_text())
        table["run"] = {key: value for key, value in table["run"].items() if key != "epochs"} | {"steps": 1000}
        table["schedule"]["over"] = "steps"
        shape = msgspec.structs.replace(
            LLAMA_70B,
            hidden_size=hidden,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            tie_word_embeddings=gpus == 1,
        )
        memory = estimate(parse_config(table), shape, gpus).memory
        assert 20 * GIB < sum(memory.values()) < 70 * GIB, name


@pytest.mark.parametrize(
    ("changes", "part", "factor"),
    [
        ({"run": {"weights_dtype": "bfloat16"}}, "weights", 1 / 2),
        ({"run": {"weights_dtype": "bfloat16"}}, "optimizer", 1 / 2),
        ({"run": {"compute_dtype": "float32"}}, "activations", 2),
        ({"run": {"compute_dtype": "float32"}}, "head", 2),
        ({"parallel": {"tp": 8, "replicas": 2}}, "weights", 2),
        ({"parallel": {"tp": 8, "reduce_gradients": "pack"}}, "gradients", 1 / 4),
        ({"data": {"global_batch": 4}}, "gradients", 1 / 4),
        ({"data": {"capacity": 4096}}, "activations", 1 / 2),
    ],
    ids=str,
)
def test_each_setting_changes_its_own_part_of_the_memory(
    changes: dict[str, dict[str, Any]], part: str, factor: float
) -> None:
    before, after = estimate(config(), SHORT, 32), estimate(config(**changes), SHORT, 32)
    assert after.memory[part] == pytest.approx(factor * before.memory[part])


@pytest.mark.parametrize(
    ("streams", "global_batch", "packs"),
    [
        (64, 64, 16),
        (4, 8, 2),
        (6, 8, 3),  # Packs 0 to 7 come from streams 0 to 5, 0 and 1; streams 0 and 4 are the first rank's.
        (5, 4, 2),  # Packs 4 to 7 come from streams 4, 0, 1, 2: two of them on the first rank.
        (64, 2, 1),
    ],
)
def test_packs_per_rank_are_counted_in_the_fullest_step(streams: int, global_batch: int, packs: int) -> None:
    found = estimate(config(data={"streams": streams, "global_batch": global_batch}), SHORT, 32)
    assert found.packs_per_rank == packs
    assert found.seconds_per_step == pytest.approx(estimate(config(), SHORT, 32).seconds_per_step * packs / 16)


def test_gathered_weights_and_recomputed_activations_change_the_estimate() -> None:
    kept = estimate(config(parallel={"tp": 8, "reshard_after_forward": False}), LLAMA_70B, 32)
    # All weights of a tensor-parallel share in bfloat16.
    assert kept.memory["working weights"] == kept.memory["gradients"] // 2
    assert kept.memory["working weights"] > 10 * estimate(config(), LLAMA_70B, 32).memory["working weights"]
    ways = [estimate(config(run={"recompute": way}), LLAMA_70B, 32) for way in ("none", "selective", "full")]
    assert [way.memory["activations"] for way in ways] == sorted((w.memory["activations"] for w in ways), reverse=True)
    assert [way.seconds_per_step for way in ways] == sorted(way.seconds_per_step for way in ways)
    assert ways[2].seconds_per_step / ways[0].seconds_per_step == pytest.approx(4 / 3, rel=0.02)


def kept_by_layers(shape: LlamaConfig, recompute: Recompute, tokens: int, lora: LoraConfig | None = None) -> int:
    """Count the elements that the forward pass of all layers but two keeps for the backward pass.

    The first layer keeps less if no gradient passes it, and the last is not recomputed.
    """
    kept = []
    for layers in (2, shape.num_hidden_layers):
        model = Llama(msgspec.structs.replace(shape, num_hidden_layers=layers), lora)
        init_weights(model, 0)
        init_adapters(model, 0)
        prepare_blocks(model, recompute=recompute, compiled=False)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:  # noqa: B023 - called within this turn
                storages[storage.data_ptr()] = storage.nbytes() // 4  # noqa: B023
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(model, pack_of(tokens))
        kept.append(sum(storages.values()))
        del loss
    return kept[1] - kept[0]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", [CONFIG, msgspec.structs.replace(TIED, head_dim=16, intermediate_size=128)])
def test_activations_equal_the_elements_that_autograd_keeps(shape: LlamaConfig, recompute: Recompute) -> None:
    deep = msgspec.structs.replace(shape, num_hidden_layers=5)
    expected = sum(activations(deep, 64, 1, recompute))
    expected -= sum(activations(msgspec.structs.replace(shape, num_hidden_layers=2), 64, 1, recompute))
    # A CPU also keeps each norm's scale and scaled input, attention's output per head, and
    # softmax's sums.
    besides = 2 * (shape.hidden_size + 1) + shape.num_attention_heads * (shape.head_size + 1)
    assert kept_by_layers(deep, recompute, 64) == expected + (0 if recompute == "full" else 3 * 64 * besides)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
@pytest.mark.parametrize("shape", [CONFIG, msgspec.structs.replace(TIED, head_dim=16, intermediate_size=128)])
def test_activations_under_adapters_equal_the_elements_that_autograd_keeps(
    shape: LlamaConfig, targets: Any, recompute: Recompute
) -> None:
    lora = LoraConfig(rank=3, targets=targets)
    deep = msgspec.structs.replace(shape, num_hidden_layers=5)
    expected = sum(activations(deep, 64, 1, recompute, lora))
    expected -= sum(activations(msgspec.structs.replace(shape, num_hidden_layers=2), 64, 1, recompute, lora))
    # A CPU also keeps each norm's scale and softmax's sums, for an adapter attention's output per
    # head, and of each fused layer the spread matrix B, which no token multiplies.
    besides = 2 + shape.num_attention_heads * (1 + (shape.head_size if targets == "all-linear" else 0))
    block = Llama(shape, lora).blocks[0]
    fused = (block.attention.qkv, block.mlp.gate_up) if recompute == "none" else (block.attention.qkv,)
    spread = sum(layer.adapter.spread(layer.lora_B).numel() for layer in fused if layer.adapter)
    kept = kept_by_layers(deep, recompute, 64, lora)
    assert kept == expected + (0 if recompute == "full" else 3 * (64 * besides + spread))


def test_adapters_shrink_all_but_the_activations_and_the_frozen_weights_of_an_8b_model() -> None:
    shape = msgspec.structs.replace(LLAMA_70B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    shape = msgspec.structs.replace(shape, num_attention_heads=32)
    tables = {"run": {"weights_dtype": "auto", "recompute": "auto"}, "parallel": {"tp": 1}, "data": {"global_batch": 1}}
    tables |= {"model": {"init_from": "nowhere"}, "lora": {"rank": 16}}
    found = estimate(adapting(**tables), shape, 1)
    assert (found.parameters - found.trained, found.trained) == (8_030_261_248, 41_943_040)
    assert found.config.run.weights_dtype == "bfloat16"
    assert found.memory["weights"] == 2 * 8_030_261_248 + 4 * 41_943_040
    assert found.memory["optimizer"] == 8 * 41_943_040
    assert found.memory["gradients"] == 4 * 41_943_040
    assert found.memory["working weights"] == 2 * 41_943_040  # bfloat16 copies of the adapters
    assert found.memory["head"] == 4096 * 128256 * 2
    # 4 operations for a frozen weight, 6 for an adapter's, none for the embedding and the norms.
    frozen = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert found.config.run.recompute == "none"
    flops = 8192 * (4 * frozen + 6 * 41_943_040)
    assert found.seconds_per_step == pytest.approx(flops / (0.45 * 989e12))
    with_head = estimate(adapting(**tables | {"lora": {"rank": 16, "modules_to_save": ["lm_head"]}}), shape, 1)
    assert with_head.trained == found.trained + 128256 * 4096
    assert with_head.memory["head"] == found.memory["head"] + 2 * 128256 * 4096


def test_the_readme_names_the_planned_memory_of_its_example() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    given = with_memory_settings(parse_config(tomllib.loads(block)), LLAMA_1B, 1, 80 * GIB)
    planned = sum(memory(given, LLAMA_1B, 1).values()) / GIB
    assert f"needs about {planned:.0f} GiB" in text


def adapting(**changes: dict[str, Any]) -> TrainConfig:
    tables = msgspec.to_builtins(config(**{name: changes[name] for name in ("run", "data", "parallel")}))
    for key in ("seed", "epochs", "skip"):
        tables["data"].pop(key)
    return parse_config(tables | {"model": changes["model"], "lora": changes["lora"]})


def test_steps_of_epochs_are_counted_from_the_data(tmp_path: Path, tokenizer: str) -> None:
    tables = runs.run_config(tokenizer, runs.sources(tmp_path, 400))  # the ends of streams count little
    del tables["run"]["steps"]
    tables["run"]["epochs"] = 3
    runs.run(tmp_path, tables)
    steps = len(runs.metrics(tmp_path))
    planned = parse_config(tables)
    assert planned.model.shape is not None
    assert estimate(planned, planned.model.shape, 1).steps == pytest.approx(steps, rel=0.1)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A directory with only a run's config, without data or tokenizer."""
    tables = runs.run_config("nowhere", "nowhere.jsonl", parallel={"tp": 2})
    (tmp_path / "run.toml").write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in tables.items()))
    return tmp_path


def test_one_gpu_holds_copies_to_compute_with_and_at_most_one_gib_of_logits() -> None:
    single = {"parallel": {"tp": 1}, "data": {"capacity": 16384, "global_batch": 1}}
    weights = 1_235_814_400
    for dtype, copies in (("float32", 2), ("bfloat16", 0)):
        found = estimate(config(run={"weights_dtype": dtype}, **single), LLAMA_1B, 1).memory
        assert found["working weights"] == copies * weights
        # Four chunks of 4,096 tokens, and the gradient of the head's weight.
        assert found["head"] == 4096 * 128256 * 2 + 128256 * 2048 * 2
    found = estimate(config(parallel={"tp": 1}, data={"capacity": 16384}), LLAMA_1B, 1).memory
    assert found["gradients"] == 4 * weights
    assert found["not held together"] == 0  # the gradients of the first pack stay


@pytest.mark.parametrize(
    ("shape", "tokens", "run", "lora", "measured", "error"),
    [
        (LLAMA_1B, 16384, {"recompute": "none"}, None, 26.6, 0.03),
        (LLAMA_1B, 16384, {"recompute": "none", "weights_dtype": "float32"}, None, 35.8, 0.03),
        (LLAMA_8B, 8192, {"recompute": "none"}, None, 79.5, 0.03),
        (LLAMA_8B, 8192, {"recompute": "none", "float8": True}, None, 77.0, 0.06),
        (LLAMA_8B, 16384, {"recompute": "full"}, None, 61.8, 0.03),
        (LLAMA_8B, 8192, {"recompute": "none"}, {}, 49.3, 0.04),
        (LLAMA_8B, 16384, {"recompute": "full"}, {}, 22.8, 0.03),
        (LLAMA_8B, 4096, {"recompute": "full"}, {"quantize": "nf4"}, 8.0, 0.1),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_peak_on_a_gpu(
    shape: LlamaConfig, tokens: int, run: dict[str, Any], lora: dict[str, Any] | None, measured: float, error: float
) -> None:
    """The peaks of one pack a step on an H200, in GiB, from benchmarks/gpu/train_step.md."""
    tables = {"run": {"weights_dtype": "bfloat16"} | run, "data": {"capacity": tokens, "global_batch": 1}}
    given = config(**tables, parallel={"tp": 1})
    if lora is not None:
        model = msgspec.structs.replace(given.model, init_from="a-model", shape=None)
        given = msgspec.structs.replace(given, model=model, lora=msgspec.convert(lora, LoraConfig))
    assert sum(memory(given, shape, 1).values()) / GIB == pytest.approx(measured, rel=error)


@pytest.mark.parametrize(
    ("size", "changes", "dtype", "way"),
    [
        (200, {}, "float32", "none"),
        (36, {}, "float32", "selective"),
        (25, {}, "float32", "full"),
        (15, {}, "bfloat16", "full"),
        (1, {}, "bfloat16", "full"),
        (44, {"weights_dtype": "bfloat16"}, "bfloat16", "none"),
        (36, {"recompute": "none"}, "bfloat16", "none"),
    ],
)
def test_memory_decides_weights_and_recomputation_in_a_fixed_order(
    size: int, changes: dict[str, str], dtype: str, way: str
) -> None:
    automatic = {"weights_dtype": "auto", "recompute": "auto"} | changes
    given = config(run=automatic, parallel={"tp": 1}, data={"capacity": 16384, "global_batch": 1})
    found = with_memory_settings(given, LLAMA_1B, 1, size * GIB).run
    assert (found.weights_dtype, found.recompute) == (dtype, way)


def assert_shown(output: str, gpus: int) -> None:
    assert f"runs/run: 51,360 parameters on {gpus} GPUs (dp {gpus // 2} x tp 2)" in output
    for part in ("weights", "optimizer", "gradients", "working weights", "activations", "head", "total"):
        assert part in output
    assert f"{math.ceil(8 / gpus)} on each data-parallel rank" in output
    assert "10 steps, 10,240 tokens: about" in output


def test_the_command_prints_the_estimate_and_writes_no_file(written: Path) -> None:
    words = [sys.executable, "-m", "trainer.main", "run.toml", "--plan=8"]
    result = subprocess.run(words, cwd=written, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert_shown(result.stdout, 8)
    assert [path.name for path in written.iterdir()] == ["run.toml"]


def test_the_estimate_is_for_the_running_processes_by_default(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([str(written / "run.toml"), "--plan"]) == 0
    assert_shown(capsys.readouterr().out, 2)
    monkeypatch.setenv("RANK", "1")
    assert main([str(written / "run.toml"), "--plan"]) == 0
    assert capsys.readouterr().out == ""
    assert [path.name for path in written.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("size", "way", "replicas", "frees"),
    [
        (90, "none", 2, False),
        (80, "none", 1, False),
        (70, "none", 1, True),
        (60, "selective", 1, False),
        (50, "selective", 1, True),
    ],
)
def test_all_weights_and_else_gathered_weights_are_kept_where_they_fit_before_any_activation_is_recomputed(
    size: int, way: str, replicas: int, frees: bool
) -> None:
    given = config(
        run={"weights_dtype": "bfloat16", "recompute": "auto"},
        parallel={"tp": 1, "replicas": "auto"},
        data={"capacity": 8192, "global_batch": 2},
    )
    found = with_memory_settings(given, LLAMA_8B, 2, size * GIB)
    assert (found.run.recompute, *_spread(found)) == (way, replicas, frees)
    again = with_memory_settings(given, LLAMA_8B, 2, 100 * GIB, least="full")
    assert (again.run.recompute, *_spread(again)) == ("full", 2, False)
    sharded = msgspec.structs.replace(given, parallel=msgspec.structs.replace(given.parallel, replicas=1))
    assert _spread(with_memory_settings(sharded, LLAMA_8B, 2, 100 * GIB)) == (1, False)


@pytest.mark.parametrize(
    ("tables", "gpus", "before", "size", "replicas"),
    [
        ({}, 2, None, 90, 2),
        ({}, 2, 1, 90, 1),  # a checkpoint of sharded weights
        ({}, 2, 2, 80, 1),  # a checkpoint of replicas, on GPUs that have no room for them
        ({}, 4, None, 200, 1),
        ({}, 4, 4, 200, 4),
        ({"run": {"weights_dtype": "float32"}}, 2, None, 200, 1),
        ({"parallel": {"reduce_gradients": "pack"}}, 2, None, 200, 1),
        ({"parallel": {"tp": 2}}, 4, None, 200, 1),
        ({"lora": {}}, 4, None, 90, 4),
        ({"lora": {}}, 8, None, 40, 1),
        ({"parallel": {"replicas": 2}}, 4, None, 40, 2),
    ],
)
def test_replicas_are_chosen_where_they_are_faster_and_fit(
    tables: dict[str, Any], gpus: int, before: int | None, size: int, replicas: int
) -> None:
    run = {"weights_dtype": "bfloat16"} | tables.get("run", {})
    parallel = {"tp": 1, "replicas": "auto"} | tables.get("parallel", {})
    data = {"capacity": 8192, "global_batch": gpus}
    given = config(**tables | {"run": run, "parallel": parallel, "data": data})
    if "lora" in tables:
        model = msgspec.structs.replace(given.model, init_from="nowhere", shape=None)
        given = msgspec.structs.replace(given, model=model, lora=LoraConfig())
    found = with_memory_settings(given, LLAMA_8B, gpus, size * GIB, replicas=before)
    assert found.parallel.replicas == replicas


def _spread(config: TrainConfig) -> tuple[int | str, bool | str]:
    return config.parallel.replicas, config.parallel.reshard_after_forward


def test_unsharded_replicas_have_the_memory_of_a_single_gpu() -> None:
    tables = {"run": {"weights_dtype": "bfloat16", "recompute": "none"}}
    alone = memory(config(**tables, parallel={"tp": 1}, data={"global_batch": 4}), LLAMA_8B, 1)
    spread = memory(config(**tables, parallel={"tp": 1, "replicas": 2}, data={"global_batch": 8}), LLAMA_8B, 2)
    assert spread == alone


@pytest.mark.parametrize(("given", "kept"), [("auto", True), (False, True), (True, False)])
def test_the_plan_says_whether_gathered_weights_are_kept(given: bool | str, kept: bool) -> None:
    parallel = {"tp": 1, "replicas": 1, "reshard_after_forward": given}
    tables = config(parallel=parallel, data={"capacity": 8192, "global_batch": 2})
    output = io.StringIO()
    show(estimate(tables, LLAMA_1B, 2), tables, Console(file=output, width=200))
    assert ("gathered weights kept for a step" in output.getvalue()) == kept


@pytest.mark.parametrize("flag", ["--plan=many", "--plan=0", "--plan=-8", "--plan=100000"])
def test_an_invalid_number_of_gpus_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 1
    assert f"error: {flag}: give a number of GPUs from 1 to 99999, as in --plan=32" in capsys.readouterr().err


def test_an_estimate_of_a_run_that_cannot_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tp = 8 does not divide the 12 processes"):
        estimate(config(), LLAMA_70B, 12)
    with pytest.raises(ValueError, match="tp = 2 does not divide the 5 processes of this run; start a multiple of 2"):
        estimate(config(parallel={"tp": 2, "replicas": "auto"}), LLAMA_70B, 5)
    with pytest.raises(ValueError, match="tp 16 does not divide num_key_value_heads 8"):
        estimate(config(parallel={"tp": 16}), LLAMA_70B, 32)
    with pytest.raises(ValueError, match="streams = 64 is too low for 128 shards, which need a stream each"):
        estimate(config(), LLAMA_70B, 1024)


def test_out_of_memory_names_the_changes_with_the_memory_of_the_plan() -> None:
    before = config(run={"recompute": "none", "weights_dtype": "float32"}, parallel={"tp": 8})
    line = out_of_memory(before, SHORT, 32, (80 * GIB, 60 * GIB, 78 * GIB))
    total = sum(memory(before, SHORT, 32).values())
    assert line.startswith(
        f"a GPU ran out of memory: the plan of the run is {total / GIB:.1f} GiB on each GPU (weights "
    )
    assert "; the GPU has 80.0 GiB, 60.0 GiB of them in tensors of this process; use " in line
    assert "expandable_segments:True in the environment, since 18.0 GiB are reserved in pieces" in line
    changes: dict[str, dict[str, dict[str, Any]]] = {
        'run.recompute = "selective"': {"run": {"recompute": "selective"}},
        'run.recompute = "full"': {"run": {"recompute": "full"}},
        'parallel.reduce_gradients = "pack"': {"parallel": {"reduce_gradients": "pack"}},
        'run.weights_dtype = "bfloat16" in a new run': {"run": {"weights_dtype": "bfloat16"}},
        "data.capacity = 4096 in a new run, which refuses longer conversations": {"data": {"capacity": 4096}},
    }
    for text, tables in changes.items():
        run = {"recompute": "none", "weights_dtype": "float32"} | tables.get("run", {})
        after = config(run=run, parallel={"tp": 8} | tables.get("parallel", {}), data=tables.get("data", {}))
        needed = sum(memory(after, SHORT, 32).values())
        assert needed < total
        assert f"{text} ({needed / GIB:.1f} GiB)" in line
    assert f"64 GPUs ({sum(memory(before, SHORT, 64).values()) / GIB:.1f} GiB)" in line


def test_out_of_memory_of_replicas_names_sharded_weights_first_and_no_more_gpus() -> None:
    tables = {"run": {"recompute": "none", "weights_dtype": "bfloat16"}, "data": {"global_batch": 4}}
    before = config(**tables, parallel={"tp": 1, "replicas": 2})
    needed = sum(memory(config(**tables, parallel={"tp": 1}), LLAMA_8B, 2).values()) / GIB
    line = out_of_memory(before, LLAMA_8B, 2)
    assert f"; use parallel.replicas = 1 ({needed:.1f} GiB), or run.recompute" in line
    assert "GPUs" not in line


def test_out_of_memory_names_no_change_that_saves_nothing() -> None:
    least = config(
        run={"recompute": "full", "weights_dtype": "bfloat16"}, parallel={"tp": 8, "reduce_gradients": "pack"}
    )
    line = out_of_memory(least, SHORT, 32)
    assert not any(
        name in line for name in ("run.recompute", "weights_dtype", "reduce_gradients", "reshard", "the GPU has")
    )


def test_an_error_of_memory_becomes_the_line_and_other_errors_pass(ranks_of_one: None) -> None:
    chosen = config(run={"recompute": "none", "weights_dtype": "float32"}, parallel={"tp": 1})
    with (
        pytest.raises(ValueError, match=r"^a GPU ran out of memory: the plan of the run is [0-9.]+ GiB") as raised,
        explained(chosen, SHORT, torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(RuntimeError, match=r"^another$"), explained(chosen, SHORT, torch.device("cpu")):
        raise RuntimeError("another")


@pytest.fixture
def ranks_of_one() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
