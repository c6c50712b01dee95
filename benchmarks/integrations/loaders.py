"""Data loaders of trainers that need a GPU, alone: torchtitan and NeMo Automodel, each with its own
preparation and with sftstream."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from clock import Clock
from corpus import DAY, Job
from trainers import data_table

from sftstream import ChatEncoder
from sftstream.formats import parse_row


def titan_itself(job: Job, clock: Clock) -> None:
    """Read an epoch of torchtitan's ChatDataLoader, which packs conversations of one exchange."""
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from torchtitan.hf_datasets.text_datasets import ChatDataLoader

    tokenizer = HuggingFaceTokenizer(HuggingFaceTokenizer.Config(), tokenizer_path=job.tokenizer)
    config = ChatDataLoader.Config(
        dataset_path="json",
        load_dataset_kwargs={"data_files": str(job.rows), "split": "train"},
        sample_processor=lambda row: row["messages"],
        infinite=False,
    )
    read(ChatDataLoader(config, tokenizer=tokenizer, **one_rank(job)), clock)


def titan_with_ours(job: Job, clock: Clock) -> None:
    """Read an epoch of sftstream's PackDataLoader for torchtitan."""
    from sftstream.integrations.titan_data import PackDataLoader

    config = PackDataLoader.Config(dataset=str(write_table(job)))
    read(PackDataLoader(config, **one_rank(job)), clock)


def one_rank(job: Job) -> dict[str, int]:
    """Return torchtitan's arguments of a loader: one rank, one pack a batch."""
    return {"dp_world_size": 1, "dp_rank": 0, "seq_len": job.capacity, "local_batch_size": 1}


def automodel_itself(job: Job, clock: Clock) -> None:
    """Read an epoch of Automodel's ChatDataset, packed by its `pack_dataset`."""
    from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset
    from nemo_automodel.components.datasets.llm.packed_sequence import pack_dataset
    from peers import tokenizer_of

    chats = ChatDataset(str(job.rows), tokenizer_of(job))
    packs = pack_dataset(chats, None, job.capacity, padding_idx=chats.pad_token_id)
    read(packs.with_format("torch"), clock)


def automodel_with_ours(job: Job, clock: Clock) -> None:
    """Read an epoch of the PackDataset of sftstream's Packs for Automodel."""
    from sftstream.integrations.automodel_data import Packs

    read(Packs(str(write_table(job))).dataset, clock)


def read(batches: Any, clock: Clock) -> None:
    """Read the clock at each batch."""
    for _ in batches:
        clock.step()


def write_table(job: Job) -> Path:
    """Write the `[data]` table of a run; return its path."""
    table = data_table(job)
    path = Path(job.directory) / "data.toml"
    lines = [f"{key} = {json.dumps(table[key])}" for key in table if key not in ("sources", "tokenizer")]
    lines += [f"sources = [{{ path = {json.dumps(str(job.rows))} }}]"]
    lines += [f"tokenizer.{key} = {json.dumps(value)}" for key, value in table["tokenizer"].items()]
    path.write_text("\n".join(["[data]", *lines]) + "\n", encoding="utf-8")
    return path


def single_exchanges(job: Job) -> Job:
    """Return a job of the first exchange of each conversation: a user's message and its answer."""
    alone = msgspec.structs.replace(job, directory=f"{job.directory}/single")
    Path(alone.directory).mkdir()
    encoder = ChatEncoder(job.tokenizer, date=DAY, capacity=job.capacity)
    lengths = []
    with alone.rows.open("wb") as file:
        for line in job.rows.read_bytes().splitlines():
            for asked, said in pairwise(msgspec.json.decode(line)["messages"]):
                if asked["role"] == "user" and said["role"] == "assistant" and said.keys() == {"role", "content"}:
                    row = {"messages": [asked, said]}
                    (example,) = encoder.encode_conversation(parse_row(row))
                    lengths.append(len(example.tokens))
                    file.write(json.dumps(row).encode() + b"\n")  # ASCII: Automodel splits lines at U+2028
                    break
    return msgspec.structs.replace(alone, tokens=sum(lengths), conversations=len(lengths))
