"""Train a small Llama with the Trainer of transformers, on the bundled conversations.

    python examples/transformers_trainer.py
    accelerate launch --cpu --num_processes 2 examples/transformers_trainer.py

Stop it at any moment and start it again, also with 1, 2, 4 or 8 processes: it continues with the
same global batches.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sftstream import DataConfig
from sftstream.integrations import PackDataset, last_checkpoint
from sftstream.integrations.transformers_trainer import PackCallback, one_pack

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
    data = msgspec.convert(DATA, DataConfig)
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=1,  # one pack
        gradient_accumulation_steps=data.global_batch // int(os.environ.get("WORLD_SIZE", "1")),
        accelerator_config={"dispatch_batches": False},
        max_steps=steps,
        save_steps=5,
        save_total_limit=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2)),
        arguments,
        train_dataset=PackDataset(data),
        data_collator=one_pack,
        callbacks=[PackCallback()],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(directory))


if __name__ == "__main__":
    main(
        sys.argv[1] if len(sys.argv) > 1 else "runs/transformers_trainer", int(sys.argv[2]) if len(sys.argv) > 2 else 20
    )
