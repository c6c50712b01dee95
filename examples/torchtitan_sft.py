"""Train a small Llama with torchtitan, on the bundled conversations.

    torchrun --nproc-per-node 2 -m torchtitan.train --module examples.torchtitan_sft --config chats

Stop it at any moment and start it again, also on another number of GPUs: it continues from
torchtitan's newest checkpoint with the same global batches.
"""

from __future__ import annotations

from pathlib import Path

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import DebugConfig, TrainingConfig
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

from sftstream.integrations.titan_data import PackDataLoader

EXAMPLES = Path(__file__).parent


def chats(data: str = str(EXAMPLES / "torchtitan_data.toml"), steps: int = 20) -> Trainer.Config:
    """Return the config of a run on packs; `data` has the `[data]` table."""
    return Trainer.Config(
        model_spec=model_registry("debugmodel", attn_backend="varlen"),
        hf_assets_path=str(EXAMPLES / "demo" / "tokenizer"),
        dump_folder="runs/torchtitan",
        dataloader=PackDataLoader.Config(dataset=data),
        loss=CrossEntropyLoss.Config(),
        optimizer=default_adamw(lr=8e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2),
        training=TrainingConfig(
            local_batch_size=1, global_batch_size=8, seq_len=512, steps=steps, disable_cuda_graphs=True
        ),
        debug=DebugConfig(seed=0),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(enable=True, interval=5, last_save_model_only=False),
    )
