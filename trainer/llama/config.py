"""The sizes and settings of a Llama, and their checks.

The field names are the keys of Hugging Face's `config.json`. Code elsewhere derives its lists of
keys from the fields of `LlamaConfig`: a new size is entered here only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec


class Llama3Scaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="rope_type", tag="llama3"
):
    """Llama 3.1's context extension.

    A pair of channels with a long wavelength turns `factor` times slower, a pair with a short
    wavelength keeps its frequency, and the scale changes smoothly between the two limits.
    """

    factor: float
    low_freq_factor: float
    """Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled fully."""
    high_freq_factor: float
    """Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept."""
    original_max_position_embeddings: int
    """Context length in tokens before the extension."""

    def __post_init__(self) -> None:
        longest = _MOST["max_position_embeddings"]
        is_scale = 1 <= self.factor < math.inf and 1 <= self.original_max_position_embeddings <= longest
        if not (is_scale and 0 < self.low_freq_factor < self.high_freq_factor < math.inf):
            raise ValueError(
                "rope_scaling needs factor >= 1, 0 < low_freq_factor < high_freq_factor, all finite, and "
                f"original_max_position_embeddings from 1 to {longest}, not {self}; restore config.json"
            )


class LinearScaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="rope_type", tag="linear"
):
    """Context extension with every frequency divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling needs factor >= 1, not {self.factor}; restore config.json")


class LlamaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes and settings of a Llama, named as in `config.json`; the defaults are Llama 3's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    """The architecture. qwen2 adds biases to queries, keys and values; qwen3 adds a norm to the
    query and key of each head; mistral computes exactly as llama does."""
    head_dim: int | None = None
    """Channels of one head; None means hidden_size / num_attention_heads."""
    rope_theta: float = 500000.0
    rope_scaling: Llama3Scaling | LinearScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192
    """Longest conversation, in tokens, supported by the model."""
    initializer_range: float = 0.02
    """Standard deviation of the initial matrices."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            if not 1 <= getattr(self, name) <= _MOST[name]:
                raise ValueError(f"{name} must be from 1 to {_MOST[name]}, not {getattr(self, name)}")
        if self.head_dim is not None and not 1 <= self.head_dim <= _MOST_CHANNELS:
            raise ValueError(f"head_dim must be from 1 to {_MOST_CHANNELS}, not {self.head_dim}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads} if head_dim is not given"
            )
        if heads % groups:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {groups}")
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} must be even: rotary positions pair the channels of a head")
        if not (
            0 < self.rope_theta < math.inf and 0 < self.rms_norm_eps < 1 and 0 <= self.initializer_range < math.inf
        ):
            raise ValueError(
                f"rope_theta {self.rope_theta} must be above 0, rms_norm_eps {self.rms_norm_eps} between 0 and 1, and "
                f"initializer_range {self.initializer_range} not negative"
            )

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def qkv_bias(self) -> bool:
        """True if queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def head_norms(self) -> bool:
        """True if the query and key of each head are normed before the rotation."""
        return self.model_type == "qwen3"

    @property
    def heads_per_group(self) -> int:
        """Query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def gate_block(self) -> int:
        """Channels of one block of the fused gate and up projection.

        The number of blocks is the greatest common divisor of intermediate_size and
        num_key_value_heads. Every tensor-parallel size that divides both sizes also divides the
        number of blocks, so each rank gets whole blocks and the stored layout does not depend on
        the topology. Example: intermediate_size 48 and 4 key-value heads make 4 blocks of 12
        channels, which suits tp 1, 2 and 4.
        """
        return self.intermediate_size // math.gcd(self.intermediate_size, self.num_key_value_heads)

    def columns(self, tp: int) -> dict[str, int]:
        """Return the columns of the layers' matrices on a rank of `tp`, by their keys."""
        return {
            "hidden_size": self.hidden_size,
            "num_attention_heads x head_dim / tp": self.num_attention_heads * self.head_size // tp,
            "intermediate_size / tp": self.intermediate_size // tp,
        }


def uneven(sizes: Mapping[str, int], multiple: int) -> str:
    """Return the sizes that are no multiples of `multiple`, as "name = size, name = size"."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % multiple)


_SIZES = tuple(field.name for field in msgspec.structs.fields(LlamaConfig) if field.type is int)
"""Names of the integer fields, each at least 1."""

_MOST_CHANNELS = 2**14
_MOST = dict.fromkeys(_SIZES, 2**20) | {
    "vocab_size": 2**24,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "max_position_embeddings": 2**40,
}
"""Largest value of each integer field, far above published models: a layer of larger matrices
cannot be stored, and each block takes a moment to build."""
