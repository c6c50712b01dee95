"""Verify on a model that its loss is a sum over trained tokens, divided by a given number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sftstream.integrations.isolation import LENGTH, evaluating, moved, pack_of
from sftstream.integrations.layouts import Layout, hugging_face
from sftstream.records import IGNORE_INDEX

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative difference of two computations of a loss, by the type of the weights."""
COARSE = 2e-2
"""The same for weights of less precision."""


def require_token_loss(model: Any, layout: Layout = hugging_face) -> None:
    """Raise ValueError unless `model` returns the cross-entropy summed over the trained tokens of a
    pack and divided by `num_items_in_batch`.

    With this loss, the gradients of several packs and processes add up to the gradient of the mean
    over all trained tokens of the global batch.
    """
    kind = type(model).__name__
    if not getattr(getattr(model, "module", model), "accepts_loss_kwargs", True):
        raise ValueError(
            f"{kind} does not take num_items_in_batch, so its loss would be a mean of means over packs with different "
            "numbers of trained tokens; train another class of model, or pass compute_loss_func to a trainer of your own"
        )
    vocabulary = int(model.config.get_text_config().vocab_size)
    pack = pack_of(list(np.random.default_rng(1).integers(vocabulary, size=(3, LENGTH), dtype=np.int32)))
    items = 2 * pack.trained_tokens  # another number than that of the pack, as with several packs
    with evaluating(model) as device:
        batch = moved(layout(pack), device)
        loss = float(model(**batch, num_items_in_batch=torch.tensor(items, device=device)).loss)
        del batch["labels"]
        logits = model(**batch).logits[0].float()
        labels = pack.labels.to(device)
        expected = float(F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")) / items
    if abs(loss - expected) > TOLERANCE.get(next(model.parameters()).dtype, COARSE) * expected:
        raise ValueError(
            f"the loss of {kind} is {loss:.6f} where the sum over {pack.trained_tokens} trained tokens divided by "
            f"num_items_in_batch = {items} is {expected:.6f}; remove what changes the model's loss, or use a model class "
            "whose loss is transformers' ForCausalLMLoss"
        )
