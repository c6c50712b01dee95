"""Run NeMo Automodel's recipe on CPUs, and record what the model sees; a process of the tests.

    torchrun automodel_host.py CONFIG.yaml

Automodel 0.7 asks CUDA for its device. This file names the CPU instead, and calls `main` of
Automodel's command. AUTOMODEL_RECORD is the file of the record, AUTOMODEL_KILL the number of the
batch in which the process kills itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import nemo_automodel._transformers.auto_model as auto_model  # noqa: E402
from nemo_automodel.cli.app import main  # noqa: E402

from sftstream.integrations.automodel_data import PackRecipe  # noqa: E402

CPU = torch.device("cpu")


class _Torch:
    """`torch`, with the CPU as its CUDA device."""

    cuda = type("_Cuda", (), {"current_device": staticmethod(lambda: CPU)})

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return CPU


def _record() -> None:
    """Write the digest and the loss of each batch; kill the process in a batch."""
    inner, seen = PackRecipe._forward_backward_step, [0]
    path, killed = Path(os.environ["AUTOMODEL_RECORD"] + os.environ["RANK"]), int(os.environ["AUTOMODEL_KILL"])

    def recorded(self: Any, idx: int, batch: Any, *, loss_buffer: list[Any], **kwargs: Any) -> None:
        inner(self, idx, batch, loss_buffer=loss_buffer, **kwargs)
        ids = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()[:16]
        with path.open("a") as file:
            file.write(
                json.dumps({"step": self.step_scheduler.step, "ids": ids, "loss": float(loss_buffer[-1])}) + "\n"
            )
        seen[0] += 1
        if seen[0] == killed:
            os.kill(os.getpid(), signal.SIGKILL)

    PackRecipe._forward_backward_step = recorded


if __name__ == "__main__":
    auto_model.torch = _Torch()
    torch.cuda.reset_peak_memory_stats = lambda *_: None  # type: ignore[assignment] # torch for CPUs has none
    _record()
    main()
