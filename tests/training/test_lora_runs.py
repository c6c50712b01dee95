"""A run trains adapters alone: checkpoints, resumes, topologies, exports and refusals."""

from __future__ import annotations

import json
import random
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import runs
import tiny
import torch
import transformers
from safetensors.torch import load_file
from test_kill import compare
from test_run_ends import fails, store
from tiny_llama import public_llama
from typer.testing import CliRunner

from checkpoints import weight_digests
from checkpoints.cli.main import app, main
from trainer.checkpointing.settings import Settings, carry_over
from trainer.config import ModelConfig
from trainer.config_file import parse_config
from trainer.llama.hf_config import read_config
from trainer.llama.lora.layers import LoraConfig
from trainer.training.evaluation import generate
from trainer.training.model import ModelSource, find_source

RANK = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face model in two files."""
    directory = tmp_path_factory.mktemp("base")
    public_llama(vocab_size=512, num_key_value_heads=2, num_attention_heads=4).save_pretrained(
        directory, max_shard_size="100KB"
    )
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


@pytest.fixture
def config(tmp_path: Path, tokenizer: str, base: Path) -> dict[str, Any]:
    return adapting(tmp_path, tokenizer, base)


def adapting(directory: Path, tokenizer: str, base: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    tables = runs.run_config(tokenizer, runs.sources(directory), lora=RANK, **changes)
    return tables | {"model": {"init_from": str(base)}}


class Finished:
    """A finished run of ten steps."""

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self.directory, self.config = directory, config
        self.output = runs.run(directory, config).output()
        self.export, self.adapter = directory / "runs/run/export", directory / "runs/run/adapter"
        self.step = directory / "runs/run/checkpoints/step-00000010"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: str, base: Path) -> Finished:
    directory = tmp_path_factory.mktemp("finished")
    lora = RANK | {"modules_to_save": ["lm_head"], "rank_stabilized": True}
    return Finished(directory, adapting(directory, tokenizer, base) | {"lora": lora})


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(400, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits


def test_a_run_trains_adapters_alone_and_says_so(finished: Finished, base: Path) -> None:
    losses = [line["loss"] for line in runs.metrics(finished.directory)]
    assert losses[-1] < 0.9 * losses[0]
    head = 512 * 32
    adapters = 2 * 4 * (3 * 32 + (32 + 2 * 16) + (32 + 32) + 2 * 32 + 2 * 48 + (48 + 32))
    assert f"{head + adapters:,} of them trained" in finished.output
    held = store(finished.directory).manifest(10).tensors
    trained = {name.removeprefix("model.") for name in held if name.startswith("model.")}
    assert {name.rpartition(".")[2] for name in trained - {"head.weight"}} == {"lora_A", "lora_B"}
    moments = {name.split(".", 2)[2].rpartition(".")[0] for name in held if name.startswith("optimizer.state")}
    assert moments == trained
    merged, first = load_file(finished.export / "model.safetensors"), read(base)
    changed = {name for name, tensor in first.items() if not torch.equal(tensor, merged[name])}
    assert changed == {name for name in first if "proj" in name or name == "lm_head.weight"}


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_peft_loads_the_adapter_and_computes_what_the_merged_model_computes(finished: Finished, base: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    adapted = peft.PeftModel.from_pretrained(plain, finished.adapter)
    merged = transformers.AutoModelForCausalLM.from_pretrained(finished.export)
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-5, rtol=1e-5)
    assert (logits(merged) - before).abs().max() > 0.1
    stored = json.loads((finished.adapter / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["use_rslora"]) == (4, 8, True)
    assert (stored["base_model_name_or_path"], stored["modules_to_save"]) == (str(base), ["lm_head"])
    # transformers finds the base by the adapter's config, and the tokenizer lies beside the adapter
    whole = transformers.AutoModelForCausalLM.from_pretrained(finished.adapter)
    torch.testing.assert_close(logits(whole), logits(merged), atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(finished.adapter).chat_template


def test_a_checkpoint_is_exported_as_the_files_of_the_runs_end(finished: Finished, tmp_path: Path) -> None:
    for name, words in (("adapter", []), ("export", ["--merged"])):
        result = CliRunner().invoke(app, ["export", str(finished.step), str(tmp_path / name), *words])
        assert result.exit_code == 0, result.output
        assert contents(tmp_path / name) == contents(finished.directory / "runs/run" / name)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_merged_export_needs_the_base_of_the_run(
    finished: Finished, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(base, moved)
    shutil.copytree(base, other)
    spoil(other)
    with pytest.raises(SystemExit, match=r"is another file than the run's .*; name the model of the run with --base"):
        main(["export", str(finished.step), str(tmp_path / "out"), "--merged", f"--base={other}"])
    with pytest.raises(SystemExit, match=r"model-00001.* cannot be read: No such file .*; name .* model with --base"):
        main(["export", str(finished.step), str(tmp_path / "out"), "--merged", f"--base={tmp_path / 'none'}"])
    with pytest.raises(SystemExit, match="--base names the model under adapters; give --merged as well"):
        main(["export", str(finished.step), str(tmp_path / "out"), f"--base={moved}"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["export", str(finished.step), str(tmp_path / "out"), "--merged", f"--base={moved}"])
    assert contents(tmp_path / "out") == contents(finished.export)


def spoil(directory: Path) -> None:
    """Change one number in the middle of a weight file."""
    path = sorted(directory.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_kills_leave_no_trace_in_a_run_of_adapters(tmp_path: Path, config: dict[str, Any]) -> None:
    compare(tmp_path, config, processes=1, draw=random.Random(0), kills=2)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "tp"), [(2, 2), (2, 1), (4, 2)])
def test_kills_leave_no_trace_in_a_run_of_adapters_on_several_ranks(
    processes: int, tp: int, tmp_path: Path, config: dict[str, Any]
) -> None:
    compare(tmp_path, config | {"parallel": {"tp": tp}}, processes, random.Random(processes + tp), kills=3)


@pytest.mark.slow
def test_adapters_go_on_in_any_topology_with_the_same_batches(tmp_path: Path, config: dict[str, Any]) -> None:
    runs.run(_directory(tmp_path / "whole"), config)
    hops = _directory(tmp_path / "hops")
    for steps, processes, tp in ((2, 1, 1), (4, 2, 2), (6, 4, 2), (8, 2, 1), (10, 1, 1)):
        config["run"] |= {"steps": steps}
        runs.run(hops, config | {"parallel": {"tp": tp}}, processes)
    whole, hopped = runs.metrics(tmp_path / "whole"), runs.metrics(hops)
    assert [line["batch_digest"] for line in hopped] == [line["batch_digest"] for line in whole]
    assert [line["loss"] for line in hopped] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    ours, expected = (load_file(d / "runs/run/adapter/adapter_model.safetensors") for d in (hops, tmp_path / "whole"))
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() < 1e-3, name


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_resume_on_another_base_is_refused_by_name_and_on_a_moved_base_is_not(
    tmp_path: Path, config: dict[str, Any], base: Path
) -> None:
    ours = tmp_path / "model"
    shutil.copytree(base, ours)
    config["model"]["init_from"] = str(ours)
    config["run"]["steps"] = 2
    runs.run(tmp_path, config)
    config["run"]["steps"] = 4
    spoil(ours)
    message = fails(tmp_path, config)
    assert "the checkpoint of step 2 was made with other settings" in message
    assert "model.init_from.model-00001-of-" in message
    config["model"]["init_from"] = str(base)
    assert "resuming after step 2" in runs.run(tmp_path, config).output()


@pytest.mark.parametrize(
    ("lora", "difference"),
    [
        ({"rank": 8}, "lora.rank: 4 -> 8"),
        ({"alpha": 9.0}, "lora.alpha: 8.0 -> 9.0"),
        ({"targets": ["q_proj"]}, "lora.targets[1]: 'k_proj' -> None"),
        ({"rank_stabilized": True}, "lora.rank_stabilized: False -> True"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save[0]: None -> 'lm_head'"),
        (None, "lora: {"),
    ],
)
def test_a_resume_needs_the_adapters_of_the_checkpoint(
    lora: dict[str, Any] | None, difference: str, finished: Finished, base: Path
) -> None:
    saved = settings(finished.config | {"lora": RANK}, base)
    now = settings(finished.config | {"lora": lora and RANK | lora}, base)
    with pytest.raises(ValueError, match=re.escape(difference)) as error:
        carry_over(saved, now, 2, ())
    assert "the checkpoint of step 2 was made with other settings" in str(error.value)
    assert "model.init_from" not in str(error.value)


def test_a_resume_may_spell_the_same_adapters_otherwise_and_export_other_files(finished: Finished, base: Path) -> None:
    layers = ["down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    saved, now = (
        settings(finished.config | {"lora": RANK | keys}, base)
        for keys in ({}, {"targets": layers, "export_merged": False})
    )
    assert carry_over(saved, now, 2, ()).accepted is msgspec.UNSET
    assert msgspec.convert(msgspec.to_builtins(saved), Settings) == saved


def test_a_resume_needs_every_byte_of_the_base(finished: Finished, base: Path) -> None:
    saved = settings(finished.config, base)  # its digest of samples may miss a change in a large file
    before, after = (msgspec.structs.replace(saved, base={"model.safetensors": digest}) for digest in ("a", "b"))
    with pytest.raises(ValueError, match=r"model\.init_from\.model\.safetensors: 'a' -> 'b'"):
        carry_over(before, after, 2, ())
    held = store(finished.directory).values(10, "settings")["settings"]["base"]
    assert held == weight_digests(sorted(base.glob("*.safetensors")))


def settings(tables: dict[str, Any], base: Path) -> Settings:
    tables = {name: table for name, table in tables.items() if table is not None}
    chosen = tables | {"run": tables["run"] | {"compile": False}}
    return Settings.of(parse_config(chosen), ModelSource(read_config(base), base), torch.float32)


def test_a_run_goes_on_from_an_adapter(finished: Finished, tmp_path: Path, tokenizer: str) -> None:
    lora = finished.config["lora"]
    runs.run(tmp_path, adapting(tmp_path, tokenizer, finished.adapter, run={"steps": 2}) | {"lora": lora})
    # the batch of the first step is that of the first run, whose adapters were new
    assert runs.digests(tmp_path)[0] == runs.digests(finished.directory)[0]
    assert runs.metrics(tmp_path)[0]["loss"] < 0.95 * runs.metrics(finished.directory)[0]["loss"]
    named = json.loads((tmp_path / "runs/run/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == finished.config["model"]["init_from"]


def test_an_adapter_needs_its_own_settings_and_the_error_has_the_table(finished: Finished, tokenizer: str) -> None:
    model = ModelConfig(init_from=str(finished.adapter))
    with pytest.raises(
        ValueError, match=r"rank_stabilized: True -> False; lora.modules_to_save\[0\]: 'lm_head' -> None"
    ):
        find_source(model, tokenizer, LoraConfig(rank=4, alpha=8.0))
    with pytest.raises(ValueError, match=r"is a PEFT adapter; set lora = \{") as error:
        find_source(model, tokenizer)
    table = str(error.value).partition("set lora = ")[2].partition(" to train it on")[0]
    lora = msgspec.convert(tomllib.loads(f"lora = {table}")["lora"], LoraConfig)
    source = find_source(model, tokenizer, lora)
    assert (source.adapter, source.name) == (finished.adapter, finished.config["model"]["init_from"])
    assert lora.identity == msgspec.convert(finished.config["lora"], LoraConfig).identity
    assert source.digest != find_source(ModelConfig(init_from=source.name), tokenizer, lora).digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, "rank = 0 must be from 1 to 4096 - at `$.lora`"),
        ({"lora": {"alpha": float("inf")}}, "alpha = inf must be finite and above 0"),
        ({"lora": {"dropout": 0.05}}, "dropout = 0.05 is not supported; set dropout = 0"),
        ({"lora": {"targets": []}}, 'targets is empty; name layers such as "q_proj", or use "all-linear"'),
        ({"lora": {"targets": ["lm_head"]}}, "Invalid enum value 'lm_head' - at `$.lora.targets[0]`"),
        ({"lora": {"targets": "q_proj"}}, "Invalid enum value 'q_proj' - at `$.lora.targets`"),
        ({"lora": {"targets": ["q_proj", "q_proj"]}}, "names a layer twice"),
        ({"lora": {"modules_to_save": ["norm"]}}, "Invalid enum value 'norm' - at `$.lora.modules_to_save[0]`"),
        ({"model": {"vocab_size": 8}}, "[lora] trains adapters of an existing model, but [model] describes a new one"),
        ({"model": {"init_from": "model", "resize_vocabulary": True}}, "model.resize_vocabulary adds rows that [lora]"),
        (
            {"lora": {"export_merged": False}, "evaluation": {"path": "x"}},
            "[evaluation] needs the merged model; set lora.export_merged = true",
        ),
    ],
)
def test_a_mistake_in_the_table_is_named(changes: dict[str, Any], message: str) -> None:
    tables = runs.run_config("tokenizer", "rows.jsonl") | {"model": {"init_from": "model"}, "lora": {}} | changes
    if "vocab_size" in tables["model"]:
        tables["model"] = runs.run_config("tokenizer")["model"]
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_config(tables)


def test_a_tied_embedding_cannot_be_saved_beside_adapters(tmp_path: Path, tokenizer: str) -> None:
    public_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match="would train a weight that the model uses as both embedding and head"):
        find_source(
            ModelConfig(init_from=str(tmp_path / "tied")), tokenizer, LoraConfig(modules_to_save=("embed_tokens",))
        )


def test_a_directory_of_other_files_is_not_replaced_by_an_adapter(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "runs/run/adapter").mkdir(parents=True)
    (tmp_path / "runs/run/adapter/notes.txt").write_text("mine")
    assert "adapter holds 'notes.txt', which an export would delete" in fails(tmp_path, config)


def test_adapters_reproduce_64_conversations_word_for_word_merged_and_alone(tmp_path: Path, tokenizer: str) -> None:
    draw = random.Random(0)
    rows = [
        tiny.chat(
            f"{number}: {' '.join(draw.choices(tiny.WORDS, k=3))}",
            " ".join(draw.choices(tiny.WORDS, k=draw.randint(2, 6))),
        )
        for number in range(64)
    ]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    public_llama(vocab_size=512, **sizes).save_pretrained(tmp_path / "base")
    config = runs.run_config(
        tokenizer,
        path,
        run={"steps": 120},
        data={"streams": 1, "capacity": 512, "global_batch": 2},
        optimizer={"learning_rate": 1e-2},
        schedule={"kind": "linear"},
        checkpoint={"every": 1000},
        lora={"rank": 32},
        evaluation={"path": path, "show": 0},
    ) | {"model": {"init_from": str(tmp_path / "base")}}
    output = runs.run(tmp_path, config).output()
    assert max(line["loss"] for line in runs.metrics(tmp_path)[-5:]) < 0.05
    assert "100.0% of 64 held-out questions answered exactly" in output
    answers = [json.loads(line) for line in (tmp_path / "runs/run/answers.jsonl").read_text().splitlines()]
    assert [answer["given"] for answer in answers] == [f"{row['messages'][1]['content']}<|eot_id|>" for row in rows]
    stop_ids = [transformers.AutoTokenizer.from_pretrained(tokenizer).eos_token_id]
    prompts = [answer["prompt"] for answer in answers]
    alone = generate(tmp_path / "runs/run/adapter", prompts, 64, stop_ids, torch.device("cpu"))
    assert alone == [answer["given"] for answer in answers]


@pytest.mark.slow
def test_adapters_on_a_bfloat16_base_validate_resume_and_stay_float32(tmp_path: Path, config: dict[str, Any]) -> None:
    held_out = {"sources": config["data"]["sources"], "every": 2, "global_batches": 1}
    config |= {"validation": held_out, "parallel": {"tp": 2}}
    config["run"] |= {"compute_dtype": "bfloat16", "recompute": "full", "steps": 4}
    job = runs.run(_directory(tmp_path / "whole"), config, processes=2)
    assert "bfloat16 frozen weights, float32 adapters, computation in bfloat16, recompute full" in job.output()
    for steps in (2, 4):
        config["run"] |= {"steps": steps}
        runs.run(tmp_path, config, processes=2)
    assert runs.outcome(tmp_path) == runs.outcome(tmp_path / "whole")
    lines = runs.metrics(tmp_path)
    assert lines[3]["validation_loss"] < lines[1]["validation_loss"]
    held = store(tmp_path).manifest(4).tensors
    assert {tensor.dtype for name, tensor in held.items() if "lora" in name} == {"F32"}
    # the export is merged in float32 from the weights as the run computed with them
    merged = load_file(tmp_path / "runs/run/export/model.safetensors")
    first = read(Path(config["model"]["init_from"]))
    assert torch.equal(merged["lm_head.weight"], first["lm_head.weight"].bfloat16().float())
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "runs/run/checkpoints/step-00000004"), str(tmp_path / "out"), "--merged"]
    )
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out") == contents(tmp_path / "runs/run/export")


@pytest.mark.slow
def test_a_run_in_4_bits_resumes_and_merges_into_the_weights_of_its_base(tmp_path: Path, tokenizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
    public_llama(vocab_size=512, **sizes).save_pretrained(tmp_path / "base")
    config = adapting(tmp_path, tokenizer, tmp_path / "base", run={"steps": 4}, parallel={"tp": 2})
    config["lora"] = RANK | {"quantize": "nf4"}
    runs.run(_directory(tmp_path / "whole"), config, processes=2)
    config["run"]["steps"] = 2
    runs.run(tmp_path, config, processes=2)
    config["run"]["steps"] = 4
    assert "lora.quantize: 'nf4' -> None" in fails(tmp_path, config | {"lora": RANK}, processes=2)
    runs.run(tmp_path, config, processes=2)
    assert runs.outcome(tmp_path) == runs.outcome(tmp_path / "whole")
    losses = [line["loss"] for line in runs.metrics(tmp_path)]
    assert losses[-1] < losses[0]
    base, merged = (load_file(tmp_path / path / "model.safetensors") for path in ("base", "runs/run/export"))
    adapter = load_file(tmp_path / "runs/run/adapter/adapter_model.safetensors")
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        left, right = (adapter.get(f"{stem}.lora_{matrix}.weight") for matrix in "BA")
        expected = weight if left is None or right is None else weight + 2 * left @ right
        torch.testing.assert_close(merged[name], expected)
