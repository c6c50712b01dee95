"""Rows of megabytes are refused by their size, before they are rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from sftstream import PackLoader
from sftstream.records import Conversation
from sftstream.rendering.renderer import Renderer

LETTERS = 3_000_000


def refused(tokenizer: str, source: dict[str, Any], **settings: Any) -> dict[str, int]:
    loader = PackLoader(tiny.data_config(tokenizer, sources=[source], epochs=1, streams=1, **settings))
    counts: dict[str, int] = {}
    for pack in loader:
        for refusal in pack.refused:
            counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
    return counts


@pytest.fixture
def longest_rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of letters of each conversation that is rendered."""
    render, letters = Renderer.render_conversation, list[int]()

    def counted(renderer: Renderer, conversation: Conversation) -> Any:
        letters.append(sum(len(str(message.content)) for message in conversation.messages))
        return render(renderer, conversation)

    monkeypatch.setattr(Renderer, "render_conversation", counted)
    return letters


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_large_row_is_refused_before_it_is_rendered_and_its_neighbours_are_read(
    tmp_path: Path, tokenizer: str, name: str, longest_rendered: list[int]
) -> None:
    rows = [*tiny.rows(5), tiny.chat("x y " * (LETTERS // 4), "z")]
    (tiny.write_parquet if name.endswith("parquet") else tiny.write_jsonl)(tmp_path / name, rows)
    source = {"path": str(tmp_path / name)}
    assert refused(tokenizer, source) == {"longer than capacity": 1}
    assert refused(tokenizer, source | {"max_row_bytes": 1_000_000}) == {"row too large": 1}
    assert refused(tokenizer, source | {"max_row_bytes": 1_000_000}, overflow="truncate") == {"row too large": 1}
    assert len(longest_rendered) >= 15
    assert max(longest_rendered) < 1000
