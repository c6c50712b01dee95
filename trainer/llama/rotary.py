"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.llama.config import LinearScaling, Llama3Scaling, LlamaConfig


class Rotation(NamedTuple):
    """Cosines and sines of the positions' angles, each `(T, 1, 1, D / 2)`."""

    cos: Tensor
    sin: Tensor


def rotation_at(position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """Return the cosines and sines of int64 positions `(T,)`, computed in fp32 and rounded to `dtype`."""
    angles = (position_ids[:, None].float() * frequencies)[:, None, None]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) on `(T, ..., D)`, pairing channel i with i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians a position for each pair of channels, fp32 `(D / 2,)` on the CPU, so that every device has these bits."""
    channels = torch.arange(0, config.head_size, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_size)
    match config.rope_scaling:
        case Llama3Scaling() as scaling:
            return _llama3_frequencies(frequencies, scaling)
        case LinearScaling(factor=factor):
            return frequencies / factor
        case None:
            return frequencies


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    # The share of the unscaled frequency goes from 0 to 1 between the two wavelengths that the factors name.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    share = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies
