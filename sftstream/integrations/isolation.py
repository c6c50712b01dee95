"""Verify on a model that the conversations of a pack do not see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftstream.integrations.layouts import Batch, Layout
from sftstream.records import Pack

LENGTH = 40
"""Tokens of each conversation of the test pack, and of its padding."""
LEAST_LEAK = 0.05
"""Change of a logit that counts as a leak, as a share of the change by an own earlier token. In a
dense model without a leak, no bit changes; routed experts change the order of sums."""
ATTENTION = ("flash_attention_2", "sdpa", "eager")
"""Attention implementations to try for a remedy, the fastest first. "flex_attention" is left out,
since it compiles for up to half a minute."""


def require_isolation(model: Any, layout: Layout) -> None:
    """Raise ValueError if conversations of a pack see each other in `model`.

    The model gets a pack of three conversations twice, the second time with the first and the last
    exchanged, and must return the same logits for the conversation between them. An error names
    the settings with which this very model passes. At most 15 forward passes of 160 tokens. Weights
    and random numbers stay as they were.
    """
    if (leak := measured_leak(model, layout)) <= LEAST_LEAK:
        return
    kind, config = type(_unwrapped(model)).__name__, model.config
    attention = getattr(config, "_attn_implementation", None)
    raise ValueError(
        f"conversations of a pack see each other in {kind} with attention {attention!r}: exchanging two of them changed "
        f"the logits of a third by {leak:.0%} of the effect of its own tokens; {_remedy(model, layout)}"
    )


def measured_leak(model: Any, layout: Layout) -> float:
    """Return the largest change of a logit by other conversations of the pack, as a share of the
    largest change by an earlier token of the same conversation."""
    draw = np.random.default_rng(0)
    first, middle, last = draw.integers(_vocabulary(model), size=(3, LENGTH), dtype=np.int32)
    other = middle.copy()
    other[0] = (other[0] + 1) % _vocabulary(model)
    logits, exchanged, own = (
        _logits(model, layout, conversations)
        for conversations in ((first, middle, last), (last, middle, first), (first, other, last))
    )
    change = float((logits - exchanged).abs().max())
    effect = float((logits - own)[1:].abs().max())
    return change / effect if effect else float(change > 0)


def pack_of(conversations: Sequence[NDArray[np.int32]]) -> Pack:
    """Return a pack of conversations and a padding of the same length; every token is trained."""
    padding = np.zeros(LENGTH, np.int32)
    ids = np.concatenate([*conversations, padding])
    trained = np.arange(len(ids)) < len(ids) - LENGTH
    return Pack(ids, trained, np.arange(0, len(ids) + 1, LENGTH, dtype=np.int32))


@contextmanager
def evaluating(model: Any) -> Iterator[torch.device]:
    """Switch dropout and gradients off. Returns the device of the model."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _logits(model: Any, layout: Layout, conversations: Sequence[NDArray[np.int32]]) -> Tensor:
    """Return the logits of the conversation in the middle, float32 `(LENGTH, vocabulary)`."""
    batch = layout(pack_of(conversations))
    del batch["labels"]
    with evaluating(model) as device:
        logits: Tensor = model(**moved(batch, device)).logits
    return logits[0, LENGTH : 2 * LENGTH].float()


def _remedy(model: Any, layout: Layout) -> str:
    """Return the advice to choose a setting with which the model passes."""
    config = model.config
    if getattr(config, "use_cache", False):
        config.use_cache = False
        passes = measured_leak(model, layout) <= LEAST_LEAK
        config.use_cache = True
        if passes:
            return "set use_cache=False in the TrainingArguments and the model's config, which passes"
    if choice := next((name for name in ATTENTION if _passes(model, layout, name)), None):
        return f'load the model with attn_implementation="{choice}", which passes'
    return "no attention implementation installed here isolates them in this model, so it cannot be trained on packs"


def _passes(model: Any, layout: Layout, attention: str) -> bool:
    """Return True if the model passes with another attention implementation; restore its own."""
    model, before = _unwrapped(model), model.config._attn_implementation
    try:
        model.set_attn_implementation(attention)
        return measured_leak(model, layout) <= LEAST_LEAK
    except (ImportError, ValueError, RuntimeError):  # not installed, or not for this model or device
        return False
    finally:
        model.set_attn_implementation(before)


def _unwrapped(model: Any) -> Any:
    return getattr(model, "module", model)


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
