"""A tracker gets numbers, digests and fixed choices; texts of the config only by choice."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from made_runs import line
from runs import run_config

from trainer.config import TrainConfig
from trainer.config_file import parse_config
from trainer.track.config import TrackerConfig
from trainer.track.content import About, settings_of, step_of

PRIVATE = ("/data/patients.jsonl", "/models/tokenizer", "/secret/run", "Dear patient", "/held/out.jsonl", "/base/model")


def _config() -> TrainConfig:
    tables = run_config(
        PRIVATE[1],
        PRIVATE[0],
        run={"root": PRIVATE[2]},
        validation={"sources": [{"path": PRIVATE[4]}]},
        model={"init_from": PRIVATE[5]},
    )
    tables["model"] = {"init_from": PRIVATE[5]}
    tables["data"]["tokenizer"]["variables"] = {"system": PRIVATE[3], "n": 3}
    return parse_config(tables)


def _about(config: TrainConfig) -> About:
    settings, texts = settings_of(config)
    return About(token="t", name="n", trackers=(), settings=settings, texts=texts, digests={"data": "d1"})


def test_no_path_or_text_is_sent_by_default() -> None:
    sent = _about(_config()).sent_to(TrackerConfig(kind="mlflow"))
    assert not [value for value in sent.values() for text in PRIVATE if text in str(value)]
    assert sent["data.capacity"] == 256
    assert sent["optimizer.learning_rate"] == 1e-2
    assert sent["run.weights_dtype"] == "auto"
    assert sent["data.train_on.0"] == "assistant"
    assert sent["run.deterministic"] is True
    assert sent["digest.data"] == "d1"


def test_paths_are_sent_by_choice_and_the_variables_of_a_template_never() -> None:
    sent = _about(_config()).sent_to(TrackerConfig(kind="mlflow", paths=True))
    assert sent["data.sources.0.path"] == PRIVATE[0]
    assert sent["run.root"] == PRIVATE[2]
    assert not [value for value in sent.values() if "patient " in str(value) or value == PRIVATE[3]]


def test_a_path_with_the_name_of_a_choice_of_another_key_is_no_setting() -> None:
    config = _config()
    data = msgspec.structs.replace(config.data, tokenizer=msgspec.structs.replace(config.data.tokenizer, path="auto"))
    settings, texts = settings_of(msgspec.structs.replace(config, data=data))
    assert "data.tokenizer.path" not in settings
    assert texts["data.tokenizer.path"] == "auto"


def test_the_numbers_of_a_step_are_sent_without_its_texts() -> None:
    step = step_of(line(3, tokens_by_source=[5, 6], validated=True, note="hello", mfu=None))
    assert step.number == 3
    assert step.time == 1003.0
    assert step.values == {
        "loss": 7.0,
        "refused": 1.0,
        "refused_by_reason/too_long": 1.0,
        "tokens_by_source/0": 5.0,
        "tokens_by_source/1": 6.0,
        "validated": 1.0,
    }


@pytest.mark.parametrize("name", ["/data/patients.jsonl", "s3://bucket/x", "line\nbreak", "é", ""])
def test_a_path_as_the_name_of_a_number_is_replaced_by_its_place(name: str) -> None:
    assert step_of({"step": 1, "loss_by_source": {"code": 1.0, name: 2.0}}).values == {
        "loss_by_source/code": 1.0,
        "loss_by_source/1": 2.0,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "comet"}, "Invalid enum value 'comet'"),
        ({"project": " "}, "project = ' ' must be a line of 1 to 200 printable characters"),
        ({"name": "a\nb"}, "name = 'a\\nb' must be a line"),
        ({"url": "ftp://x"}, "begin with http:// or https:// or sqlite://"),
        ({"url": "https://me:word@host"}, "url holds a user, password or token"),
        ({"url": "https://host?write_token=x"}, "url holds a user, password or token"),
        ({"paths": "yes"}, "Expected `bool`"),
    ],
)
def test_a_wrong_tracker_is_refused_with_its_key(changes: dict[str, object], message: str) -> None:
    tables = run_config("t", "s", trackers={})
    tables["trackers"] = [{"kind": "mlflow"} | changes]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"trackers\[0\]|\$\.trackers") as caught:
        parse_config(tables)
    assert message in str(caught.value)


def test_two_tables_for_the_same_run_of_a_tracker_are_refused() -> None:
    tables = run_config("t", "s", trackers={})
    tables["trackers"] = [{"kind": "mlflow"}, {"kind": "mlflow", "paths": True}]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="would get each step twice"):
        parse_config(tables)
    tables["trackers"] = [{"kind": "mlflow"}, {"kind": "mlflow", "project": "other"}]  # type: ignore[assignment]
    assert len(parse_config(tables).trackers) == 2


def test_a_password_is_not_in_the_address(tmp_path: Path) -> None:
    assert TrackerConfig(kind="mlflow", url="sqlite:////a/b.db").target == (
        "mlflow",
        "sftstream",
        None,
        "sqlite:////a/b.db",
    )
