"""The trainers of transformers and TRL get the packs of the run, and resume exactly after a kill."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hosts import Hosts, Job, Result, digest, global_batches, model, trainer
from transformers import Trainer, TrainingArguments

from sftstream import DataConfig, Pack, PackLoader
from sftstream.integrations import PackDataset, last_checkpoint, trained_tokens
from sftstream.integrations.transformers_trainer import PackCallback, one_pack

KINDS = ("transformers", "trl", "accelerate")


@pytest.fixture(scope="module")
def data(tokenizer: str, corpus_path: str) -> DataConfig:
    """Packs of 128 tokens, 4 in a step, for 1, 2 or 4 processes."""
    return tiny.data_config(tokenizer, corpus_path, capacity=128, streams=4, global_batch=4, window=4, max_too_long=1.0)


@pytest.fixture(scope="module")
def packs(data: DataConfig) -> list[Pack]:
    return list(PackLoader(data))


@pytest.fixture(scope="module")
def order(packs: list[Pack]) -> list[str]:
    return [digest(pack.input_ids[None]) for pack in packs]


def assert_equal(resumed: Result, whole: Result) -> None:
    """The last steps of a run and of an uninterrupted run have the same bits."""
    assert resumed.batches == whole.batches[-len(resumed.batches) :]
    assert resumed.losses[-3:] == whole.losses[-3:]
    assert np.array_equal(resumed.weights, whole.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_trainer_resumes_with_the_same_bits(
    hosts: Hosts, data: DataConfig, order: list[str], tmp_path: Path, kind: str
) -> None:
    (whole,) = hosts.run(1, Job(data, str(tmp_path / "whole"), kind))
    assert whole.batches == order[: 7 * 4]
    job = Job(data, str(tmp_path / "killed"), kind, workers=1)
    if kind == "transformers":
        hosts.kill(1, job._replace(kill="step 4"))
    hosts.kill(1, job._replace(kill="save 4"))
    (resumed,) = hosts.run(1, job)
    assert len(resumed.batches) == 5 * 4
    assert_equal(resumed, whole)


def test_another_number_of_processes_gets_the_same_global_batches(
    hosts: Hosts, data: DataConfig, order: list[str], tmp_path: Path
) -> None:
    job = Job(data, str(tmp_path), save_every=2, workers=1)
    hosts.kill(2, job._replace(kill="step 4"))
    two = hosts.run(2, job._replace(steps=4))
    assert global_batches(two) == order[2 * 4 : 4 * 4]
    (one,) = hosts.run(1, job._replace(workers=0))
    assert one.batches == order[4 * 4 : 7 * 4]


def own_steps(packs: list[Pack], steps: int) -> tuple[list[float], np.ndarray]:
    """The losses and weights of SGD on the mean loss over all trained tokens of each global batch."""
    net = model(attention_dropout=0.0)
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=1e-2), []
    for step in range(steps):
        batch = packs[4 * step : 4 * step + 4]
        logits = torch.cat(
            [
                net(input_ids=p.input_ids[None], position_ids=p.position_ids[None], use_cache=False).logits[0]
                for p in batch
            ]
        )
        loss = F.cross_entropy(logits, torch.cat([p.labels for p in batch]), reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, torch.cat([weight.flatten() for weight in net.state_dict().values()]).numpy()


@pytest.mark.parametrize(("kind", "size"), [("transformers", 1), ("transformers", 2), ("trl", 2)])
def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_global_batch(
    hosts: Hosts, data: DataConfig, packs: list[Pack], tmp_path: Path, kind: str, size: int
) -> None:
    assert len({pack.trained_tokens for pack in packs[:4]}) == 4  # a mean of means would be another number
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "bf16": False}
    job = Job(data, str(tmp_path), kind, steps=3, save_every=9, arguments=plain, dropout=0.0)
    results = hosts.run(size, job)
    losses, weights = own_steps(packs, 3)
    # Bits differ: sums over packs and processes are computed in another order.
    assert results[0].losses == pytest.approx(losses, rel=2e-6)
    assert results[0].weights == pytest.approx(weights, abs=1e-6)


def test_all_processes_stop_at_the_end_of_the_data_and_save(hosts: Hosts, tokenizer: str, tmp_path: Path) -> None:
    """Ten conversations end at different steps on two processes."""
    corpus = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.rows(10))
    few = tiny.data_config(tokenizer, corpus, capacity=128, global_batch=2, window=2, epochs=1, max_too_long=1.0)
    expected = [digest(pack.input_ids[None]) for pack in PackLoader(few)]
    job = Job(few, str(tmp_path / "out"), steps=100, save_every=100)
    results = hosts.run(2, job)
    assert global_batches(results) == expected
    assert last_checkpoint(job.directory) == str(tmp_path / "out" / f"checkpoint-{len(expected) // 2}")
    (again,) = hosts.run(1, job)  # nothing is left to train
    assert again.batches == []


def test_rows_refused_on_all_processes_together_stop_the_run(hosts: Hosts, tokenizer: str, tmp_path: Path) -> None:
    rows = [tiny.chat("Hi", "Hello") if number % 3 else {"messages": "none"} for number in range(300)]
    corpus = tiny.write_jsonl(tmp_path / "broken.jsonl", rows)
    broken = tiny.data_config(tokenizer, corpus, capacity=128, global_batch=4, max_refused=0.1)
    with pytest.raises(AssertionError, match=r"rank 1:[^$]*rows are refused[^$]*one is .*broken.jsonl:"):
        hosts.run(2, Job(broken, str(tmp_path / "out"), steps=100))


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_a_list_of_packs_is_data_for_an_evaluation(data: DataConfig, tmp_path: Path, kind: str) -> None:
    more = {"per_device_eval_batch_size": 1, "bf16": False}
    host = trainer(Job(data, str(tmp_path), kind, arguments=more), 1, model())
    batches = [batch for batch in PackDataset(data) if trained_tokens(batch)]
    net = model().eval()
    with torch.no_grad():
        logits = [
            net(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, :-1]
            for batch in batches
        ]
    losses = [float(F.cross_entropy(each, batch["labels"][0, 1:])) for each, batch in zip(logits, batches, strict=True)]
    for _ in range(2):
        assert host.evaluate(batches)["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two packs at a time": ({"per_device_train_batch_size": 2}, "set per_device_train_batch_size=1"),
    "another global batch": ({"gradient_accumulation_steps": 3}, "set gradient_accumulation_steps=4"),
    "dispatched batches": ({"accelerator_config": {}}, '"dispatch_batches": False'),
    "a single checkpoint": ({"save_total_limit": 1}, "set it to 2 or more"),
    "workers of the host": ({"dataloader_num_workers": 1}, "set num_workers = 0"),
    "a cache of keys": ({"use_cache": True}, "set use_cache=False .* which passes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_that_would_change_data_or_loss_is_refused_with_a_remedy(
    data: DataConfig, tmp_path: Path, case: str
) -> None:
    arguments, remedy = REFUSED[case]
    job = Job(data, str(tmp_path), arguments=arguments, steps=1)
    with pytest.raises(ValueError, match=remedy):
        trainer(job, 1, model()).train()


def test_a_checkpoint_without_a_data_state_is_refused_with_the_newest_complete_one(
    hosts: Hosts, data: DataConfig, tmp_path: Path
) -> None:
    hosts.run(1, Job(data, str(tmp_path), steps=4))
    os.remove(tmp_path / "checkpoint-4" / "data_state.json")
    with pytest.raises(ValueError, match=r"its save was interrupted.* resume from .*checkpoint-2"):
        trainer(Job(data, str(tmp_path)), 1, model()).train(resume_from_checkpoint=True)


def test_a_trainer_of_other_data_is_refused(hosts: Hosts, data: DataConfig, tmp_path: Path) -> None:
    hosts.run(1, Job(data, str(tmp_path), steps=2))
    other = Job(msgspec.structs.replace(data, seed=7), str(tmp_path))
    with pytest.raises(ValueError, match="taken from other data or settings"):
        trainer(other, 1, model()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_trainer_of_another_dataset_or_collator_is_refused(data: DataConfig, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to=[])
    with pytest.raises(ValueError, match="pass a PackDataset as train_dataset"):
        Trainer(model(), arguments, train_dataset=[{"input_ids": [1]}], callbacks=[PackCallback()]).train()
    arguments.accelerator_config.dispatch_batches = False
    with pytest.raises(ValueError, match="pass data_collator=one_pack"):
        Trainer(model(), arguments, train_dataset=PackDataset(data), callbacks=[PackCallback()]).train()
    with pytest.raises(ValueError, match="set remove_unused_columns=False"):
        one_pack([{"input_ids": [1]}])


def test_a_model_with_too_few_tokens_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"but the model's vocab_size is 100; .*resize_token_embeddings"):
        trainer(Job(data, str(tmp_path)), 1, model(vocab_size=100)).train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_and_changes_of_topology_change_no_global_batch(
    hosts: Hosts, data: DataConfig, order: list[str], tmp_path: Path, kind: str
) -> None:
    """Runs on 1, 2 and 4 processes, killed at random places, against runs that are never killed."""
    seed = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
    print(f"SFTSTREAM_SEED={seed}")
    draw = random.Random(seed)
    for size in (1, 2, 4):
        whole = hosts.run(size, Job(data, str(tmp_path / f"whole-{size}"), kind))
        assert global_batches(whole) == order[: 7 * 4]
        job = Job(data, str(tmp_path / f"killed-{size}"), kind, workers=draw.choice((0, 2)))
        for place in (f"step {draw.randint(1, 4)}", f"save {draw.choice((4, 6))}"):
            hosts.kill(size, job._replace(kill=place))
        for resumed, never in zip(hosts.run(size, job), whole, strict=True):
            assert_equal(resumed, never)
    job, done = Job(data, str(tmp_path / "hops"), kind), 0
    while done < 7:
        size = draw.choice((1, 2, 4))
        until = min(7, done + 2)
        results = hosts.run(size, job._replace(steps=until, save_every=1, workers=draw.choice((0, 1))))
        assert global_batches(results) == order[done * 4 : until * 4]
        done = until
