"""Run torchtitan on CPUs, and record what the model sees; a process of the tests.

    torchrun titan_host.py --module titan_host --config chats [--training.steps 6 ...]

torchtitan 0.3 knows accelerators only. This file names the CPU as the device, takes an attention
that runs there, and calls `main` of torchtitan. TITAN_RECORD is the file of the record, TITAN_KILL
the number of the batch in which the process kills itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_mask

sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]
torch.set_num_threads(1)
if not hasattr(torch.distributed, "set_timeout"):  # new in torch 2.14
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout  # type: ignore[attr-defined]


class _Cpu:
    """`torch.cpu`, with the functions of `torch.cuda` that torchtitan calls to report memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, _: Any) -> str:
        return "CPU"

    def get_device_properties(self, _: Any) -> Any:
        return SimpleNamespace(total_memory=1, name="CPU")

    def current_device(self) -> int:
        return 0

    def memory_stats(self, _: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None: ...

    def empty_cache(self) -> None: ...


import torchtitan.tools.utils  # noqa: E402

torchtitan.tools.utils.device_type, torchtitan.tools.utils.device_module = "cpu", _Cpu()

import torchtitan.train  # noqa: E402
import torchtitan_sft  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402
from torchtitan.models.llama3 import model_registry  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402


class DenseAttention(FlexAttention):
    """Attention with torchtitan's own mask of documents, as a matrix: flex_attention has no gradient on CPUs."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config): ...

    def forward(self, q_BLNH: Any, k_BLNH: Any, v_BLNH: Any, *, attention_masks: Any, **kwargs: Any) -> Any:
        batch, length = q_BLNH.shape[:2]
        mask = create_mask(attention_masks.mask_mod, batch, None, length, length, device="cpu")
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (q_BLNH, k_BLNH, v_BLNH))
        chosen = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **chosen)
        return out.transpose(1, 2).contiguous()


def chats() -> Trainer.Config:
    """Return the example's config with an attention for CPUs, in float32."""
    config = torchtitan_sft.chats()
    config.model_spec = model_registry("debugmodel", attn_backend="flex")
    for _, _, parent, name in list(config.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, name, DenseAttention.Config())
    config.training.mixed_precision_param = "float32"
    return config


def _sum_with_gloo() -> None:
    """Divide gradients apart from their sum over ranks: gloo cannot do both at once."""
    inner = FSDPModule.set_gradient_divide_factor

    def divided(module: FSDPModule, factor: float) -> None:
        inner(module, factor)
        module.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = divided  # type: ignore[method-assign]


def _record() -> None:
    inner, seen = Trainer.forward_backward_step, [0]
    path, killed = Path(os.environ["TITAN_RECORD"] + os.environ["RANK"]), int(os.environ.get("TITAN_KILL", "0"))

    def recorded(self: Any, **kwargs: Any) -> Any:
        loss = inner(self, **kwargs)
        ids = hashlib.sha256(kwargs["input_dict"]["input"].numpy().tobytes()).hexdigest()[:16]
        with path.open("a") as file:
            file.write(json.dumps({"step": self.step, "ids": ids, "loss": float(loss)}) + "\n")
        seen[0] += 1
        if seen[0] == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    Trainer.forward_backward_step = recorded


if __name__ == "__main__":
    _sum_with_gloo()
    _record()
    torchtitan.train.main()
