"""Rows of megabytes are refused by their size, before they are rendered."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import PackLoader

LETTERS = 3_000_000


def refused(tokenizer: str, source: dict[str, Any], **settings: Any) -> dict[str, int]:
    loader = PackLoader(tiny.data_config(tokenizer, sources=[source], epochs=1, streams=1, **settings))
    began = time.process_time()
    counts: dict[str, int] = {}
    for pack in loader:
        for refusal in pack.refused:
            counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
    assert time.process_time() - began < 5
    return counts


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_large_row_is_refused_in_no_time_and_its_neighbours_are_read(
    tmp_path: Path, tokenizer: str, name: str
) -> None:
    rows = [*tiny.rows(5), tiny.chat("x y " * (LETTERS // 4), "z")]
    (tiny.write_parquet if name.endswith("parquet") else tiny.write_jsonl)(tmp_path / name, rows)
    source = {"path": str(tmp_path / name)}
    assert refused(tokenizer, source) == {"longer than capacity": 1}
    assert refused(tokenizer, source | {"max_row_bytes": 1_000_000}) == {"row too large": 1}
    assert refused(tokenizer, source | {"max_row_bytes": 1_000_000}, overflow="truncate") == {"row too large": 1}
