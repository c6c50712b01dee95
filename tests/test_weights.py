"""A Hugging Face directory becomes a model and a model a directory, with the same bits and nothing left out."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import FAMILIES, LLAMA3, public_llama
from tiny_llama import CONFIG, TIED, row

from trainer import weights
from trainer.model import LinearScaling, Llama, Llama3Scaling, LlamaConfig, init_weights
from trainer.weights import export, load_weights, read_config

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


def written(directory: Path, **keys: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(SHAPE | keys))
    return directory


def initialised(config: LlamaConfig) -> Llama:
    model = Llama(config)
    init_weights(model, 0)
    return model


def test_what_a_config_leaves_out_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    ours = read_config(written(tmp_path))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_size == theirs.head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}}
        | {"max_position_embeddings": 16},
    ],
)
def test_llama3_scaling_is_read_in_the_older_and_the_newer_spelling(keys: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(written(tmp_path, **keys))
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    )


def test_linear_scaling_is_read_by_its_older_name(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == LinearScaling(factor=2.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', of which only 'llama' is supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "twist": 1}}, "twist"),
        ({"vocab_size": "many"}, r"Expected `int`, got `str` - at `\$.vocab_size`"),
        ({"num_attention_heads": 7}, "hidden_size 32 must be a multiple of num_attention_heads 7"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_config(written(tmp_path, **keys))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_size_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64}))
    with pytest.raises(
        ValueError, match="hidden_size, intermediate_size, num_hidden_layers, num_attention_heads must be"
    ):
        read_config(tmp_path)


def test_a_directory_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a Hugging Face model: it has no config.json"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: Expected `object`, got `array`"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: Input data was truncated"):
        read_config(tmp_path)


def test_weights_that_are_missing_or_cut_short_are_refused(tmp_path: Path) -> None:
    file = exported(tmp_path / "out") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or not a safetensors file"):
        load_weights(Llama(CONFIG), tmp_path / "out")
    file.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing: weights are read from safetensors files only"):
        load_weights(Llama(CONFIG), tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_public_model_comes_back_bit_for_bit_through_ours(family: str, tmp_path: Path) -> None:
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
    one = row(41).input_ids[None]
    again.set_attn_implementation("eager")
    assert torch.equal(again(one).logits, theirs(one).logits)
    assert read_config(tmp_path / "ours") == config


def test_a_model_in_several_files_is_the_same_model(tmp_path: Path) -> None:
    theirs = public_llama()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    models = [Llama(read_config(tmp_path / name)) for name in ("one", "many")]
    for model, name in zip(models, ("one", "many"), strict=True):
        load_weights(model, tmp_path / name)
    for ours, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, other)


def test_an_export_in_bfloat16_is_the_model_rounded_once(tmp_path: Path) -> None:
    model = initialised(CONFIG)
    export(model, CONFIG, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.head.weight.bfloat16())
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def exported(directory: Path) -> Path:
    export(initialised(CONFIG), CONFIG, directory)
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model.norm.weight has shape none, where config.json asks for \[32\]"),
        (lambda t: t.update(extra=torch.zeros(3)), r"extra has shape \[3\], where config.json asks for none"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(65, 32)}),
            r"lm_head.weight has shape \[65, 32\], where config.json asks for \[64, 32\]",
        ),
    ],
)
def test_a_tensor_too_few_too_many_or_of_another_shape_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    file = exported(tmp_path / "out") / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    model = Llama(CONFIG)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "out")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_frequencies_that_old_conversions_store_are_passed_over(tmp_path: Path) -> None:
    file = exported(tmp_path / "out") / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}, file)
    load_weights(Llama(CONFIG), tmp_path / "out")


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(tmp_path: Path) -> None:
    export(initialised(TIED), TIED, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, file)
    load_weights(Llama(TIED), tmp_path / "out")
    save_file(tensors | {"lm_head.weight": embedding + 1}, file)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head.weight is not the embedding"):
        load_weights(Llama(TIED), tmp_path / "out")


def test_an_export_with_a_tokenizer_is_all_that_a_user_needs(tmp_path: Path, tokenizer: str) -> None:
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = msgspec.structs.replace(CONFIG, vocab_size=len(words))
    export(initialised(config), config, tmp_path / "out", words, stop_token_ids=[words.eos_token_id, 5])
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
    """What a kill leaves behind, without ending the test."""


def test_an_export_killed_before_its_end_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = exported(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def kill(_: int) -> None:
        raise Killed

    changed = initialised(CONFIG)
    changed.norm.weight.data.fill_(2.0)
    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "fsync", kill)
        with pytest.raises(Killed):
            export(changed, CONFIG, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    export(changed, CONFIG, out)
    assert load_file(out / "model.safetensors")["model.norm.weight"].eq(2).all()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files than a model's: export to another directory"):
        export(initialised(CONFIG), CONFIG, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
