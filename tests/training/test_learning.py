"""A run learns the answers of its conversations, and its export gives them through transformers."""

from __future__ import annotations

import json
from pathlib import Path

import runs
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = {"which river ?": "the green river", "which stone ?": "seven small copper lantern", "and ?": "north"}


def test_a_run_learns_its_answers_and_the_export_gives_them(tmp_path: Path, tokenizer: str) -> None:
    rows = [tiny.chat(question, answer) for question, answer in PAIRS.items()]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows * 20)
    config = runs.run_config(
        tokenizer,
        path,
        run={"steps": 120},
        optimizer={"learning_rate": 1e-2},
        schedule={"kind": "cosine", "warmup": 5},
        checkpoint={"every": 1000},
        evaluation={"path": tiny.write_jsonl(tmp_path / "heldout.jsonl", rows), "show": 1},
    )
    job = runs.run(tmp_path, config)
    assert "100.0% of 3 held-out questions answered exactly" in job.output()
    answers = [json.loads(line) for line in (tmp_path / "runs/run/answers.jsonl").read_text().splitlines()]
    assert [(answer["expected"], answer["given"]) for answer in answers] == [
        (f"{a}<|eot_id|>",) * 2 for a in PAIRS.values()
    ]

    export = tmp_path / "runs" / "run" / "export"
    model, exported = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    chat = exported.apply_chat_template(
        rows[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**chat, max_new_tokens=16, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert exported.decode(answer) == "the green river<|eot_id|>"


def test_a_run_starts_from_a_hugging_face_directory(tmp_path: Path, tokenizer: str) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(30))
    first = runs.run_config(tokenizer, path, run={"name": "first", "steps": 4})
    runs.run(tmp_path, first)
    export = str(tmp_path / "runs" / "first" / "export")
    second = first | {
        "run": {"name": "second", "steps": 1, "device": "cpu"},
        "model": {"init_from": export},
        "data": first["data"] | {"tokenizer": {"path": export}},
    }
    runs.run(tmp_path, second)
    began, went_on = runs.metrics(tmp_path, "first"), runs.metrics(tmp_path, "second")
    assert went_on[0]["batch_digest"] == began[0]["batch_digest"]
    assert went_on[0]["loss"] < began[0]["loss"] - 0.5
