"""Trace shows a step's conversations as they were trained; find shows the steps of a row."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_llama
import torch
import transformers
from commands import run

from sftstream import IGNORE_INDEX, DataConfig, PackLoader
from sftstream.cli.main import main
from sftstream.ledger.data_run import run_data
from sftstream.ledger.reader import Ledger
from sftstream.ledger.trace import trace

ROWS = [
    tiny.chat("the sum of seven", "the answer is eleven", system="never because"),
    tiny.chat("which river\x1b[2J", "the green river\nunder the stone"),
    *tiny.rows(20),
]


@pytest.fixture(scope="module")
def config(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return tiny.data_config(tokenizer, tiny.write_jsonl(path, ROWS), shuffle=False, epochs=1)


@pytest.fixture(scope="module")
def done(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trace") / "run"
    run_data(config, directory, 10**6, 2)
    return directory


def test_a_traced_step_holds_the_conversations_of_its_packs(done: Path, config: DataConfig) -> None:
    loader = PackLoader(config)
    for step in (1, 2):
        packs = loader.next_step()
        traced = trace(Ledger(done), step)
        assert [(t.pack, t.segment, t.start) for t in traced] == [
            (place, segment, start)
            for place, pack in enumerate(packs)
            for segment, start in zip(pack.segments, pack.borders.tolist(), strict=False)
        ]
        assert sum(t.trained_tokens for t in traced) == sum(pack.trained_tokens for pack in packs)


def test_a_conversation_is_shown_with_location_roles_and_trained_texts(done: Path, config: DataConfig) -> None:
    found = run(main, "find", done, "--source", 0, "--row", 0)
    assert found.exit_code == 0
    step, pack = found.stdout.split(":")[0].removeprefix("step ").split(", pack ")
    lines = run(main, "trace", done, "--step", step, "--pack", pack).stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if f"{config.sources[0].path}:1 (row 0 of source 0, epoch 0)" in line)
    assert lines[at].startswith(f"pack {pack}, tokens ")
    assert lines[at + 1 : at + 5] == [
        "  system: never because",
        "  user: the sum of seven",
        "  assistant: the answer is eleven",
        "  trained: the answer is eleven<|eot_id|>",
    ]


def test_hostile_text_of_a_conversation_reaches_no_terminal(done: Path) -> None:
    use = Ledger(done).uses(0, 1)[0]
    shown = run(main, "trace", done, "--step", use.step).stdout
    assert "\x1b" not in shown
    assert "  user: which river\\x1b[2J" in shown
    assert "  assistant: the green river\\nunder the stone" in shown
    narrow = run(main, "trace", done, "--step", use.step, "--width", 12).stdout
    assert "  assistant: the green..." in narrow


def test_losses_are_those_of_transformers_and_sort_the_conversations(done: Path, tmp_path: Path) -> None:
    model = tiny_llama.public_llama(vocab_size=512)
    model.save_pretrained(tmp_path / "model")
    lines = run(main, "trace", done, "--step", 1, "--model", tmp_path / "model").stdout.splitlines()
    shown = [float(line.rpartition("loss ")[2]) for line in lines if "; loss " in line]
    assert shown == sorted(shown, reverse=True)
    ledger = Ledger(done)
    for traced in trace(ledger, 1, loss_of=None):
        pack = PackLoader(ledger.sessions[0].data).next_step()[traced.pack]
        cut = slice(traced.start, traced.start + traced.segment.length)
        labels = pack.labels[cut]
        with torch.no_grad():
            logits = model.eval()(pack.input_ids[None, cut]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX).item()
        assert any(abs(loss - expected) < 2e-4 for loss in shown)
    assert isinstance(model, transformers.PreTrainedModel)


def test_a_row_is_found_in_each_epoch_and_a_refused_row_with_its_reason(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(
        tmp_path / "rows.jsonl", [*tiny.rows(6), {"messages": [{"role": "oracle", "content": "?"}]}]
    )
    run_data(tiny.data_config(tokenizer, path), tmp_path / "run", 10**6, 2)
    lines = run(main, "find", tmp_path / "run", "--source", 0, "--row", 3).stdout.splitlines()
    assert [line.split("epoch ")[1].split(",")[0] for line in lines] == ["0", "1"]
    refused = run(main, "find", tmp_path / "run", "--source", 0, "--row", 6).stdout.splitlines()
    assert ["refused in epoch" in line for line in refused] == [True, True]
    nothing = run(main, "find", tmp_path / "run", "--source", 0, "--row", 7)
    assert nothing.exit_code == 1
    assert nothing.stdout == f"row 7 of source 0 is in no step of {tmp_path / 'run'}\n"


def test_a_step_or_pack_that_does_not_exist_is_named_with_the_last_one(done: Path) -> None:
    last = Ledger(done).steps[-1].step
    result = run(main, "trace", done, "--step", last + 1)
    assert (
        result.stderr
        == f"error: step {last + 1} is not in the ledger of {done}, which has steps 1 to {last}; name one of them\n"
    )
    result = run(main, "trace", done, "--step", 1, "--pack", 4)
    assert result.stderr == "error: pack 4 does not exist: step 1 has the packs 0 to 3; name one of them\n"


def test_a_streamed_source_is_traced_too(tokenizer: str, tmp_path: Path) -> None:
    for number in range(2):
        tiny.write_jsonl(tmp_path / f"{number}.jsonl", tiny.rows(12, number))
    source = {"path": f"{tmp_path}/*.jsonl", "streaming": True, "shuffle": "shards"}
    config = tiny.data_config(tokenizer, sources=[source])
    run_data(config, tmp_path / "run", 10**6, 2)
    loader = PackLoader(config)
    for step in Ledger(tmp_path / "run").steps:
        packs = loader.next_step()
        traced = trace(Ledger(tmp_path / "run"), step.step)
        assert [t.segment for t in traced] == [segment for pack in packs for segment in pack.segments]


def test_a_directory_that_is_no_model_is_named_with_what_to_name_instead(done: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert run(main, "trace", done, "--step", 1, "--model", tmp_path / "adapter").stderr == (
        f"error: {tmp_path}/adapter is an adapter without its model; name a step-... directory of its run's checkpoints, or "
        "a merged export\n"
    )
    stderr = run(main, "trace", done, "--step", 1, "--model", tmp_path).stderr
    assert stderr.startswith(f"error: {tmp_path} is neither a model nor a checkpoint: ")
    assert stderr.count("error: ") == 1
