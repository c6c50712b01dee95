"""A run's config is typed and takes overrides, and every mistake is named by its key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import runs

from sftstream import DataConfig
from sftstream.toml_file import read_toml
from trainer.config import TrainConfig
from trainer.config_file import load_config, parse_config
from trainer.training.accepted import covers


def _tables(**changes: dict[str, Any]) -> dict[str, Any]:
    return runs.run_config("tokenizer", "rows.jsonl", **changes)


def _load(directory: Path, *overrides: str, **changes: dict[str, Any]) -> TrainConfig:
    path = directory / "run.toml"
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in _tables(**changes).items()))
    return load_config(path, overrides)


def test_the_run_gives_the_data_its_seed_and_epochs() -> None:
    tables = _tables(run={"seed": 7})
    del tables["run"]["steps"]
    tables["run"]["epochs"] = 3
    config = parse_config(tables)
    assert (config.data.seed, config.data.epochs) == (7, 3)


def test_overrides_are_toml_values_and_bare_words_are_strings(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        "run.name=other",
        "optimizer.learning_rate=3e-4",
        "data.sources.0.path=more/*.parquet",
        "data.shuffle=false",
        "optimizer.betas=[0.8, 0.9]",
        "schedule.kind=linear",
    )
    assert config.run.name == "other"
    assert config.optimizer.learning_rate == 3e-4
    assert config.data.sources[0].path == "more/*.parquet"
    assert config.data.shuffle is False
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.schedule.kind == "linear"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1", "Object contains unknown field `lr` - at `$.optimizer`"),
        ("optimiser.learning_rate=1", "Object contains unknown field `optimiser`"),
        ("run.steps=ten", "Expected `int | null`, got `str` - at `$.run.steps`"),
        ("run.steps=0", "steps = 0 must be at least 1"),
        ("run={}", "neither steps nor epochs is given, so the run would never end; give one or both"),
        (
            "run.accept_changed=['seed']",
            "accept_changed holds 'seed', which is no setting of the training that a resume",
        ),
        (
            "run.accept_changed=['optimizer.lr']",
            "'optimizer.lr', which is no setting of the training that a resume may change; name optimizer, schedule, "
            "run.attention, optimizer.learning_rate, optimizer.betas, ",
        ),
        ("run.accept_changed=['optimizer.kind']", "holds 'optimizer.kind', which is no setting of the training"),
        ("run.accept_changed=['data.capacity']", "and changes of the data in data.accept_changed"),
        ("run.stop_after=3h50", "'3h50' is no time above 0; write days, hours, minutes and seconds as in"),
        ("run.root=''", "root = '' is no directory; name the directory of all runs"),
        ("run.name=../x", "name = '../x' must be a plain directory name under runs/"),
        ("run.device=tpu", "Invalid enum value 'tpu' - at `$.run.device`"),
        ('data.train_on=["oracle"]', "Invalid enum value 'oracle' - at `$.data.train_on[0]`"),
        ("data.seed=1", "data.seed is set by run.seed"),
        ("data.sources=[]", "sources is empty"),
        ("model.hidden_siz=8", "Object contains unknown field `hidden_siz` - at `$.model`"),
        ("model.init_from=llama", "give either init_from (a Hugging Face directory or hub name) or the shape"),
        ("parallel.tp=0", "tp = 0 must be at least 1"),
        ("checkpoint.every=0", "every = 0 must be at least 1"),
        ("checkpoint.keep_every=0", "keep_every = 0 must be at least 1"),
        ("checkpoint.keep_best=0", "keep_best = 0 must be at least 1"),
        ("checkpoint.keep_best=2", "keep_best = 2 compares validation losses; add a [validation] table"),
        ("validation.every=10", "missing required field `sources` - at `$.validation`"),
        ("validation={sources=[]}", "sources is empty; name at least one [[validation.sources]]"),
        ('validation={sources=[{path="a"}], every=0}', "every = 0 must be at least 1 - at `$.validation`"),
        ('validation={sources=[{path="a"}], global_batches=0}', "global_batches = 0 must be at least 1"),
        (
            'validation={sources=[{path="a", weight=1.0}, {path="b"}]}',
            "source 'b' has no weight but another source has",
        ),
        ("schedule.over=data", 'schedule.over = "data" needs run.epochs'),
        ("steps", "'steps' is not an override; write section.key=value"),
        ("run.name.x=1", "override 'run.name.x': 'name' is a value, not a table"),
        ("run=1", "run = 1 is a value, not a table"),
        ("model=[1]", "model = [1] is a value, not a table"),
        (
            "data.sources.1.path=x",
            "override 'data.sources.1.path': '1' is not an index into a list of 1 elements, counted from 0",
        ),
        ("data.sources.-1.path=x", "override 'data.sources.-1.path': '-1' is not an index into a list of 1"),
        ("data.sources.one=x", "override 'data.sources.one': 'one' is not an index into a list of 1"),
        (
            "run.seed=9223372036854775808",
            "seed = 9223372036854775808 must fit 64 bits: from -2**63 to 2**63 - 1 - at `$.run`",
        ),
        ("evaluation={path='x', show=-1}", "show = -1 must be 0 or more"),
        ("evaluation={path='x', max_new_tokens=0}", "max_new_tokens = 0 must be 1 or more"),
        ("optimizer.learning_rate=nan", "learning_rate nan and weight_decay 0.0 must be finite and not negative"),
        ("optimizer.weight_decay=inf", "weight_decay inf must be finite"),
        ("optimizer.eps=nan", "eps nan must be finite and above 0"),
        ("optimizer.clip=nan", "clip nan must be above 0"),
        ("model.rope_theta=nan", "rope_theta nan must be above 0"),
        ("model.rms_norm_eps=inf", "rms_norm_eps inf between 0 and 1"),
        ("model.initializer_range=nan", "initializer_range nan not negative"),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        _load(tmp_path, override)
    assert "\n" not in str(error.value)


def test_none_on_the_command_line_leaves_out_a_key_whose_default_is_none(tmp_path: Path) -> None:
    validation = {"sources": [{"path": "held.jsonl", "weight": 2.0}], "patience": 3}
    changes = {"validation": validation, "model": _tables()["model"] | {"head_dim": 4}}
    words = ("run.epochs=2", "run.steps=none", "data.sources.0.weight=none", "model.head_dim=none")
    config = _load(tmp_path, *words, "validation.patience=none", "validation.sources.0.weight=none", **changes)
    assert (config.run.steps, config.run.epochs, config.data.sources[0].weight) == (None, 2, None)
    assert config.validation is not None
    assert (config.validation.patience, config.validation.sources[0].weight) == (None, None)
    assert config.model.shape is not None
    assert config.model.shape.head_dim is None
    assert _load(tmp_path, "validation=none", **changes).validation is None
    assert _load(tmp_path, "validation.patience=none", "lora=none").validation is None


def test_none_is_a_word_where_it_is_a_value_and_a_text_in_quotes(tmp_path: Path) -> None:
    config = _load(tmp_path, "run.recompute=none", "run.name=none", "data.tokenizer.template='none'")
    assert (config.run.recompute, config.run.name, config.data.tokenizer.template) == ("none", "none", "none")
    with pytest.raises(ValueError, match=re.escape("Expected `float | null`, got `str` - at `$.optimizer.clip`")):
        _load(tmp_path, "optimizer.clip=none")


def test_an_accepted_key_covers_all_numbers_of_its_list_and_no_other_key() -> None:
    change = "optimizer.betas[1]: 0.95 -> 0.9"
    names = ("optimizer", "optimizer.betas", "optimizer.betas[1]", "optimizer.betas[0]", "optimizer.beta", "schedule")
    assert [covers(name, change) for name in names] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("saves", "validates", "steps", "meet"),
    [(2, 2, 10, None), (4, 2, 10, None), (2, 6, 10, None), (4, 6, 100, 12), (2, 20, 10, 20), (20, 2, 10, 20)],
)
def test_keep_best_needs_steps_that_are_saved_and_validated(
    saves: int, validates: int, steps: int, meet: int | None
) -> None:
    tables = _tables(
        run={"steps": steps},
        checkpoint={"every": saves, "keep_best": 1},
        validation={"sources": [{"path": "held_out.jsonl"}], "every": validates},
    )
    if meet is None:
        parse_config(tables)
        return
    message = f"checkpoint.every = {saves} and validation.every = {validates} first meet at step {meet}; "
    with pytest.raises(ValueError, match=message):
        parse_config(tables)


def test_a_decay_over_steps_in_a_run_over_epochs_is_refused() -> None:
    tables = _tables(schedule={"kind": "cosine"})
    del tables["run"]["steps"]
    tables["run"]["epochs"] = 1
    with pytest.raises(ValueError, match=r'set schedule.over = "data" or schedule.steps'):
        parse_config(tables)


def test_a_decay_longer_than_the_run_is_refused() -> None:
    tables = _tables(schedule={"kind": "wsd", "warmup": 5, "decay": 6}, run={"steps": 10})
    with pytest.raises(ValueError, match="warmup 5 and a decay of 6 steps exceed the 10 steps of the schedule"):
        parse_config(tables)
    tables["run"]["steps"] = 11
    assert parse_config(tables).schedule.decay_interval(11) == (5, 11)


def test_muon_with_adapters_is_refused() -> None:
    tables = _tables(optimizer={"kind": "muon"})
    tables["model"] = {"init_from": "a-model"}
    tables["lora"] = {"rank": 4}
    with pytest.raises(
        ValueError, match=r'optimizer.kind = "muon" .* set optimizer.kind = "adamw", or remove \[lora\]'
    ):
        parse_config(tables)
    tables["optimizer"]["kind"] = "adamw"
    parse_config(tables)


def test_float8_of_weights_in_4_bits_is_refused() -> None:
    tables = _tables(run={"steps": 3, "float8": True})
    tables["model"] = {"init_from": "a-model"}
    tables["lora"] = {"rank": 4, "quantize": "nf4"}
    with pytest.raises(ValueError, match=r'run.float8 would round the 4-bit weights .*"nf4" once more; remove one of'):
        parse_config(tables)
    del tables["lora"]["quantize"]
    parse_config(tables)


def test_a_decay_over_data_of_unknown_size_is_refused() -> None:
    source = {"path": "rows.jsonl", "streaming": True, "shuffle": "shards"}
    tables = _tables(schedule={"over": "data"}, data={"sources": [source]})
    del tables["run"]["steps"]
    tables["run"]["epochs"] = 1
    with pytest.raises(ValueError, match="needs the number of conversations, which is unknown for a streamed source"):
        parse_config(tables)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config '.*none.toml' cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ValueError, match=r"config '.*bad.toml' is not TOML"):
        load_config(tmp_path / "bad.toml")


def test_the_demo_and_all_examples_are_valid() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
    tables = [path for path in examples if path.stem.endswith("_data")]  # of other trainers' examples
    assert [path.name for path in tables] == ["automodel_data.toml", "torchtitan_data.toml"]
    for path in tables:
        msgspec.convert(read_toml(path)["data"], DataConfig)
    examples = [path for path in examples if path not in tables]
    assert [path.name for path in examples] == [
        *("demo.toml", "eight_gpus.toml", "lora.toml", "lora_8b.toml"),
        *("one_gpu.toml", "several_nodes.toml"),
    ]
    for path in examples:
        load_config(path)
