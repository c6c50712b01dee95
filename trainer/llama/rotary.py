"""Rotary positions (Su et al. 2021, arXiv:2104.09864), with the context extensions of Llama 3.1.

Example with a head of 4 channels and `rope_theta = 100`: the frequencies are `100 ** -(0 / 4) = 1`
and `100 ** -(2 / 4) = 0.1` radians per position. At position 3, channels 0 and 2 turn together by
3 radians, channels 1 and 3 by 0.3 radians.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.llama.config import LinearScaling, Llama3Scaling, LlamaConfig


class Rotation(NamedTuple):
    """Cosines and sines of the angles at each position, each `(T, 1, 1, D / 2)`."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Return the radians per position of each pair of channels, fp32 `(D / 2,)`.

    Computed on the CPU, so that every device gets equal bits.
    """
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
    # `kept` is the share of the unscaled frequency: 0 at the long wavelength, 1 at the short one.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotation_at(position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """Return cosines and sines of the angles at int64 positions `(T,)`.

    Angles are computed in fp32 and the result is rounded to `dtype`, as in Hugging Face's code.
    """
    angles = (position_ids[:, None].float() * frequencies)[:, None, None]
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the channels of `x`, `(T, ..., D)`; channel `i` turns together with `i + D / 2`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
