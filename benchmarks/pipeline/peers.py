"""Peers from equal rows to packs, written as in their documentation: TRL, Hugging Face datasets,
Grain."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Job
from numpy.typing import NDArray
from systems import Sequences, System
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer

GRAIN_BINS = 8
"""Packs that Grain keeps open."""


def tokenizer_of(job: Job) -> Any:
    """Load the tokenizer with the template that tags the assistant's turns."""
    tokenizer: Any = AutoTokenizer.from_pretrained(job.tokenizer)
    tokenizer.chat_template = Path(job.tagged).read_text(encoding="utf-8")
    return tokenizer


class Templated:
    """Maps a row to ids and mask by `apply_chat_template`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        encoded = self.tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return {"input_ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}


def trl(job: Job) -> Callable[[], Iterator[dict[str, Any]]]:
    """Open `SFTTrainer` on a minimal model; construction prepares the dataset."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    logging.disable(logging.WARNING)  # it says for good reasons that this model does without flash attention
    tokenizer = tokenizer_of(job)
    rows = load_dataset("json", data_files=str(job.rows), split="train")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    config = SFTConfig(
        output_dir=f"{job.directory}/trl",
        packing=True,
        packing_strategy="bfd",
        max_length=job.capacity,
        assistant_only_loss=True,
        per_device_train_batch_size=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )

    def packs() -> Iterator[dict[str, Any]]:
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        return iter(trainer.get_train_dataloader())

    return packs


def unpadded(batch: dict[str, Any]) -> Sequences:
    """Yield the conversations of a batch collated without padding, cut at restarting positions."""
    ids, trained = batch["input_ids"][0], batch["labels"][0] != -100
    borders = [*torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist(), len(ids)]
    for start, end in pairwise(borders):
        yield ids[start:end].numpy(), trained[start:end].numpy()


class NextFit(IterableDataset[dict[str, Any]]):
    """Next-fit packing: a conversation that does not fit begins a new pack."""

    def __init__(self, rows: Any, capacity: int, pad_id: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self.pad_id = pad_id

    def __iter__(self) -> Iterator[dict[str, Any]]:
        open_pack: list[dict[str, Any]] = []
        used = 0
        for row in self.rows:
            length = len(row["input_ids"])
            if used + length > self.capacity:
                yield self._pack(open_pack)
                open_pack, used = [], 0
            open_pack.append(row)
            used += length
        if open_pack:
            yield self._pack(open_pack)

    def _pack(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        padding = self.capacity - sum(lengths)
        ids = torch.tensor([token for row in rows for token in row["input_ids"]] + [self.pad_id] * padding)
        mask = torch.tensor([bit for row in rows for bit in row["mask"]] + [0] * padding)
        positions = torch.cat([torch.arange(length) for length in (*lengths, padding)])
        return {
            "input_ids": ids,
            "labels": torch.where(mask == 1, ids, -100),
            "position_ids": positions,
            "lengths": lengths,
        }


def datasets(job: Job) -> Callable[[], Iterator[dict[str, Any]]]:
    """Open a streamed dataset, mapped and packed inside torch's DataLoader, with a file for each
    worker."""
    from datasets import load_dataset

    tokenizer = tokenizer_of(job)

    def packs() -> Iterator[dict[str, Any]]:
        files = job.parts(job.workers) if job.workers > 1 else [str(job.rows)]
        rows = load_dataset("json", data_files=files, split="train", streaming=True)
        examples = rows.map(Templated(tokenizer), remove_columns=["messages", "tools"])
        packed = NextFit(examples, job.capacity, tokenizer.pad_token_id)
        return iter(DataLoader(packed, batch_size=None, num_workers=job.workers))

    return packs


def by_lengths(pack: dict[str, Any]) -> Sequences:
    """Yield the conversations of a `NextFit` pack."""
    ids, trained = pack["input_ids"].numpy(), (pack["labels"] != -100).numpy()
    at = 0
    for length in pack["lengths"]:
        yield ids[at : at + length], trained[at : at + length]
        at += length


class Encoded:
    """Maps a line to arrays for Grain's packing."""

    def __init__(self, tokenizer: Any) -> None:
        self.templated = Templated(tokenizer)

    def __call__(self, line: bytes) -> dict[str, NDArray[Any]]:
        encoded = self.templated(json.loads(line))
        return {"input_ids": np.array(encoded["input_ids"], np.int32), "mask": np.array(encoded["mask"], bool)}


def grain(job: Job) -> Callable[[], Iterator[dict[str, Any]]]:
    """Open lines in memory, a map and first-fit packing; every worker runs all stages on its share
    of the lines.

    Builds no labels.
    """
    import grain
    from grain.experimental import FirstFitPackIterDataset

    tokenizer = tokenizer_of(job)

    def packs() -> Iterator[dict[str, Any]]:
        lines = job.rows.read_bytes().splitlines()
        examples = grain.MapDataset.source(lines).map(Encoded(tokenizer))
        stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=0))  # as it advises for what is in memory
        lengths = {"input_ids": job.capacity, "mask": job.capacity}
        packed = FirstFitPackIterDataset(stream, length_struct=lengths, num_packing_bins=GRAIN_BINS)
        if job.workers:
            packed = packed.mp_prefetch(grain.MultiprocessingOptions(num_workers=job.workers))
        return iter(packed)

    return packs


def by_segment_ids(pack: dict[str, NDArray[Any]]) -> Sequences:
    """Yield the conversations of a pack; segments count from 1, and 0 is padding."""
    segments = pack["input_ids_segment_ids"]
    for segment in range(1, int(segments.max()) + 1):
        inside = segments == segment
        yield pack["input_ids"][inside], pack["mask"][inside]


def _datasets(workers: int) -> System:
    return System(
        f"datasets streaming, `map`, DataLoader with {workers} workers",
        datasets,
        lambda pack: sum(pack["lengths"]),
        by_lengths,
        requires="datasets",
        imports=("datasets",),
        resumes="not as built here",
        counted="after the first pack" if workers else "all",
        workers=workers,
    )


def _grain(workers: int) -> System:
    return System(
        f"Grain with {workers} workers",
        grain,
        lambda pack: int(np.count_nonzero(pack["input_ids_segment_ids"])),
        by_segment_ids,
        requires="grain",
        imports=("grain", "grain.experimental"),
        resumes="exactly, with as many workers",
        counted="after the first pack" if workers else "all",
        workers=workers,
    )


PEERS = (
    System(
        "TRL `SFTTrainer`, its preparation",
        trl,
        lambda batch: batch["input_ids"].numel(),
        unpadded,
        requires="trl",
        imports=("trl.trainer.sft_trainer", "trl.trainer.sft_config", "datasets"),
        counted="until the first pack",
        resumes="prepares all, skips packs",
    ),
    *map(_datasets, (0, 1, 2)),
    *map(_grain, (0, 2)),
)
