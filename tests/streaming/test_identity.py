"""A state resumes on exactly what it was taken from; any other byte or setting is an error that names it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny

from sftstream import DataConfig, PackLoader, Shard, SkipConfig, SourceConfig
from sftstream.identity import IN_OTHER_FORM, WITHOUT_EFFECT, Identity, SourceIdentity, differences

TODAY = "2026-08-21"


class Workspace:
    """A directory with everything that a stream is made of."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings: dict[str, Any] = {}
        self.tokenizer = tiny.save_tokenizer(directory / "tokenizer", tiny.DATED_TEMPLATE)
        tiny.write_jsonl(directory / "a.jsonl", tiny.rows(20))
        tiny.write_json(directory / "b.json", tiny.rows(10, seed=1))
        tiny.write_parquet(directory / "c.parquet", tiny.rows(10, seed=2))

    def config(self) -> DataConfig:
        names = ("a.jsonl", "b.json", "c.parquet")
        table = {
            "sources": [{"path": str(self.directory / name)} for name in names],
            "tokenizer": {"path": str(self.directory / "tokenizer"), "date": TODAY},
        }
        return tiny.data_config(**table | self.settings)

    def load(self, state: Any = None) -> PackLoader:
        return PackLoader(self.config(), state=state)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "here")


def test_the_advice_accepts_all_differences_and_keeps_the_accepted_names(workspace: Workspace) -> None:
    state = workspace.load().state_dict()
    workspace.settings |= {"capacity": 300, "accept_changed": ["data.template_sha256"]}
    with (workspace.directory / "a.jsonl").open("ab") as file:
        file.write(tiny.json_lines(tiny.rows(3, seed=3)))
    with pytest.raises(ValueError, match="would not be exact") as error:
        workspace.load(state)
    names = ["data.template_sha256", "data.capacity", "data.sources[0]"]
    assert f"; data.accept_changed = {names} accepts the change" in str(error.value)


def refusal(workspace: Workspace, state: Any) -> str:
    with pytest.raises(
        ValueError, match=r"^the state was taken from other data or settings, and a resume .*; or start|."
    ) as error:
        workspace.load(state)
    message = str(error.value)
    assert message.startswith("the state was taken from other data or settings, and a resume would not be exact: ")
    changes, remedy = message.split("exact: ")[1].split(". Restore them, or start a new run")
    advised = re.fullmatch(
        r"; data.accept_changed = \[(.*)\] accepts the change, goes on from here, and records the change in the state",
        remedy,
    )
    assert advised or remedy == ""
    names = tuple(re.findall(r"'(.*?)'", advised[1])) if advised else ("data",)
    accepted = msgspec.structs.replace(workspace.config(), accept_changed=names)
    try:
        PackLoader(accepted, state=state)
    except ValueError:
        assert remedy == ""
    else:
        assert advised
    return changes


def state_of(workspace: Workspace) -> dict[str, Any]:
    loader = workspace.load()
    tiny.take(loader, 4)
    return loader.state_dict()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"streams": 8}, "data.streams: 4 -> 8"),
        ({"capacity": 255}, "data.capacity: 256 -> 255"),
        ({"global_batch": 8}, "data.global_batch: 4 -> 8"),
        ({"window": 9}, "data.window: 8 -> 9"),
        ({"shuffle": False}, "data.shuffle: True -> False"),
        ({"seed": 1}, "data.seed: 0 -> 1"),
        ({"epochs": 3}, "data.epochs: 2 -> 3"),
        ({"epochs": None}, "data.epochs: 2 -> None"),
    ],
)
def test_another_setting_is_refused_by_name(workspace: Workspace, settings: dict[str, Any], named: str) -> None:
    state = state_of(workspace)
    workspace.settings = settings
    assert refusal(workspace, state) == named


def test_another_date_is_refused_by_name(workspace: Workspace) -> None:
    state = state_of(workspace)
    workspace.settings = {"tokenizer": {"path": workspace.tokenizer, "date": "2026-08-22"}}
    assert refusal(workspace, state) == "data.date: '2026-08-21' -> '2026-08-22'"


def test_a_date_that_the_config_does_not_name_is_kept_from_the_start(workspace: Workspace) -> None:
    state = state_of(workspace)
    workspace.settings = {"tokenizer": {"path": workspace.tokenizer}}
    resumed = workspace.load(state)
    assert resumed.state.identity.date == TODAY
    expected = workspace.load()
    assert expected.state.identity.date != TODAY
    assert "21 Aug 2026" in resumed.encoder.tokenizer.hf.decode(next(resumed).input_ids)


