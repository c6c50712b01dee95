"""`config.json` of transformers 4 and 5 becomes a LlamaConfig; unsupported keys are refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from tiny_llama import LLAMA3

from sftstream import keep
from trainer.llama import hf_config
from trainer.llama.config import LinearScaling, Llama3Scaling
from trainer.llama.hf_config import find_model, read_config
from trainer.llama.model import Llama

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


READS = """
import sys
from trainer.llama.hf_config import read_config
print(read_config(sys.argv[1]).num_hidden_layers, "transformers" in sys.modules)
"""


def test_transformers_is_imported_once_for_each_content(tmp_path: Path) -> None:
    environment = os.environ | {"SFTSTREAM_CACHE": str(tmp_path / "cache")}
    found = []
    for layers in (2, 2, 3, 2):
        command = [sys.executable, "-c", READS, str(written(tmp_path, num_hidden_layers=layers))]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert found == ["2 True\n", "2 False\n", "3 True\n", "2 False\n"]


@pytest.mark.parametrize("cache", ["missing", "a file", "~nobody of this name/cache"])
def test_a_config_is_read_without_a_cache_too(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("SFTSTREAM_CACHE", cache if cache.startswith("~") else str(tmp_path / cache))
    assert read_config(written(tmp_path)) == read_config(written(tmp_path))


def test_a_config_kept_by_other_code_or_another_transformers_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "first"))
    right = read_config(written(tmp_path))
    wrong = msgspec.structs.replace(right, num_hidden_layers=99)
    parts = (tmp_path / "config.json").read_bytes(), transformers.__version__, hf_config._CODE
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "second"))
    for number, other in enumerate((b"{}", "4.0.0", b"other code")):
        keep(wrong, *parts[:number], other, *parts[number + 1 :])
    assert read_config(tmp_path) == right
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "third"))
    keep(wrong, *parts)
    assert read_config(tmp_path) == wrong


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_missing_keys_get_the_defaults_of_transformers(kind: str, tmp_path: Path) -> None:
    public = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 32,
    }
    ours = read_config(written(tmp_path, **public, sliding_window=None))
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


def test_linear_scaling_is_read_in_the_older_spelling(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_scaling == LinearScaling(factor=2.0)


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported: choose a model of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures is .*, but only .'LlamaForCausalLM'. is supported: choose another model",
        ),
        (MISTRAL | {"sliding_window": 4096}, "sliding_window is 4096, .* set it to null if no conversation is longer"),
        (MISTRAL, "sliding_window is 4096"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "sliding_window is 64"),
        (
            {"logit_scale": 0.5},
            "unknown keys for model_type llama: logit_scale; remove the keys if the model computes the same",
        ),
        ({"auto_map": {"AutoModel": "own.Model"}}, "unknown keys for model_type llama: auto_map"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config is .*: train from the weights before quantization",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', but only default, linear"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "twist": 1}}, "twist"),
        ({"rope_scaling": {"factor": 4.0}}, "unknown keys for rope_type 'default': factor; set the rope_type"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "unknown keys for rope_type 'default': full_attention",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "Missing required keys in .*low_freq_factor"),
        ({"vocab_size": "many"}, "vocab_size is 'many', but the sizes of a model must be integers of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, but the sizes"),
        ({"hidden_size": -32}, "hidden_size is -32, but the sizes"),
        ({"intermediate_size": [64] * 99}, r"intermediate_size is \[64, 64, .{,80}, but the sizes"),
        ({"num_attention_heads": 7}, "hidden.size .*32.* multiple of"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_config(written(tmp_path, **keys))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_the_dtype_in_config_json_is_ignored(tmp_path: Path) -> None:
    plain = read_config(written(tmp_path))
    for keys in ({"torch_dtype": "bfloat16"}, {"dtype": "float16"}, {"dtype": "of no library"}):
        assert read_config(written(tmp_path, **keys)) == plain


def test_missing_sizes_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64}))
    with pytest.raises(
        ValueError, match="missing hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: add"
    ):
        read_config(tmp_path)


def test_a_directory_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a Hugging Face model: it has no config.json"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: Expected `object`, got `array`"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: Input data was truncated"):
        read_config(tmp_path)


PUBLISHED = {  # published config.json and number of parameters
    "Llama 2 7B": (
        '{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", '
        '"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, '
        '"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, '
        '"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, '
        '"torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}',
        6_738_415_616,
    ),
    "Llama 3 8B": (
        '{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "hidden_act": "silu", '
        '"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", '
        '"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, '
        '"rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256}',
        8_030_261_248,
    ),
    "Llama 3.1 70B, as 3.3": (
        '{"architectures": ["LlamaForCausalLM"], "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", '
        '"hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 131072, "mlp_bias": false, '
        '"model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, '
        '"rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, '
        '"original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "vocab_size": 128256}',
        70_553_706_496,
    ),
    "Llama 3.2 1B": (
        '{"architectures": ["LlamaForCausalLM"], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, '
        '"intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "llama", "num_attention_heads": 32, '
        '"num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, '
        '"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, '
        '"rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true, "vocab_size": 128256}',
        1_235_814_400,
    ),
    "Mistral 7B v0.3": (
        '{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096, '
        '"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", '
        '"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, '
        '"rope_theta": 1000000.0, "sliding_window": null, "vocab_size": 32768}',
        7_248_023_552,
    ),
    "Qwen2.5 0.5B": (
        '{"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, '
        '"max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, '
        '"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, '
        '"sliding_window": 32768, "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}',
        494_032_768,
    ),
    "Qwen3 0.6B": (
        '{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": 128, "hidden_act": "silu", '
        '"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, '
        '"model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, '
        '"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, '
        '"tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}',
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_parameter_counts(name: str, tmp_path: Path) -> None:
    text, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(text)
    with torch.device("meta"):
        model = Llama(read_config(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_config_key_of_transformers_is_read_or_checked_or_harmless(kind: str) -> None:
    generic = transformers.PreTrainedConfig().to_dict()
    harmless = {"use_cache", "pretraining_tp", "use_sliding_window", "max_window_layers", "layer_types"}
    harmless |= {"bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"}
    known = generic.keys() | harmless | set(hf_config._FIELD_KEYS) | hf_config._ONLY_SUPPORTED.keys()
    assert set(transformers.AutoConfig.for_model(kind).to_dict()) <= known


def test_a_model_name_is_found_in_the_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    written(snapshot)
    program = "from trainer.llama.hf_config import find_model; print(find_model('someone/tiny'))"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(snapshot)


@pytest.mark.parametrize("name", ["someone/unheard-of", "no where", "./nowhere"])
def test_an_unknown_model_name_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(f"model {name!r} is neither a local directory nor available from the Hugging Face hub"),
    ):
        find_model(name)


@pytest.mark.parametrize("content", [b'{"a": ' * 5000 + b"1" + b"}" * 5000, b'{"a": "\xff"}', b"[]"])
def test_a_config_that_cannot_be_decoded_is_one_line_with_its_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        read_config(tmp_path)
