"""Rows without turns are trained only if the source says so, as they are, and on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny

from sftstream import DataConfig, PackLoader, describe


def config(tokenizer: str, directory: Path, rows: list[Any], **source: Any) -> DataConfig:
    path = tiny.write_jsonl(directory / "rows.jsonl", rows)
    return tiny.data_config(tokenizer, sources=[{"path": path, **source}], streams=1, epochs=1, global_batch=1)


def trained(loader: PackLoader) -> list[tuple[str, str]]:
    """Text and trained text of each segment."""
    hf, found = loader.encoder.tokenizer.hf, []
    for pack in loader:
        start = 0
        for segment in pack.segments:
            ids, mask = pack.ids[start : start + segment.length], pack.trained[start : start + segment.length]
            found.append((hf.decode(ids), hf.decode(ids[mask])))
            start += segment.length
    return sorted(found)


def reasons(loader: PackLoader) -> list[str]:
    return [f"{refusal.reason}: {refusal.detail}" for pack in loader for refusal in pack.refused]


def test_plain_text_is_refused_by_default_with_the_remedy(tmp_path: Path, tokenizer: str) -> None:
    loader = PackLoader(config(tokenizer, tmp_path, [{"text": "it rains"}, *tiny.rows(3)]))
    (reason,) = reasons(loader)
    assert reason.endswith(
        "data; verified = false of the source trains plain text or token ids, of which nothing can be proved"
    )


def test_plain_text_is_trained_as_a_whole_between_the_tokenizers_own_tokens(tmp_path: Path, tokenizer: str) -> None:
    loader = PackLoader(config(tokenizer, tmp_path, [{"text": "it rains"}], verified=False))
    hf = loader.encoder.tokenizer.hf
    whole = hf.decode([*hf("it rains")["input_ids"], hf.eos_token_id])
    assert trained(loader) == [(whole, whole)]
    assert "unverified: 1" in describe(loader.state_dict())


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"labels": [-100, -100, 7, 8]}, [7, 8]),
        ({}, [5, 6, 7, 8]),
        ({"completion_mask": [0, 0, 0, 1]}, [8]),
        ({"labels": [-100, 6, 7, 8], "attention_mask": [1, 1, 1, 0]}, [6, 7]),
    ],
)
def test_token_ids_are_trained_where_their_row_says(
    tmp_path: Path, tokenizer: str, marks: dict[str, Any], expected: list[int]
) -> None:
    loader = PackLoader(config(tokenizer, tmp_path, [{"input_ids": [5, 6, 7, 8], **marks}], verified=False))
    pack = next(loader)
    length = pack.segments[0].length
    assert pack.ids[:length].tolist() == [5, 6, 7, 8][:length]
    assert pack.ids[:length][pack.trained[:length]].tolist() == expected
    assert np.array_equal(
        pack.labels[: length - 1].numpy()[pack.trained[1:length]], pack.ids[1:length][pack.trained[1:length]]
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"input_ids": [5, 6], "labels": [6, -100]},
            "bad labels: labels[0] is 6, neither -100 nor input_ids[0] = 5; lab",
        ),
        ({"input_ids": [5, 6], "labels": [5]}, "bad labels: labels has 1 entries for 2 in input_ids"),
        ({"input_ids": [5, "6"]}, "bad labels: input_ids is [5, '6'], not a list of integers"),
        ({"input_ids": [5, 10**6]}, "bad tokens: token id 1000000 is not in the vocabulary of "),
        (
            {"input_ids": [5, 6], "labels": [5, -100]},
            "nothing to train: no token is trained that has a token before it",
        ),
        ({"text": 3}, "not text: text is a int: 3"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "bad labels: loss_mask[1] is 2, neither 0 nor 1"),
        (
            {"text": "rain", "prompt": "q"},
            "unread words: column 'prompt' holds words that the column 'text' does not hold",
        ),
        ({"text": "rain", "weight": 0}, "unwanted answer: weight is 0, which marks"),
        (
            {"input_ids": [5] * 300},
            "longer than capacity: 300 tokens do not fit into a pack of 256; raise data.capacity, or shorten the row",
        ),
        ({"other": 3}, "unknown layout: columns ['other'] match none of "),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(tmp_path: Path, tokenizer: str, row: Any, reason: str) -> None:
    loader = PackLoader(config(tokenizer, tmp_path, [row, *tiny.rows(3)], verified=False))
    (found,) = reasons(loader)
    assert found.startswith(reason)


def test_conversations_are_proved_also_beside_unverified_rows(tmp_path: Path, tokenizer: str) -> None:
    rows = tiny.rows(6)
    plain = tiny.digests(PackLoader(config(tokenizer, tmp_path, rows)))
    assert tiny.digests(PackLoader(config(tokenizer, tmp_path, rows, verified=False))) == plain
    mixed = PackLoader(config(tokenizer, tmp_path, [*rows, {"text": "it rains"}], verified=False))
    assert sum(len(pack.segments) for pack in mixed) == 7
    assert "unverified: 1" in describe(mixed.state_dict())


def test_the_setting_is_part_of_the_identity_and_a_run_resumes(tmp_path: Path, tokenizer: str) -> None:
    rows = [*tiny.rows(30), *({"text": f"it rains {number}"} for number in range(30))]
    run = config(tokenizer, tmp_path, rows, verified=False)
    expected = tiny.digests(PackLoader(run))
    loader = PackLoader(run)
    given = tiny.digests(tiny.take(loader, 3))
    state = loader.state_dict()
    assert state["identity"]["sources"][0]["verified"] is False
    assert [*given, *tiny.digests(PackLoader(run, state=state))] == expected
    source = msgspec.structs.replace(run.sources[0], verified=True)
    with pytest.raises(ValueError, match=r"data.sources\[0\].verified: False -> None"):
        PackLoader(msgspec.structs.replace(run, sources=(source,)), state=state)
