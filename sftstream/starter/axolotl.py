"""Translate a config of axolotl into the tables of a run.

A key of axolotl is moved, refused by name if its value would mean something else here, or told to
the user because it has no counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sftstream.door import Door
from sftstream.formats.exclusions import CHOICES
from sftstream.formats.roles import ROLES

MOVED: dict[str, tuple[str, Any]] = {
    "base_model": ("model.init_from", None),
    "sequence_len": ("data.capacity", 512),
    "dataloader_num_workers": ("data.workers", None),
    "shuffle_merged_datasets": ("data.shuffle", None),
    "chat_template_kwargs": ("tokenizer.variables", None),
    "tokenizer_config": ("tokenizer.path", None),
    "seed": ("run.seed", 42),
    "torch_compile": ("run.compile", None),
    "learning_rate": ("optimizer.learning_rate", None),
    "adam_beta1": ("optimizer.beta1", 0.9),
    "adam_beta2": ("optimizer.beta2", 0.999),
    "adam_epsilon": ("optimizer.eps", 1e-8),
    "weight_decay": ("optimizer.weight_decay", 0.0),
    "max_grad_norm": ("optimizer.clip", 1.0),
    "cosine_min_lr_ratio": ("schedule.minimum", None),
    "tensor_parallel_size": ("parallel.tp", None),
    "dp_replicate_size": ("parallel.replicas", None),
    "save_steps": ("checkpoint.every", None),
    "save_total_limit": ("checkpoint.keep", None),
    "eval_steps": ("validation.every", None),
    "lora_r": ("lora.rank", None),
    "lora_alpha": ("lora.alpha", None),
    "lora_modules_to_save": ("lora.modules_to_save", None),
    "peft_use_rslora": ("lora.rank_stabilized", None),
}
"""Key of axolotl -> key here, and the value that axolotl has without the key; None for the value
that is the default here, too."""

WHOLE = {key for key in MOVED if key.endswith(("_steps", "_size", "_limit", "_len", "_workers", "_r")) or key == "seed"}
KERNELS = ("axolotl.integrations.liger.", "axolotl.integrations.cut_cross_entropy.")
"""Beginnings of plugins that change the speed alone."""
OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})
ADAMW = ("adamw_torch", "adamw_torch_fused")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
DECIDING = """
rl reward_model process_reward_model pretraining_dataset streaming val_set_size batch_size group_by_length
curriculum_sampling balance_labels shuffle_before_merging_datasets dataset_exact_deduplication min_sample_len
dataset_shard_num max_prompt_len sample_packing_sequentially tokens added_tokens_overrides eot_tokens
default_system_message tokenizer_use_mistral_common trust_remote_code revision_of_model reinit_weights
overrides_of_model_config model_quantization_config lora_model_dir lora_dropout load_in_8bit relora qat peft_use_dora
peft_init_lora_weights peft_layers_to_transform lora_target_parameters lora_rank_pattern lora_alpha_pattern
loraplus_lr_ratio lisa_n_layers quantization unfrozen_parameters embedding_lr lr_groups embedding_lr_scale optim_args
lr_scheduler_kwargs lr_quadratic_warmup lr_div_factor cosine_constant_lr_ratio jagged_restart_steps fp16 float16 fp8
neftune_noise_alpha use_dft use_eaft use_pose trainer_cls early_stopping_patience
"""
"""Further keys of axolotl that change the training if they are set."""

SAME: dict[str, tuple[Any, ...]] = {
    "sample_packing": (True,),
    "excess_length_strategy": (None, "drop"),
    "optimizer": (None, *ADAMW),
    "lr_scheduler": (None, *SCHEDULES),
    "adapter": (None, "lora", "qlora"),
    "bf16": (None, True, False, "auto", "full"),
    "context_parallel_size": (None, 1),
    "sequence_parallel_degree": (None, 1),
    **dict.fromkeys(DECIDING.split(), OFF),
}
"""Key of axolotl -> the values that mean the same here, None for a missing key."""


class Translated(msgspec.Struct, frozen=True):
    """The tables of a run's TOML file, and the settings of axolotl without a counterpart."""

    tables: dict[str, dict[str, Any]]
    told: tuple[str, ...]