@pytest.fixture
def on_another_day(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A time zone in which another day is written than in UTC, at any hour."""
    monkeypatch.setenv("TZ", "EARLY-14" if datetime.now(UTC).hour >= 10 else "LATE+12")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_date_that_nobody_names_is_the_day_in_utc(workspace: Workspace, on_another_day: None) -> None:
    workspace.settings = {"tokenizer": {"path": workspace.tokenizer}}
    before = datetime.now(UTC).date().isoformat()
    date = workspace.load().state.identity.date
    assert date in (before, datetime.now(UTC).date().isoformat())
    assert date != datetime.now().date().isoformat()


def test_a_loader_of_one_of_several_shards_needs_a_date(workspace: Workspace) -> None:
    config, state = workspace.config(), state_of(workspace)
    undated = msgspec.structs.replace(config, tokenizer=msgspec.structs.replace(config.tokenizer, date=None))
    with pytest.raises(
        ValueError, match=r"each of 2 shards would print the day of its own start; set data\.tokenizer\.date"
    ):
        PackLoader(undated, shard=Shard(0, 2))
    assert PackLoader(undated, shard=Shard(0, 1)).state.identity.date != TODAY
    assert PackLoader(config, shard=Shard(0, 2)).state.identity.date == TODAY
    assert PackLoader(undated, shard=Shard(0, 2), state=state).state.identity.date == TODAY


def test_a_template_without_a_date_keeps_none(tokenizer: str, corpus_path: str) -> None:
    assert PackLoader(tiny.data_config(tokenizer, corpus_path)).state.identity.date is None


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("share_of_file", [0.1, 0.5, 0.9])
def test_one_other_byte_in_a_source_file_is_refused_by_name(
    workspace: Workspace, index: int, share_of_file: float
) -> None:
    state = state_of(workspace)
    name = ("a.jsonl", "b.json", "c.parquet")[index]
    file = workspace.directory / name
    content = bytearray(file.read_bytes())
    words = [match.start() for match in re.finditer(b"stone", content)]
    content[words[int(len(words) * share_of_file)]] = ord("z")
    file.write_bytes(content)
    assert re.fullmatch(
        rf"data.sources\[{index}\].files\[0\].sha256: '[0-9a-f]{{64}}' -> '[0-9a-f]{{64}}'", refusal(workspace, state)
    )


def test_a_file_that_grew_was_renamed_or_came_on_top_is_refused(workspace: Workspace) -> None:
    workspace.settings = {"sources": [{"path": f"{workspace.directory}/a*.jsonl"}]}
    state = state_of(workspace)
    extra = workspace.directory / "a2.jsonl"
    tiny.write_jsonl(extra, tiny.rows(1, seed=9))
    assert "data.sources[0].files[1]: None -> {'name': 'a2.jsonl', 'size': " in refusal(workspace, state)
    assert "data.sources[0].rows: 20 -> 21" in refusal(workspace, state)
    extra.unlink()
    (workspace.directory / "a.jsonl").rename(extra)
    assert refusal(workspace, state) == "data.sources[0].files[0].name: 'a.jsonl' -> 'a2.jsonl'"
    with extra.open("a") as file:
        file.write("\n")
    assert "data.sources[0].files[0].size: " in refusal(workspace, state)


def test_other_sources_orders_and_weights_are_refused(workspace: Workspace) -> None:
    sources = [{"path": str(workspace.directory / name), "weight": 1.0} for name in ("a.jsonl", "b.json")]
    workspace.settings = {"sources": sources, "epochs": None}
    state = state_of(workspace)
    workspace.settings = {"sources": sources[::-1], "epochs": None}
    assert "data.sources[0].files[0].name: 'a.jsonl' -> 'b.json'" in refusal(workspace, state)
    workspace.settings = {"sources": [sources[0], sources[1] | {"weight": 1.5}], "epochs": None}
    assert refusal(workspace, state) == "data.sources[1].weight: 1.0 -> 1.5"
    workspace.settings = {"sources": sources[:1], "epochs": None}
    assert refusal(workspace, state).startswith("data.sources[1]: {'files': ({'name': 'b.json', 'size': ")


def test_another_template_is_refused_by_name(workspace: Workspace) -> None:
    state = state_of(workspace)
    tokenizer = {"path": workspace.tokenizer, "date": TODAY, "template": tiny.DATED_TEMPLATE + "{#- -#}"}
    workspace.settings = {"tokenizer": tokenizer}
    assert re.fullmatch("data.template_sha256: '.*' -> '.*'", refusal(workspace, state))
    workspace.settings = {"tokenizer": tokenizer | {"template": tiny.DATED_TEMPLATE}}
    workspace.load(state)


@pytest.mark.parametrize(
    "changes", [{"bos_token": "<|end_of_text|>"}, {"pad_token": "<|eom_id|>"}, {"eos_token": "<|eom_id|>"}]
)
def test_another_special_token_is_refused_by_name(workspace: Workspace, changes: dict[str, str]) -> None:
    state = state_of(workspace)
    tiny.save_tokenizer(Path(workspace.tokenizer), tiny.DATED_TEMPLATE, **changes)
    assert re.fullmatch("data.tokenizer_sha256: '.*' -> '.*'", refusal(workspace, state))


def test_another_vocabulary_is_refused_by_name(workspace: Workspace) -> None:
    state = state_of(workspace)
    file = Path(workspace.tokenizer) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["river"], vocabulary["stone"] = vocabulary["stone"], vocabulary["river"]
    file.write_text(json.dumps(content))
    assert re.fullmatch("data.tokenizer_sha256: '.*' -> '.*'", refusal(workspace, state))


@pytest.mark.parametrize("number", [2, 5])
def test_a_state_of_an_unknown_format_is_refused(workspace: Workspace, number: int) -> None:
    state = state_of(workspace)
    state["identity"]["format"] = number
    message = (
        f"the state has format {number}, and this version of sftstream reads formats 3 and 4; "
        "resume with the version that wrote the state"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        workspace.load(state)


@pytest.mark.parametrize("name", ["data.capacty", "capacity", "data.sources1", "data.sources[0", "", "data."])
def test_an_accepted_name_of_no_setting_is_refused(workspace: Workspace, name: str) -> None:
    state = state_of(workspace)
    workspace.settings = {"accept_changed": (name,)}
    with pytest.raises(
        ValueError, match=re.escape(f"data.accept_changed holds {name!r}, but a resume compares no such")
    ):
        workspace.load(state)


def test_accepted_names_of_unchanged_settings_have_no_effect(workspace: Workspace) -> None:
    state = state_of(workspace)
    workspace.settings = {"accept_changed": ("data", "data.capacity", "data.sources[0].files[0].sha256", "data.skip")}
    assert workspace.load(state).state_dict() == state


def test_several_changes_are_all_named(workspace: Workspace) -> None:
    state = state_of(workspace)
    workspace.settings = {"seed": 1, "window": 4, "capacity": 128}
    assert refusal(workspace, state) == "data.capacity: 256 -> 128; data.window: 8 -> 4; data.seed: 0 -> 1"


def test_files_may_move_and_be_touched(workspace: Workspace, tmp_path: Path) -> None:
    loader = workspace.load()
    tiny.take(loader, 4)
    state = loader.state_dict()
    moved = tmp_path / "there" / "deeper"
    shutil.copytree(workspace.directory, moved, copy_function=shutil.copyfile)
    shutil.rmtree(workspace.directory)
    workspace.directory = moved
    resumed = workspace.load(state)
    assert tiny.digests(resumed) == tiny.digests(loader)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("ignore", ["note"], "data.sources[0].ignore: None -> ('note',)"),
        ("max_row_bytes", 1000, "data.sources[0].max_row_bytes: None -> 1000"),
        ("roles", {"narrator": "user"}, "data.sources[0].roles: None -> {'narrator': 'user'}"),
    ],
)
def test_a_younger_setting_is_in_the_identity_only_while_it_differs_from_its_default(
    workspace: Workspace, field: str, value: Any, named: str
) -> None:
    source = {"path": f"{workspace.directory}/a.jsonl"}
    workspace.settings = {"sources": [source]}
    state = state_of(workspace)
    assert field not in state["identity"]["sources"][0]
    workspace.settings = {"sources": [source | {field: value}]}
    assert refusal(workspace, state) == named
    state = state_of(workspace)
    assert field in state["identity"]["sources"][0]
    workspace.load(state)


@pytest.mark.parametrize("settings", [{"workers": 2}, {"prefetch": 1}])
def test_workers_and_prefetch_are_no_part_of_the_identity(workspace: Workspace, settings: dict[str, Any]) -> None:
    state = state_of(workspace)
    expected = workspace.load(state)
    workspace.settings = settings
    assert tiny.digests(workspace.load(state)) == tiny.digests(expected)


def test_differences_are_named_by_their_paths() -> None:
    before = {"a": 1, "b": [1, {"c": 2}], "d": (1, 2), "e": None, "same": [1]}
    after = {"a": 2, "b": [1, {"c": 3}], "d": [1, 2], "f": "x" * 100, "same": (1,)}
    assert differences(before, after, "p") == [
        "p.a: 1 -> 2",
        "p.b[1].c: 2 -> 3",
        f"p.f: None -> '{'x' * 68}...",
    ]
    assert differences({"a": [1, 2]}, {"a": [1]}) == ["data.a[1]: 2 -> None"]


def test_many_differences_are_cut_short(workspace: Workspace) -> None:
    for i in range(9):
        tiny.write_jsonl(workspace.directory / f"x{i}.jsonl", [tiny.chat("Well?", "Yes.")])
    workspace.settings = {"sources": [{"path": f"{workspace.directory}/x*.jsonl"}]}
    state = state_of(workspace)
    for i in range(9):
        tiny.write_jsonl(workspace.directory / f"x{i}.jsonl", [tiny.chat("Well?", "Yes!!")])
    assert refusal(workspace, state).endswith("; and 8 more")


@pytest.mark.parametrize(("config", "identity"), [(DataConfig, Identity), (SourceConfig, SourceIdentity)])
def test_every_config_field_is_in_the_identity_or_on_a_list_of_exceptions(config: Any, identity: Any) -> None:
    in_other_form, without_effect = IN_OTHER_FORM[config], WITHOUT_EFFECT[config]
    assert not in_other_form & without_effect
    assert in_other_form | without_effect <= set(config.__struct_fields__)
    compared = set(config.__struct_fields__) - in_other_form - without_effect
    assert compared <= set(identity.__struct_fields__)
    assert not without_effect & set(identity.__struct_fields__)


def test_the_identity_of_default_settings_is_as_stored_before(tokenizer: str, tmp_path: Path) -> None:
    """Where this test fails on purpose, states of before cannot be resumed any more: raise `identity.FORMAT`."""
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(3))
    table = {"sources": [{"path": path}], "tokenizer": {"path": tokenizer, "backend": "huggingface"}}
    identity = PackLoader(msgspec.convert(table, DataConfig), workers=0).state_dict()["identity"]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    sha256 = identity["sources"][0]["files"][0]["sha256"]
    assert identity == {
        "train_on": ["assistant"],
        "train_turns": "all",
        "train_reasoning": True,
        "train_tool_calls": True,
        "history": "as_rendered",
        "overflow": "drop",
        "capacity": 8192,
        "format": 4,
        "sources": [
            {
                "files": [
                    {"name": "rows.jsonl", "size": Path(path).stat().st_size, "sha256": sha256, "sampled": False}
                ],
                "rows": 3,
                "weight": None,
                "repeat": 1.0,
                "columns": None,
                "shuffle": None,
                "shards": None,
            }
        ],
        "tokenizer_sha256": identity["tokenizer_sha256"],
        "fast_tokenizer": None,
        "versions": {name: metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "template_sha256": hashlib.sha256(tiny.TEMPLATE.encode()).hexdigest(),
        "date": None,
        "form": [header, header, ["<|eot_id|>"], [], False],
        "streams": 1,
        "global_batch": 64,
        "window": 256,
        "shuffle": True,
        "seed": 0,
        "epochs": None,
        "mix_by": "conversations",
        "stages": [],
        "ends_with": "all",
    }


def test_settings_that_an_identity_leaves_out_keep_their_defaults() -> None:
    """The default of such a setting must never change: a state of before means the default of before."""
    younger = {
        (config.__name__, field.name): config_field.default
        for config, identity in ((DataConfig, Identity), (SourceConfig, SourceIdentity))
        for field in msgspec.structs.fields(identity)
        for config_field in msgspec.structs.fields(config)
        if field.name == config_field.name and field.default is msgspec.UNSET
    }
    assert younger == {
        ("DataConfig", "skip"): SkipConfig(),
        ("SourceConfig", "ignore"): (),
        ("SourceConfig", "roles"): None,
        ("SourceConfig", "max_row_bytes"): 16 << 20,
        ("SourceConfig", "verified"): True,
    }
