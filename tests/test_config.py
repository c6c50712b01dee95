"""The `[data]` table is checked at the door: names, types with their paths, and every limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from sftstream import DataConfig, SourceConfig, TokenizerConfig
from sftstream.config import MOST, StageConfig
from sftstream.toml_file import read_data_config

TABLE: dict[str, Any] = {"sources": [{"path": "a.jsonl"}], "tokenizer": {"path": "tokenizer"}}


def config(**changes: Any) -> DataConfig:
    return msgspec.convert(TABLE | changes, DataConfig)


def error(**changes: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as raised:
        config(**changes)
    return str(raised.value)


def test_a_table_is_typed_and_has_its_defaults() -> None:
    expected = DataConfig(
        sources=(SourceConfig(path="a.jsonl", weight=None),),
        tokenizer=TokenizerConfig(path="tokenizer", template=None, date=None),
        streams="auto",
        capacity=8192,
        global_batch=64,
        shuffle=True,
        train_on=("assistant",),
        window=256,
        workers=1,
        prefetch=16,
        seed=0,
        epochs=None,
    )
    assert config() == expected
    assert (
        msgspec.toml.decode('sources = [{path = "a.jsonl"}]\ntokenizer = {path = "tokenizer"}', type=DataConfig)
        == expected
    )


def test_a_source_is_verified_unless_its_own_key_says_otherwise() -> None:
    sources = config(sources=[{"path": "a"}, {"path": "b", "verified": False}, {"path": "c", "verified": True}]).sources
    assert [source.verified for source in sources] == [True, False, True]


def test_a_config_survives_being_written_down() -> None:
    given = config(streams=16, epochs=2, sources=[{"path": "b"}, {"path": "c"}])
    assert msgspec.json.decode(msgspec.json.encode(given), type=DataConfig) == given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": 4}, "Object contains unknown field `stream`"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "Object contains unknown field `wieght` - at `$.sources[0]`"),
        ({"tokenizer": {"path": "a", "dates": ""}}, "Object contains unknown field `dates` - at `$.tokenizer`"),
        ({"tokenizer": {}}, "Object missing required field `path` - at `$.tokenizer`"),
        ({"sources": [{}]}, "Object missing required field `path` - at `$.sources[0]`"),
        ({"sources": {"path": "a"}}, "Expected `array`, got `object` - at `$.sources`"),
        ({"streams": "64"}, "Invalid enum value '64' - at `$.streams`"),
        ({"streams": 1.5}, "Expected `int | str`, got `float` - at `$.streams`"),
        ({"streams": True}, "Expected `int | str`, got `bool` - at `$.streams`"),
        ({"capacity": None}, "Expected `int`, got `null` - at `$.capacity`"),
        ({"shuffle": 1}, "Expected `bool | str`, got `int` - at `$.shuffle`"),
        ({"epochs": "2"}, "Expected `int | null`, got `str` - at `$.epochs`"),
        ({"sources": [{"path": 5}]}, "Expected `str`, got `int` - at `$.sources[0].path`"),
        ({"sources": [{"path": "a", "verified": 0}]}, "Expected `bool`, got `int` - at `$.sources[0].verified`"),
        ({"sources": [{"path": "a", "verified": "no"}]}, "Expected `bool`, got `str` - at `$.sources[0].verified`"),
        ({"train_on": ["oracle"]}, "Invalid enum value 'oracle' - at `$.train_on[0]`"),
        ({"train_on": "assistant"}, "Expected `array`, got `str` - at `$.train_on`"),
    ],
)
def test_a_wrong_name_or_type_is_an_error_with_its_path(changes: dict[str, Any], message: str) -> None:
    assert error(**changes) == message


def test_a_table_without_a_required_key_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError, match="Object missing required field `sources`"):
        msgspec.convert({}, DataConfig)


@pytest.mark.parametrize("field", ["streams", "capacity", "global_batch", "window", "prefetch"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_must_be_at_least_one(field: str, value: int) -> None:
    assert error(**{field: value}) == f"{field} = {value} must be at least 1"
    assert getattr(config(**{field: 1}), field) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": -1}, "workers = -1 must be 0 (load in the training process) or more"),
        ({"epochs": 0}, "epochs = 0 must be at least 1; leave it out for an endless stream"),
        ({"train_on": []}, 'train_on is empty, so nothing would be trained; name a role: ["assistant"]'),
        ({"sources": []}, "sources is empty; name at least one [[data.sources]] with a path"),
        (
            {"sources": [{"path": ""}]},
            "path is empty; name a file, a glob, a directory or a dataset - at `$.sources[0]`",
        ),
        (
            {"sources": [{"path": "a", "columns": {}}]},
            "columns is empty, so no column would be read; name at least one column, or leave columns out - at `$.sources[0]`",
        ),
        (
            {"sources": [{"path": "a", "columns": {"prompt": "q"}, "ignore": ["q"]}]},
            "columns and ignore both name 'q'; remove the name from one of the two - at `$.sources[0]`",
        ),
        (
            {"sources": [{"path": "a", "roles": {"narrator": "owner"}}]},
            "Invalid enum value 'owner' - at `$.sources[0].roles[...]`",
        ),
        ({"sources": [{"path": "a", "max_row_bytes": 0}]}, "max_row_bytes = 0 must be at least 1 - at `$.sources[0]`"),
        ({"sources": [{"path": "a", "weight": 0}]}, "weight = 0.0 must be a positive number - at `$.sources[0]`"),
        ({"sources": [{"path": "a", "weight": -2}]}, "weight = -2.0 must be a positive number - at `$.sources[0]`"),
        (
            {"sources": [{"path": "a", "weight": float("nan")}]},
            "weight = nan must be a positive number - at `$.sources[0]`",
        ),
        (
            {"sources": [{"path": "a", "weight": float("inf")}]},
            "weight = inf must be at most 1000000000000000 - at `$.sources[0]`",
        ),
        (
            {"sources": [{"path": "a", "weight": 1}, {"path": "b"}]},
            "source 'b' has no weight but another source has; give weights to all sources or to none",
        ),
        ({"sources": [{"path": "a", "repeat": 0}]}, "repeat = 0.0 must be a positive number - at `$.sources[0]`"),
        (
            {"sources": [{"path": "a", "repeat": 2}], "epochs": None},
            "repeat needs data.epochs; set data.epochs, or mix an endless stream by weights",
        ),
        (
            {"stages": [{"after": 5, "weights": [1]}]},
            "stages change weights; give each source a weight for the beginning of the run",
        ),
        (
            {"stages": [{"after": 0, "weights": [1]}]},
            "after = 0 must be at least 1; give the weights of the run's beginning in the sources - at `$.stages[0]`",
        ),
        (
            {"stages": [{"after": 5, "weights": [0]}]},
            "weights = [0.0] must lie between 0 and 1000000000000000, with at least one above 0 - at `$.stages[0]`",
        ),
        (
            {"sources": [{"path": "a", "weight": 1}], "stages": [{"after": 5, "weights": [1, 2]}]},
            "a stage has 2 weights for 1 sources; give one for each",
        ),
        (
            {
                "sources": [{"path": "a", "weight": 1}],
                "stages": [{"after": 5, "weights": [1]}, {"after": 5, "weights": [2]}],
            },
            "stage after = 5 follows 5; order the stages by rising after",
        ),
    ],
)
def test_a_value_beyond_its_limit_is_an_error_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    assert error(**changes) == message


def test_limits_hold_for_a_config_made_in_python_too() -> None:
    with pytest.raises(ValueError, match="streams = 0 must be at least 1"):
        DataConfig(sources=(SourceConfig(path="a"),), tokenizer=TokenizerConfig(path="t"), streams=0)


def test_a_config_cannot_be_changed() -> None:
    given = config()
    with pytest.raises(AttributeError, match="immutable type"):
        given.streams = 5  # type: ignore[misc]


@pytest.mark.parametrize("field", MOST)
def test_a_number_far_above_any_use_is_refused_at_once(tmp_path: Path, field: str) -> None:
    source = {"path": "rows.jsonl", "weight": 1.0}
    table: dict[str, Any] = {"sources": [source], "tokenizer": {"path": "none"}, "epochs": 1}
    holder = source if field in ("max_row_bytes", "repeat", "weight") else table
    if field == "after":
        holder = {"weights": [1.0]}
        table["stages"] = [holder]
    holder[field] = MOST[field]
    msgspec.convert(table, DataConfig)
    for value in (MOST[field] + 1, 10 * MOST[field]):
        holder[field] = value
        with pytest.raises(msgspec.ValidationError, match=rf"{field} = .* must be at most {MOST[field]}"):
            msgspec.convert(table, DataConfig)


def test_every_whole_number_of_the_data_table_has_a_largest_value() -> None:
    for struct in (DataConfig, SourceConfig, StageConfig):
        for field in msgspec.structs.fields(struct):
            if int in (field.type, *get_args(field.type)):
                assert field.name in MOST, field.name


def test_the_data_table_of_a_run_keeps_its_accepted_changes_unless_others_are_given(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\nseed = 3\n[data]\nsources = [{path = "x.jsonl"}]\ntokenizer = {path = "y"}\naccept_changed = ["data.seed"]'
    )
    assert (read_data_config(path).seed, read_data_config(path).accept_changed) == (3, ("data.seed",))
    assert read_data_config(path, []).accept_changed == ()
