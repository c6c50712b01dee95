"""Changes in mid-run are refused, or accepted by name: then nothing is lost or repeated, and the state keeps the record."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny
from commands import run

from sftstream import DataConfig, PackLoader, describe
from sftstream.cli.main import main

ROWS = 70


@pytest.fixture
def config(tokenizer: str, tmp_path: Path) -> DataConfig:
    """Two epochs of 70 conversations, four steps of which are taken before anything changes."""
    rows = tiny.rows(ROWS)
    rows[7] = {"text": "?"}
    return tiny.data_config(tokenizer, tiny.write_jsonl(tmp_path / "rows.jsonl", rows))


def _taken(config: DataConfig, packs: int, state: Any = None) -> tuple[Counter[Any], dict[str, Any]]:
    """What some packs hold or refuse, by row and epoch, and the state after them."""
    loader = PackLoader(config, state=state)
    counts: Counter[Any] = Counter()
    for pack in (next(loader) for _ in range(packs)):
        counts.update(_rows(pack))
    return counts, loader.state_dict()


def _rows(pack: Any) -> list[Any]:
    return [s.ref for s in pack.segments if s.part == 0] + [(r.source, r.row, r.epoch) for r in pack.refused]


def _changed(config: DataConfig, accept: list[str], **changes: Any) -> DataConfig:
    return msgspec.structs.replace(config, accept_changed=tuple(accept), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity": 300},
        {"capacity": 1000, "overflow": "truncate"},
        {"global_batch": 12},
        {"window": 3},
        {"streams": 1},
        {"streams": 3},
        {"streams": 7},
        {"streams": 16, "global_batch": 6, "capacity": 512, "window": 20},
        {"train_turns": "last"},
        {"epochs": 3},
    ],
)
def test_after_an_accepted_change_every_conversation_still_comes_once_an_epoch(
    config: DataConfig, changes: dict[str, Any]
) -> None:
    before, state = _taken(config, 16)
    after = _changed(config, [f"data.{name}" for name in changes], **changes)
    loader = PackLoader(after, state=state)
    counts = before + Counter(row for pack in loader for row in _rows(pack))
    missing = {(0, row, epoch) for row in range(ROWS) for epoch in range(after.epochs or 0)} - set(counts)
    assert not missing
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("lowered", ["data.epochs", "data.sources[0].repeat"])
def test_epochs_below_those_already_read_end_the_run_and_may_be_raised_again(config: DataConfig, lowered: str) -> None:
    def passes(number: int) -> DataConfig:
        if lowered == "data.epochs":
            return _changed(config, [lowered], epochs=number)
        return _changed(config, [lowered], epochs=1, sources=(msgspec.structs.replace(source, repeat=number),))

    (source,) = config.sources
    before, state = _taken(passes(3), 40)
    assert {epoch for _, _, epoch in before} == {0, 1, 2}
    loader = PackLoader(passes(1), state=state)
    again = PackLoader(passes(1), state=loader.state_dict())
    waiting = Counter(row for pack in again for row in _rows(pack))
    counts = before + waiting + Counter(row for pack in loader for row in _rows(pack)) - waiting
    assert set(counts.values()) == {1}
    longer = PackLoader(passes(3), state=again.state_dict())
    counts += Counter(row for pack in longer for row in _rows(pack))
    assert counts == Counter({(0, row, epoch): 1 for row in range(ROWS) for epoch in range(3)})


def test_after_raised_epochs_a_state_still_cannot_have_read_more_than_all_epochs(config: DataConfig) -> None:
    _, state = _taken(config, 16)
    raised = PackLoader(_changed(config, ["data.epochs"], epochs=3), state=state).state.builtins()
    raised["streams"]["0"]["drawn"][0] = 10**9
    with pytest.raises(ValueError, match="1000000000 rows of source 0 were drawn, but all epochs have"):
        PackLoader(msgspec.structs.replace(config, epochs=3), state=tiny.resealed(raised))


def test_a_change_is_on_record_and_the_packs_go_on_from_it_exactly(config: DataConfig) -> None:
    _, state = _taken(config, 16)
    after = _changed(config, ["data.capacity", "data.streams"], capacity=512, streams=2)
    first = PackLoader(after, state=state)
    record = first.state_dict()["history"]
    assert record == [{"packs": 16, "differences": ["data.capacity: 256 -> 512", "data.streams: 4 -> 2"]}]
    assert "accepted at pack 16: data.capacity: 256 -> 512; data.streams: 4 -> 2" in describe(first.state_dict())
    packs = tiny.digests(first)
    second = PackLoader(after, state=state)
    assert tiny.digests(tiny.take(second, 4)) == packs[:4]
    plain = msgspec.structs.replace(after, accept_changed=())  # the state is of the new settings now
    assert tiny.digests(PackLoader(plain, state=second.state_dict())) == packs[4:]


def test_a_step_stays_a_step_under_another_global_batch(config: DataConfig) -> None:
    _, state = _taken(config, 16)
    loader = PackLoader(_changed(config, ["data.global_batch"], global_batch=12), state=state)
    assert loader.packs == 4 * 12
    assert len(loader.next_step()) == 12


def test_only_named_changes_are_accepted(config: DataConfig) -> None:
    _, state = _taken(config, 16)
    with pytest.raises(
        ValueError,
        match=r"data.streams: 4 -> 2. Restore .*; data.accept_changed = \['data.capacity', 'data.streams'\] accepts",
    ):
        PackLoader(_changed(config, ["data.capacity"], capacity=512, streams=2), state=state)
    with pytest.raises(ValueError, match=r"data.window: 8 -> 9"):
        PackLoader(_changed(config, ["data.epochs"], window=9), state=state)


def test_a_changed_source_can_be_accepted_by_its_number(config: DataConfig) -> None:
    _, state = _taken(config, 16)
    path = Path(config.sources[0].path)
    path.write_text(path.read_text() + json.dumps(tiny.rows(1)[0]) + "\n")
    with pytest.raises(ValueError, match=r"data.sources\[0\].files\[0\].sha256"):
        PackLoader(_changed(config, ["data.sources[1]"]), state=state)
    loader = PackLoader(_changed(config, ["data.sources[0]"]), state=state)
    assert [change["differences"][0].split(":")[0] for change in loader.state_dict()["history"]] == [
        "data.sources[0].files[0].size"
    ]
    assert len(list(loader)) > 0


def test_a_source_can_be_added_but_not_removed(config: DataConfig, tmp_path: Path) -> None:
    _, state = _taken(config, 16)
    more = tiny.write_jsonl(tmp_path / "more.jsonl", tiny.rows(10, seed=5))
    sources = (*config.sources, msgspec.structs.replace(config.sources[0], path=more))
    loader = PackLoader(_changed(config, ["data.sources[1]"], sources=sources), state=state)
    seen = Counter(s.row for pack in loader for s in pack.segments if s.source == 1)
    assert seen == dict.fromkeys(range(10), 2)
    with pytest.raises(ValueError, match="a source that was read from cannot be removed"):
        PackLoader(
            _changed(config, ["data.sources"]), state=PackLoader(msgspec.structs.replace(config, sources=sources)).state
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            "'rows.jsonl' lost rows (70 rows before, 2 now), so the rows still to come are unknown; restore the",
        ),
        (
            {"streaming": True},
            "'rows.jsonl' has other content than 'rows.jsonl' had, and rows of a streamed source are not",
        ),
    ],
)
def test_rows_inside_a_file_cannot_be_removed(config: DataConfig, changes: dict[str, Any], said: str) -> None:
    source = msgspec.structs.replace(config.sources[0], shuffle=False, **changes)
    config = msgspec.structs.replace(config, sources=(source,))
    _, state = _taken(config, 4)
    tiny.write_jsonl(Path(source.path), tiny.rows(2))
    with pytest.raises(ValueError, match=re.escape(f"data.sources[0]: {said}")):
        PackLoader(_changed(config, ["data.sources[0]"]), state=state)


def test_a_streamed_source_is_not_added_together_with_another_number_of_streams(
    config: DataConfig, tmp_path: Path
) -> None:
    weighted = msgspec.structs.replace(config.sources[0], weight=1)
    config = msgspec.structs.replace(config, sources=(weighted,))
    _, state = _taken(config, 16)
    more = tiny.write_jsonl(tmp_path / "more.jsonl", tiny.rows(10, seed=5))
    added = msgspec.structs.replace(weighted, path=more, streaming=True, shuffle="shards")
    changed = _changed(config, ["data"], sources=(weighted, added), streams=8)
    with pytest.raises(ValueError, match=r"a change of data.streams cannot be accepted with a streamed source"):
        PackLoader(changed, state=state)
    loader = PackLoader(_changed(changed, ["data"], streams=4), state=state)
    seen = Counter(segment.row for pack in loader for segment in pack.segments if segment.source == 1)
    assert seen == dict.fromkeys(range(10), 2)


@pytest.mark.parametrize("parts", [{"overflow": "split"}, {"history": "per_turn"}], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        {"train_on": ("assistant", "user")},
        {"train_turns": "last"},
        {"train_reasoning": False},
        {"train_tool_calls": False},
        {"history": "error"},
        {"overflow": "truncate"},
        {"capacity": 300},
    ],
    ids=str,
)
def test_a_change_of_the_parts_of_conversations_cannot_be_accepted(
    config: DataConfig, parts: dict[str, Any], change: dict[str, Any]
) -> None:
    config = msgspec.structs.replace(config, **parts)
    _, state = _taken(config, 16)
    (name,) = change
    message = f"a change of {name} cannot be accepted; restore the setting, or start a new run"
    with pytest.raises(ValueError, match=message):
        PackLoader(_changed(config, ["data"], **change), state=state)
    PackLoader(config, state=state)


@pytest.mark.parametrize(("field", "value"), [("seed", 5), ("shuffle", False)])
def test_a_change_of_the_order_of_rows_cannot_be_accepted(config: DataConfig, field: str, value: Any) -> None:
    _, state = _taken(config, 16)
    with pytest.raises(
        ValueError, match=f"a change of data.{field} cannot be accepted, since it decides the order of rows"
    ):
        PackLoader(_changed(config, [f"data.{field}"], **{field: value}), state=state)


def test_a_change_needs_a_steps_border_and_all_streams(config: DataConfig) -> None:
    _, inside = _taken(config, 6)
    after = _changed(config, ["data.capacity"], capacity=512)
    with pytest.raises(
        ValueError,
        match=r"the state was saved after 6 packs, inside a step of 4 packs; save a state at the end of a step",
    ):
        PackLoader(after, state=inside)
    _, state = _taken(config, 16)
    del state["streams"]["2"]
    with pytest.raises(
        ValueError, match="the state lacks 1 of 4 streams, and a change needs all; merge the shards' states"
    ):
        PackLoader(after, state=tiny.resealed(state))


def test_rebase_accepts_the_changes_of_the_config_and_those_of_the_option(config: DataConfig, tmp_path: Path) -> None:
    old, new, toml = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "run.toml"
    old.write_text(json.dumps(_taken(config, 16)[1]))

    def rebase(streams: int, capacity: int, accepted: list[str], *options: str) -> str:
        toml.write_text(
            f"[run]\nepochs = 2\n[data]\nstreams = {streams}\ncapacity = {capacity}\nglobal_batch = 4\nwindow = 8\n"
            f'accept_changed = {accepted}\n[data.tokenizer]\npath = "{config.tokenizer.path}"\n'
            f'[[data.sources]]\npath = "{config.sources[0].path}"\n'
        )
        return run(main, "rebase", old, toml, new, *options).stderr

    assert "data.streams: 4 -> 2" in rebase(2, 256, [])
    assert rebase(2, 256, ["data.streams"]) == ""
    assert "data.capacity: 256 -> 512" in rebase(2, 512, ["data.streams"])
    assert rebase(2, 512, ["data.streams"], "--accept", "data.capacity") == ""
    assert rebase(2, 512, [], "--accept", "data.capacity", "--accept", "data.streams") == ""
    assert "data.accept_changed holds 'streams'" in rebase(2, 256, ["streams"])


def test_a_state_file_is_rebased_looked_at_and_compared_on_the_command_line(config: DataConfig, tmp_path: Path) -> None:
    before, state = _taken(config, 16)
    old, new, toml = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "run.toml"
    old.write_text(json.dumps(state))
    toml.write_text(
        f"[run]\nepochs = 2\n[data]\nstreams = 2\ncapacity = 256\nglobal_batch = 4\nwindow = 8\n[data.tokenizer]\n"
        f'path = "{config.tokenizer.path}"\n[[data.sources]]\npath = "{config.sources[0].path}"\n'
    )
    refused = run(main, "rebase", old, toml, new)
    assert refused.exit_code == 1
    assert "data.streams: 4 -> 2" in refused.stderr
    assert run(main, "rebase", old, toml, new, "--accept", "streams").stderr == (
        "error: --accept 'streams' is no setting that a resume compares; write the name as a refused rebase prints it, "
        "for example --accept data.capacity or --accept 'data.sources[0]'\n"
    )
    assert run(main, "rebase", old, toml, new, "--accept", "data.streams").exit_code == 0
    assert "accepted at pack 16: data.streams: 4 -> 2" in run(main, "inspect", new).stdout
    compared = run(main, "diff", old, new)
    assert compared.exit_code == 1
    assert "state.identity.streams: 4 -> 2" in compared.stdout.splitlines()
    assert run(main, "diff", old, old).exit_code == 0
    loader = PackLoader(msgspec.structs.replace(config, streams=2), state=json.loads(new.read_text()))
    counts = before + Counter(row for pack in loader for row in _rows(pack))
    assert set(counts.values()) == {1}
    assert len(counts) == 2 * ROWS


@pytest.mark.parametrize(
    "change",
    [
        {"weights": (1, 3)},
        {"weights": (1, 1), "mix_by": "tokens"},
        {"weights": (1, 1, 2)},
        {"weights": (1, 3), "streams": 2},
    ],
)
def test_a_changed_mixture_holds_from_the_change_on(tokenizer: str, tmp_path: Path, change: dict[str, Any]) -> None:
    """A source with a larger weight than before, or an added source, does not come alone until it has caught up."""
    paths = [tiny.write_jsonl(tmp_path / f"{name}.jsonl", tiny.rows(40, seed=n)) for n, name in enumerate("abc")]

    def configured(weights: tuple[int, ...], **changes: Any) -> DataConfig:
        sources = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=False)]
        return tiny.data_config(tokenizer, sources=sources, **{"epochs": None, "streams": 4} | changes)

    loader = PackLoader(configured((1, 1)))
    tiny.take(loader, 200)
    changed = configured(accept_changed=("data",), **change)
    loader = PackLoader(changed, state=loader.state_dict())
    before = sum((Counter(dict(enumerate(stream.drawn))) for stream in loader.state.streams.values()), Counter())
    tiny.take(loader, 80)
    after = sum((Counter(dict(enumerate(stream.drawn))) for stream in loader.state.streams.values()), Counter())
    weights = change["weights"]
    drawn = [after[source] - before[source] for source in range(len(weights))]
    for weight, rows in zip(weights, drawn, strict=True):
        assert rows / sum(drawn) == pytest.approx(weight / sum(weights), abs=0.06)
