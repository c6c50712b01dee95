"""Compile a model's layers before the first step, for a pack that is the same in every start."""

from __future__ import annotations

import numpy as np

from sftstream import Pack, Segment
from trainer.distributed.mesh import Topology
from trainer.llama.model import Llama
from trainer.llama.parallel import reshard
from trainer.training.step import accumulate_gradients, label_losses

LENGTH = 512
"""Tokens of a conversation in the pack."""
MOST_ELEMENTS = 2**31 - 1
"""Elements of a matrix that indices of 32 bits reach."""


def warm_up(model: Llama, capacity: int, topology: Topology, *, evaluates: bool = False) -> None:
    """Run the passes of one pack of `capacity` tokens, and drop the gradients. Collective.

    `evaluates` also runs the pass without gradients of validation and of answers.

    The compiler fits its code to the first numbers of trained tokens and segments that it sees. A
    resumed run begins with another pack than the first start: compiled for that pack, its code
    could sum in another order.
    """
    pack = warm_up_pack(capacity, 2 * model.config.intermediate_size // topology.tp)
    accumulate_gradients(model, [pack], topology, trained_tokens=pack.trained_tokens)
    model.zero_grad(set_to_none=True)
    if evaluates:
        label_losses(model, pack, topology.device)
        reshard(model)


def warm_up_pack(capacity: int, width: int) -> Pack:
    """Return a pack of equal tokens, with the second half of each conversation trained.

    All tokens are trained if a matrix of `capacity` x `width` elements needs indices of 64 bits:
    code with these serves all packs, and code with indices of 32 bits only those of fewer trained
    tokens.
    """
    borders = np.array([*range(0, capacity, LENGTH), capacity], dtype=np.int32)
    segments = tuple(Segment(0, row, int(length), 0) for row, length in enumerate(np.diff(borders)))
    places = np.concatenate([np.arange(segment.length) for segment in segments])
    lengths = np.repeat(np.diff(borders), np.diff(borders))
    trained = (2 * places >= lengths) | (capacity * width > MOST_ELEMENTS)
    return Pack(np.zeros(capacity, dtype=np.int32), trained, borders, segments)