class _Settings:
    """The settings that nobody has taken yet. A key without a value is no setting."""

    def __init__(self, given: Mapping[Any, Any], refused: list[str], place: str = "") -> None:
        self.left = {str(key): _number(value) for key, value in given.items() if value is not None}
        self._refused, self._place = refused, place

    def take(self, key: str, default: Any = None) -> Any:
        return self.left.pop(key, default)

    def require(self, key: str, same: tuple[Any, ...]) -> None:
        """Note the value of a key as refused, unless it is one of `same`."""
        self.judge(key, same, self.left.get(key))

    def judge(self, key: str, same: tuple[Any, ...], value: Any) -> None:
        """Note `value` as refused, unless it is one of `same`."""
        if value not in same:
            shown = " or ".join(repr(one) for one in same if one not in OFF)
            self.refuse(f"{key} = {value!r}" + (f" (only {shown})" if shown else ""))

    def refuse(self, what: str) -> None:
        self._refused.append(f"{self._place}{what}")

    def count(self, key: str, default: int) -> int:
        """Take a whole number; note any other value as refused."""
        value = self.take(key, default)
        if not isinstance(value, int | float) or value != int(value):
            self.refuse(f"{key} = {value!r} (only a whole number)")
            return default
        return int(value)


def _number(value: Any) -> Any:
    """Return the number that a text spells: YAML reads 2e-5 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_axolotl(path: Path, gpus: int) -> Translated:
    """Return the tables of a run that trains as the axolotl config in `path` does on `gpus` GPUs.

    Raises ValueError if the file is no config, or for values that would mean something else here.
    """
    import yaml

    with Door(f"{path} cannot be read as a config of axolotl"):
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(given, dict) or not {"base_model", "datasets", "learning_rate"} <= {*given}:
        raise ValueError(f"{path} lacks base_model, datasets or learning_rate, so it is no config that axolotl trains")
    refused: list[str] = []
    with Door(f"{path} cannot be read as a config of axolotl"):
        translated = _translate(_Settings(given, refused), refused, max(gpus, 1))
    if refused:
        raise ValueError(
            f"{path}: no setting here means the same as {'; '.join(refused)}; remove or change these settings in a "
            "copy, as docs/moving_in.md describes"
        )
    return translated


def _translate(settings: _Settings, refused: list[str], gpus: int) -> Translated:
    _refuse_others(settings)
    tables: dict[str, dict[str, Any]] = {name: {} for name in ("run", "data", "tokenizer", "lora", "validation")}
    lora = _lora(settings)
    tables["run"] = _run(settings, full=lora is None)
    tables["schedule"] = _schedule(settings, tables["run"])
    tables["data"]["global_batch"] = _global_batch(settings, gpus)
    for key, (ours, default) in MOVED.items():
        table, _, name = ours.partition(".")
        whole = key in WHOLE and key in settings.left
        if (value := settings.count(key, 1) if whole else settings.take(key, default)) is not None:
            tables.setdefault(table, {})[name] = value
    optimizer, data = tables["optimizer"], tables["data"]
    optimizer["betas"] = [optimizer.pop("beta1"), optimizer.pop("beta2")]
    optimizer["clip"] = optimizer["clip"] or math.inf
    everywhere = {key: settings.take(key) for key in ("chat_template", "chat_template_jinja")}
    everyone = bool(settings.take("train_on_inputs"))
    data["sources"], policies = _sources(settings.take("datasets"), everywhere, refused, "datasets")
    held_out, others = _sources(settings.take("test_datasets", []), everywhere, refused, "test_datasets")
    if len(policies | others) > 1:
        refused.append("roles_to_train or chat_template of one source alone")
    if tables["run"].get("epochs") != 1 and any("repeat" in source for source in data["sources"]):
        refused.append("weight with more than one epoch, which is the same part of the rows in each epoch")
    roles, template = min(policies, key=str)
    data["train_on"] = ["all"] if everyone else list(roles)
    data["tokenizer"] = {"path": tables["model"]["init_from"], **tables.pop("tokenizer")}
    data["tokenizer"] |= {} if template is None else {"template": template}
    validation, adapters = tables.pop("validation"), tables.pop("lora")
    tables |= {"validation": {"sources": held_out, **validation}} if held_out else {}
    tables |= {} if lora is None else {"lora": adapters | lora}
    for key, same in SAME.items():
        if settings.left.get(key) in same:
            settings.take(key)
    return Translated(tables, tuple(f"{key}: {value}" for key, value in settings.left.items()))


def _refuse_others(settings: _Settings) -> None:
    for key, same in SAME.items():
        settings.require(key, same)
    settings.judge("special_tokens", OFF, sorted({*settings.left.get("special_tokens", ())} - {"pad_token"}))
    for plugin in settings.left.get("plugins", ()):
        settings.judge("plugins", (plugin,) if str(plugin).startswith(KERNELS) else KERNELS, plugin)


def _global_batch(settings: _Settings, gpus: int) -> int:
    """Return the packs of a step: those of a GPU, times the data-parallel GPUs."""
    packs = settings.count("micro_batch_size", 1) * settings.count("gradient_accumulation_steps", 1)
    parallel: int = settings.left.get("tensor_parallel_size", 1)
    return packs * max(gpus // parallel, 1)


def _run(settings: _Settings, *, full: bool) -> dict[str, Any]:
    out, steps = Path(settings.take("output_dir", "./model-out")), settings.count("max_steps", 0)
    epochs = settings.count("num_epochs", 1)
    run: dict[str, Any] = {"name": out.name, "root": str(out.parent)}
    run |= {"steps": steps} if steps > 0 else {"epochs": epochs}  # axolotl ends at max_steps alone
    if settings.take("bf16", "auto") or settings.take("bfloat16"):
        run |= {"weights_dtype": "bfloat16"} if full else {}
    else:
        run["compute_dtype"] = "float32"
    return run | ({"recompute": "full"} if settings.take("gradient_checkpointing") else {})


def _schedule(settings: _Settings, run: Mapping[str, Any]) -> dict[str, Any]:
    name = settings.take("lr_scheduler", "cosine")
    steps, ratio, total = settings.take("warmup_steps"), settings.take("warmup_ratio"), run.get("steps")
    if name == "constant":
        return {"kind": "constant"}
    if steps is None and ratio != 0:
        if not total:
            settings.refuse(f"warmup_ratio = {ratio} without max_steps (give warmup_steps)")
        steps = int(ratio * (total or 0)) if ratio else min(int(0.03 * (total or 0)), 100)
    kind = SCHEDULES.get(name, "cosine")
    return {"kind": kind, "warmup": int(steps or 0)} | ({} if total or kind == "constant" else {"over": "data"})


def _lora(settings: _Settings) -> dict[str, Any] | None:
    adapter, four = settings.take("adapter"), settings.take("load_in_4bit")
    linear, modules = settings.take("lora_target_linear"), settings.take("lora_target_modules", "all-linear")
    if adapter is None:
        settings.judge("load_in_4bit", OFF, four)
        return None
    targets = "all-linear" if linear or modules == "all-linear" else [modules] if isinstance(modules, str) else modules
    return {"targets": targets} | ({"quantize": "nf4"} if four or adapter == "qlora" else {})


Policies = set[tuple[tuple[str, ...], str | None]]


def _sources(
    given: Any, everywhere: Mapping[str, Any], refused: list[str], key: str
) -> tuple[list[dict[str, Any]], Policies]:
    """Return the sources of the list `key`, and the pairs of trained roles and chat template."""
    sources: list[dict[str, Any]] = []
    policies: Policies = set()
    for number, entry in enumerate(given):
        source = _Settings({**everywhere, **entry}, refused, f"{key}[{number}].")
        for name in ("type", "train_on_eos", "train_on_eot"):
            source.require(name, ("chat_template",) if name == "type" else (None, "turn"))
        text = source.take("chat_template_jinja")
        source.require("chat_template", (None, "tokenizer_default", *(("jinja",) if text else ())))
        roles = dict.fromkeys(ROLES.get(role, role) for role in source.take("roles_to_train", ["assistant"]))
        policies.add((tuple(roles), text))
        sources.append(_source(source))
        for name in ("type", "train_on_eos", "train_on_eot", "chat_template", "ds_type"):
            source.take(name)
        for name in source.left:
            source.require(name, OFF)
    return sources, policies


def _source(source: _Settings) -> dict[str, Any]:
    ours: dict[str, Any] = {"path": source.take("path")}
    if source.left.get("split") == "train" and Path(ours["path"]).is_file():
        source.take("split")  # a file has no other rows
    moved = {"split": "split", "name": "subset", "revision": "revision", "weight": "repeat"}
    ours |= {moved[key]: source.take(key) for key in moved if key in source.left}
    if (column := source.take("field_messages", "messages")) not in ("messages", "conversations", "conversation"):
        ours["columns"] = {"messages": column}
    names = {"role": "role", "content": "content", **source.take("message_property_mappings", {})}
    for key, read in (("role", ("role", "from", "type")), ("content", ("content", "value", "text"))):
        source.judge(f"message_property_mappings.{key}", read, source.take(f"message_field_{key}", names[key]))
    source.judge("message_field_training", (None, *CHOICES), source.take("message_field_training"))
    roles = {name: target for target, given in source.take("roles", {}).items() for name in given}
    renamed = {name: target for name, target in roles.items() if ROLES.get(name) != target}
    return ours | ({"roles": renamed} if renamed else {})
