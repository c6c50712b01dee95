"""Train a small Llama with a loop of ten lines, on the bundled conversations.

    python examples/plain_loop.py
    torchrun --nproc-per-node 2 examples/plain_loop.py

Stop it at any moment and start it again, also with 1, 2, 4 or 8 processes: it continues with the
same global batches.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from sftstream import DataConfig, Shard
from sftstream.integrations import (
    PackDataset,
    Shards,
    last_checkpoint,
    read_state_file,
    trained_tokens,
    write_state_file,
)

DEMO = Path(__file__).parent / "demo"
DATA = {
    "sources": [{"path": str(DEMO / "data" / "messages.jsonl")}],
    "tokenizer": {"path": str(DEMO / "tokenizer")},
    "capacity": 512,
    "global_batch": 8,
    "streams": 8,
    "workers": 1,
    "epochs": 1,
}


def main(directory: str, steps: int) -> None:
    """Train up to `steps` steps; each fifth step, and the last, is a checkpoint in `directory`."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    model = DistributedDataParallel(net) if size > 1 else net

    dataset = PackDataset(msgspec.convert(DATA, DataConfig), shard=Shard(rank, size))
    step = 0
    if checkpoint := last_checkpoint(directory):
        saved = torch.load(Path(checkpoint) / "model.pt", weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        dataset.load_state_dict(read_state_file(checkpoint))

    shards, batches, ended = Shards(dataset), iter(dataset), False
    while step < steps and not ended:
        packs = [next(batches) for _ in range(dataset.micro_batches)]
        tokens = sum(map(trained_tokens, packs))
        if size > 1:
            dist.all_reduce(tokens)
        for pack in packs:
            (model(**pack, num_items_in_batch=tokens).loss * size).backward()  # DDP divides by `size`
        optimizer.step()
        optimizer.zero_grad()
        step, ended = step + 1, shards.finished()
        if step % 5 == 0 or step == steps or ended:
            _save(Path(directory) / f"step-{step}", shards, {"net": net, "optimizer": optimizer}, step, rank)
        if rank == 0:
            print(f"step {step}: {int(tokens)} trained tokens")


def _save(directory: Path, shards: Shards, parts: dict, step: int, rank: int) -> None:
    state = shards.state_dict()
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save({**{name: part.state_dict() for name, part in parts.items()}, "step": step}, directory / "model.pt")
        write_state_file(directory, state)  # last, so that a checkpoint with this file is complete


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/plain_loop", int(sys.argv[2]) if len(sys.argv) > 2 else 20)
