"""Over an accepted change each waiting row, and each waiting part of a row, is given or listed once."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import DataConfig, Pack, PackLoader

LONG = tiny.chat(*["north " * 14] * 12)
"""Six exchanges. Under `split`, a pack of 160 tokens holds one."""
SHORT = tiny.chat(*["north " * 14] * 4)
"""Two exchanges."""
LONGER_TEMPLATE = tiny.TEMPLATE.replace("{{- bos_token }}", '{{- bos_token + "Read slowly. " }}')


def _config(tokenizer: str | dict[str, str], path: str, **changes: Any) -> DataConfig:
    table = {"streams": 1, "global_batch": 1, "capacity": 160, "window": 4, "epochs": 1, "overflow": "split"}
    return tiny.data_config(
        tokenizer, path, **{"shuffle": False, "max_refused": 1.0, "max_too_long": 1.0} | table | changes
    )


def _parts(packs: list[Pack]) -> Counter[tuple[int, int]]:
    """(row, part) of all segments."""
    return Counter((segment.row, segment.part) for pack in packs for segment in pack.segments)


def _half_given(config: DataConfig) -> tuple[list[Pack], PackLoader]:
    """The packs up to the third part of row 0, and the loader after them."""
    loader = PackLoader(config)
    packs = [next(loader)]
    while sum(row == 0 for row, _ in _parts(packs)) < 3:
        packs.append(next(loader))
    return packs, loader


def test_the_waiting_parts_of_a_row_follow_under_another_template(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [LONG, *tiny.rows(6)])
    given, loader = _half_given(_config(tokenizer, path))
    changed = {"path": tokenizer, "template": LONGER_TEMPLATE}
    config = _config(changed, path, accept_changed=("data",))
    after = list(PackLoader(config, state=loader.state_dict()))
    assert {part for row, part in _parts(given) if row == 0} < set(range(6))
    parts = _parts(given + after)
    assert set(parts.values()) == {1}
    assert {part for row, part in parts if row == 0} == set(range(6))
    assert {row for row, _ in parts} == set(range(7))
    assert not [refusal for pack in after for refusal in pack.refused]


def test_waiting_parts_that_a_changed_row_no_longer_has_are_listed(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [LONG, *tiny.rows(6)])
    given, loader = _half_given(_config(tokenizer, path))
    tiny.write_jsonl(tmp_path / "a.jsonl", [SHORT, *tiny.rows(6)])
    config = _config(tokenizer, path, accept_changed=("data",))
    after = list(PackLoader(config, state=loader.state_dict()))
    parts = _parts(given + after)
    assert set(parts.values()) == {1}
    waited = set(range(6)) - {part for row, part in _parts(given) if row == 0}
    assert {part for row, part in _parts(after) if row == 0} == waited & {0, 1}
    (refusal,) = [refusal for pack in after for refusal in pack.refused]
    assert (refusal.row, refusal.reason) == (0, "part no longer there")
    assert refusal.detail == f"the parts {sorted(waited - {0, 1})} waited, but the row has 2 parts now"


def test_waiting_rows_that_a_change_refuses_are_listed_once_and_counted_once(tokenizer: str, tmp_path: Path) -> None:
    """Also by a stream that has nothing else left to give."""
    rows = tiny.rows(12)
    path = tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    loader = PackLoader(_config(tokenizer, path, window=16))
    given = [next(loader)]
    assert loader.state.streams[0].drawn == (12,)  # every row was read
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "?"}] * 12)
    resumed = PackLoader(_config(tokenizer, path, window=16, accept_changed=("data",)), state=loader.state_dict())
    assert not resumed.exhausted
    resumed = PackLoader(_config(tokenizer, path, window=16), state=resumed.state_dict())
    after = list(resumed)
    assert [pack.segments for pack in after] == [()]
    listed = [refusal.row for pack in after for refusal in pack.refused]
    assert sorted([*listed, *(row for row, _ in _parts(given))]) == list(range(12))
    assert sum(resumed.state.streams[0].refused[0].values()) == len(listed)


@pytest.mark.parametrize("zone", ["Etc/GMT-14", "Etc/GMT+12"])
def test_a_date_is_the_day_in_utc_in_every_time_zone(
    tmp_path: Path, corpus_path: str, zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment the local day of one of the two zones is another one."""
    tokenizer = tiny.save_tokenizer(tmp_path, template=tiny.DATED_TEMPLATE)
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        before = datetime.now(UTC).date().isoformat()
        date = PackLoader(tiny.data_config(tokenizer, corpus_path)).state.identity.date
        assert date in (before, datetime.now(UTC).date().isoformat())
    finally:
        monkeypatch.undo()
        time.tzset()
