"""Loading and export of a Hugging Face directory keep every bit; damaged files are refused."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_llama import CONFIG, FAMILIES, TIED, built, exported, pack_of, public_llama

from trainer.llama.export import export
from trainer.llama.hf_config import read_config
from trainer.llama.model import Llama
from trainer.llama.weights import load_weights


def test_missing_or_truncated_weights_are_refused(tmp_path: Path) -> None:
    file = exported(tmp_path / "out") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or not a safetensors file: .*; fetch it again"):
        load_weights(Llama(CONFIG), tmp_path / "out")
    file.unlink()
    with pytest.raises(
        ValueError, match=r"model.safetensors is missing: download or convert the weights as safetensors"
    ):
        load_weights(Llama(CONFIG), tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_public_model_keeps_its_bits_through_loading_and_export(family: str, tmp_path: Path) -> None:
    theirs = public_llama(**FAMILIES[family])
    theirs.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    model = Llama(config)
    load_weights(model, tmp_path / "theirs")
    export(model, config, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected, found = theirs.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = pack_of(41).input_ids[None]
    again.set_attn_implementation("eager")
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert read_config(tmp_path / "ours") == msgspec.structs.replace(config, head_dim=config.head_size)


def test_a_model_in_several_files_loads_the_bits_of_one_file(tmp_path: Path) -> None:
    theirs = public_llama()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    models = [Llama(read_config(tmp_path / name)) for name in ("one", "many")]
    for model, name in zip(models, ("one", "many"), strict=True):
        load_weights(model, tmp_path / name)
    for ours, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "has no weight model.norm.weight, which config.json implies"),
        (
            lambda t: t.update(extra=torch.zeros(3)),
            r"extra has shape \[3\], but config.json implies none: use the config.json of these",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(65, 32)}),
            r"lm_head.weight has shape \[65, 32\], but config.json implies \[64, 32\]",
        ),
    ],
)
def test_a_missing_unexpected_or_misshapen_tensor_is_refused_before_loading(
    change: Any, message: str, tmp_path: Path
) -> None:
    file = exported(tmp_path / "out") / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    model = Llama(CONFIG)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "out")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    file = exported(tmp_path / "out") / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(32).to(dtype)}, file)
    with pytest.raises(ValueError, match=r"model.norm.weight is stored as \w+: train from weights in one of F64, F32"):
        load_weights(Llama(CONFIG), tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "Input data was truncated"),
        ("{}", "missing required field `weight_map`"),
        ('{"weight_map": ["a"]}', "Expected `object`, got `array`"),
        (
            '{"weight_map": {"a": "../model.safetensors"}}',
            "names '../model.safetensors': weight files must lie in the directory of the index",
        ),
    ],
)
def test_a_malformed_index_is_refused(index: str, message: str, tmp_path: Path) -> None:
    (exported(tmp_path / "out") / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=rf"model.safetensors.index.json.* {message}"):
        load_weights(Llama(CONFIG), tmp_path / "out")


def test_frequencies_stored_by_old_conversions_are_ignored(tmp_path: Path) -> None:
    file = exported(tmp_path / "out") / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, file)
    load_weights(Llama(CONFIG), tmp_path / "out")


def test_a_tied_model_loads_a_stored_head_only_if_equal_to_the_embedding(tmp_path: Path) -> None:
    export(built(TIED), TIED, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, file)
    load_weights(Llama(TIED), tmp_path / "out")
    save_file(tensors | {"lm_head.weight": embedding + 1}, file)
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings is true, but lm_head.weight differs from the embedding: set"
    ):
        load_weights(Llama(TIED), tmp_path / "out")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding}, file)
    with pytest.raises(ValueError, match=r"has no weight model\.embed_tokens\.weight"):
        load_weights(Llama(TIED), tmp_path / "out")


def split_with_a_double(directory: Path, indexed: str | None) -> Path:
    """Export a model in two files, with `model.norm.weight` also in the second file, all zero."""
    file = exported(directory) / "model.safetensors"
    tensors = load_file(file)
    half = len(tensors) // 2
    parts = dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])
    double = "model.norm.weight"
    first, second = parts if double in parts[0] else parts[::-1]
    save_file(first, directory / "a.safetensors")
    save_file(second | {double: torch.zeros(32)}, directory / "b.safetensors")
    weight_map = {name: f"{letter}.safetensors" for letter, part in (("a", first), ("b", second)) for name in part}
    weight_map.pop(double)
    if indexed:
        weight_map[double] = indexed
    (directory / "model.safetensors.index.json").write_text(msgspec.json.encode({"weight_map": weight_map}).decode())
    file.unlink()
    return directory


@pytest.mark.parametrize(("indexed", "norm"), [("a.safetensors", 1.0), ("b.safetensors", 0.0)])
def test_the_index_decides_between_two_files_that_hold_a_tensor(tmp_path: Path, indexed: str, norm: float) -> None:
    model = Llama(CONFIG)
    load_weights(model, split_with_a_double(tmp_path / "out", indexed))
    assert model.norm.weight.tolist() == [norm] * 32


def test_a_tensor_in_two_files_and_not_in_the_index_is_refused(tmp_path: Path) -> None:
    directory = split_with_a_double(tmp_path / "out", None)
    with pytest.raises(ValueError, match=r"a\.safetensors and b\.safetensors both hold model\.norm\.weight"):
        load_weights(Llama(CONFIG), directory)


def test_an_index_that_names_a_file_without_the_tensor_is_refused(tmp_path: Path) -> None:
    directory = split_with_a_double(tmp_path / "out", "a.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight":"', '"lm_head.weight":"x'))
    with pytest.raises(ValueError, match=r"xa\.safetensors is missing|xb\.safetensors is missing"):
        load_weights(Llama(CONFIG), directory)
    index.write_text('{"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.bias": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"b\.safetensors holds no lm_head\.bias, but model\.safetensors\.index\.json"):
        load_weights(Llama(CONFIG), directory)
