"""Compile a model's layers before the first step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sftstream import Pack, Segment
from trainer.distributed.mesh import Topology
from trainer.llama.attention import KERNELS, Segments
from trainer.llama.blocks import use_kernel
from trainer.llama.model import Llama
from trainer.llama.parallel import reshard
from trainer.training.step import accumulate_gradients, label_losses


def warm_up(model: Llama, capacity: int, topology: Topology, *, evaluates: bool = False) -> None:
    """Run the passes of one pack of `capacity` tokens, and drop the gradients. Collective.

    `evaluates` also runs the pass without gradients of validation and of answers. Attention, which
    is not compiled, is left out, and the model is left without a kernel: `use_kernel` sets it.
    """
    pack = _pack(capacity)
    use_kernel(model, _STAND_IN)
    accumulate_gradients(model, [pack], topology, trained_tokens=pack.trained_tokens)
    model.zero_grad(set_to_none=True)
    if evaluates:
        label_losses(model, pack, topology.device)
        reshard(model)
    use_kernel(model, None)


def _stand_in(q: Tensor, k: Tensor, v: Tensor, _segments: Segments) -> Tensor:
    """Return a tensor of the shape of attention's output that depends on all inputs.

    The numbers may be NaN, if a sum overflows; `warm_up` drops all numbers.
    """
    return q.contiguous() + 0 * (k.sum() + v.sum())


_STAND_IN = KERNELS["sdpa"]._replace(load=lambda: _stand_in)
"""The limits of "sdpa" admit each device, dtype and head size of a run."""


def _pack(capacity: int) -> Pack:
    """Return a pack of a conversation of equal tokens, of which every second token is trained."""
    trained, borders = np.arange(capacity) % 2 == 1, np.array([0, capacity], dtype=np.int32)
    return Pack(np.zeros(capacity, dtype=np.int32), trained, borders, (Segment(0, 0, capacity, 0),))
