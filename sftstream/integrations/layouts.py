"""Make the dict of a pack that a trainer passes to its model, one function for each layout.

A layout is any function from a Pack to a dict. All tensors of a layout are new, so a trainer may
change them. A pack is always one row: a pack of 8192 tokens is a batch of shape (1, 8192).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sftstream.records import IGNORE_INDEX, Pack

Batch = dict[str, Any]
"""Name of an argument of a model -> tensor, or a number."""
Layout = Callable[[Pack], Batch]


def hugging_face(pack: Pack) -> Batch:
    """Return the arguments that models of transformers take for packs without padding.

    `input_ids`, `labels` and `position_ids` are int64 of shape (1, T). `labels` are not shifted, as
    the losses of transformers shift them: `labels[0, i]` is `input_ids[0, i]` if the token is
    trained, else -100. `cu_seq_lens_q` and `cu_seq_lens_k` are the borders of the segments, int32;
    `max_length_q` and `max_length_k` are the length of the longest segment, an int.
    """
    borders, longest = pack.cu_seqlens, pack.max_seqlen
    return {
        "input_ids": pack.input_ids[None],
        "labels": F.pad(pack.labels[:-1], (1, 0), value=IGNORE_INDEX)[None],
        "position_ids": pack.position_ids[None],
        "cu_seq_lens_q": borders.clone(),
        "cu_seq_lens_k": borders.clone(),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def shifted(pack: Pack) -> Batch:
    """Return the arguments of models that compare the logits at a position with the label there.

    `input_ids`, `labels` and `position_ids` are int64 of shape (1, T); `labels` are already
    shifted: `labels[0, i]` is the token after position i if it is trained, else -100. `cu_seqlens`
    are the borders of the segments, int32; `max_seqlen` is the length of the longest segment, an
    int.
    """
    return {
        "input_ids": pack.input_ids[None],
        "labels": pack.labels[None],
        "position_ids": pack.position_ids[None],
        "cu_seqlens": pack.cu_seqlens.clone(),
        "max_seqlen": pack.max_seqlen,
    }


def trained_tokens(batch: Batch) -> torch.Tensor:
    """Return the number of labels of a batch that count in the loss, a scalar tensor."""
    labels: torch.Tensor = batch["labels"]
    return (labels != IGNORE_INDEX).sum()
