"""An export is complete or absent, and holds all files that a user of the model needs."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_llama import CONFIG, QWEN2, QWEN3, TIED, built, exported

from checkpoints import RECIPE, CheckpointStore
from sftstream import SavedTokenizer
from trainer.llama.export import export
from trainer.llama.model import Llama, LlamaConfig
from trainer.llama.recipe import MODEL, recipe
from trainer.llama.weights import load_weights


def test_an_export_in_bfloat16_is_the_model_rounded_once(tmp_path: Path) -> None:
    model = built(CONFIG)
    export(model, CONFIG, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.head.weight.bfloat16())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_an_export_with_a_tokenizer_is_all_that_a_user_needs(tmp_path: Path, tokenizer: str) -> None:
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = msgspec.structs.replace(CONFIG, vocab_size=len(words))
    export(built(config), config, tmp_path / "out", SavedTokenizer.of(words), stop_token_ids=[words.eos_token_id, 5])
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == words.chat_template
    assert model.generation_config.eos_token_id == [words.eos_token_id, 5]
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] >= prompt["input_ids"].shape[1] + 1


def test_without_a_tokenizer_no_token_ends_a_generation(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path / "out"))
    assert model.generation_config.eos_token_id is None
    assert model.config.bos_token_id is None


class Killed(BaseException):
    """The end of a process; no code of the export handles this exception."""


@pytest.mark.parametrize("number", range(4))
def test_an_export_killed_before_its_end_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = exported(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    left = iter(range(number, -1, -1))

    def kill(_: int) -> None:
        if next(left) == 0:
            raise Killed

    changed = built(CONFIG)
    changed.norm.weight.data.fill_(2.0)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", kill)  # Of two JSON files, the weights, and their directory.
        with pytest.raises(Killed):
            export(changed, CONFIG, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    export(changed, CONFIG, out)
    assert load_file(out / "model.safetensors")["model.norm.weight"].eq(2).all()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("config", [CONFIG, TIED, QWEN2, QWEN3], ids=["untied", "tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_export_of_a_checkpoint_is_the_export_of_its_model_byte_by_byte(
    config: LlamaConfig, dtype: torch.dtype, tmp_path: Path, tokenizer: str
) -> None:
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = msgspec.structs.replace(config, vocab_size=len(words))
    model = built(config).to(dtype)
    store = CheckpointStore(tmp_path / "checkpoints")
    saved = SavedTokenizer.of(words)
    steps = recipe(config, dtype, dtype, saved, stop_token_ids=[5])
    store.save(1, {MODEL: dict(model.named_parameters())}, {RECIPE: steps.builtins()})
    for file_bytes, files in ((20_000, 2), (10**9, 1)):
        ours, theirs = tmp_path / f"ours{files}", tmp_path / f"theirs{files}"
        export(model, config, ours, saved, stop_token_ids=[5], file_bytes=file_bytes)
        store.export(1, theirs, file_bytes=file_bytes)
        assert len(list(ours.glob("*.safetensors"))) >= files
        assert (ours / "model.safetensors.index.json").exists() == (files > 1)
        assert contents(theirs) == contents(ours)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", ["nothing", "an export"])
def test_a_directory_of_other_files_is_not_replaced(tmp_path: Path, before: str) -> None:
    if before == "an export":
        exported(tmp_path)
        exported(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds 'notes\.txt', which an export would delete: move it to another directory"
    ):
        export(built(CONFIG), CONFIG, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("file_bytes", "files"), [(20_000, 4), (1, 20), (10**9, 1)])
def test_a_big_model_goes_into_several_files(file_bytes: int, files: int, tmp_path: Path) -> None:
    model = built(TIED)
    export(model, TIED, tmp_path / "out", file_bytes=file_bytes)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) == files
    index = tmp_path / "out" / "model.safetensors.index.json"
    if files > 1:
        content = json.loads(index.read_bytes())
        assert sorted(set(content["weight_map"].values())) == names
        assert content["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    else:
        assert not index.exists()
    again = Llama(TIED)
    load_weights(again, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    public = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(public.model.embed_tokens.weight, model.embedding.weight)


def test_how_a_model_is_meant_to_generate_is_carried_along(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": [7, 9], "bos_token_id": 3})
    )
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = msgspec.structs.replace(CONFIG, vocab_size=len(words))
    export(built(config), config, tmp_path / "out", SavedTokenizer.of(words), stop_token_ids=[9], init_from=tmp_path)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.do_sample, settings.temperature) == (True, 0.6)
    assert settings.eos_token_id == [words.eos_token_id, 9, 7]
    assert settings.bos_token_id == words.bos_token_id


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Input data was truncated"), ("[]", "Expected `object`"), ('{"eos_token_id": "end"}', "got `str`")],
)
def test_settings_of_generation_that_are_none_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"generation_config.json: .*{message}"):
        export(built(CONFIG), CONFIG, tmp_path / "out", init_from=tmp_path)
