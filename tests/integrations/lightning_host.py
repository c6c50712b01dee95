"""Run the module of examples/lightning_module.py, and record what the model sees; a process of the tests.

python lightning_host.py CONFIG DIRECTORY STEPS [KILLED_BATCH]
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from lightning_module import fit

from sftstream import DataConfig

torch.set_num_threads(1)


class Record(Callback):
    """Write the digest and the loss of each batch; kill the process in a batch."""

    def __init__(self, path: Path, killed: int) -> None:
        self.path, self.killed, self.batches = path, killed, 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        ids = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()[:16]
        line = {"step": trainer.global_step, "ids": ids, "loss": float(outputs["loss"])}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.batches == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)


config, directory, steps, *killed = sys.argv[1:]
rank = os.environ.get("RANK", "0")
record = Record(Path(directory) / f"batches-{rank}.jsonl", int(killed[0]) if killed else 0)
data = msgspec.json.decode(Path(config).read_bytes(), type=DataConfig)
trained = fit(data, Path(directory), int(steps), every=2, callbacks=(record,))
if rank == "0":
    torch.save(trained.model.state_dict(), Path(directory) / "weights.pt")
