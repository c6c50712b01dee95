"""Train a small Llama with Lightning, on the bundled conversations.

    python examples/lightning_module.py
    torchrun --nproc-per-node 2 examples/lightning_module.py

Stop it at any moment and start it again, also with 1, 2, 4 or 8 processes: it continues from the
newest checkpoint with the same global batches.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from sftstream import DataConfig
from sftstream.integrations import hugging_face
from sftstream.integrations.isolation import require_isolation
from sftstream.integrations.lightning_data import PackDataModule
from sftstream.integrations.token_loss import require_token_loss

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


class ChatModule(LightningModule):
    """A model of transformers that is trained on packs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))

    def on_train_start(self) -> None:
        require_isolation(self.model, hugging_face)
        require_token_loss(self.model)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        return self.model(**batch).loss  # a batch has num_items_in_batch, the divisor of its loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def newest(directory: Path) -> Path | None:
    """Return the checkpoint of the highest step."""
    steps = {int(re.search(r"step=(\d+)", path.name)[1]): path for path in directory.glob("*step=*.ckpt")}
    return steps[max(steps)] if steps else None


def fit(config: DataConfig, directory: Path, steps: int, every: int = 5, callbacks: tuple[Any, ...] = ()) -> ChatModule:
    """Train up to `steps` steps, with a checkpoint after each `every` steps; return the module."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    saves = ModelCheckpoint(directory, every_n_train_steps=every, save_top_k=-1)
    trainer = Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        max_epochs=1,
        max_steps=steps,
        accumulate_grad_batches=config.global_batch // size,
        callbacks=[*callbacks, saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = ChatModule()
    trainer.fit(module, datamodule=PackDataModule(config), ckpt_path=newest(directory))
    return module


if __name__ == "__main__":
    fit(
        msgspec.convert(DATA, DataConfig),
        Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"),
        int(sys.argv[2]) if len(sys.argv) > 2 else 20,
    )
