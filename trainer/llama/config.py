"""The sizes and settings of a Llama, and the checks of them."""

from __future__ import annotations

import math
from typing import Literal

import msgspec


class Llama3Scaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="rope_type", tag="llama3"
):
    """Llama 3.1's stretching of the context: long wavelengths by `factor`, short ones not, those between smoothly."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"rope_scaling needs factor >= 1 and 0 < low_freq_factor < high_freq_factor, not {self}")


class LinearScaling(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="rope_type", tag="linear"
):
    """All wavelengths stretched by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"rope_scaling needs factor >= 1, not {self.factor}")


class LlamaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a Llama, in Hugging Face's words; defaults are Llama 3's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    """qwen2 has biases on queries, keys and values, qwen3 a norm on each head's query and key; mistral is a llama by name."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    rope_theta: float = 500000.0
    rope_scaling: Llama3Scaling | LinearScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192
    """The longest conversation in tokens that the positions are meant for."""
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads} where no head_dim is given"
            )
        if heads % groups:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {groups}")
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} must be even: rotary positions turn its halves together")
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
        """Queries, keys and values have biases."""
        return self.model_type == "qwen2"

    @property
    def head_norms(self) -> bool:
        """Each head's query and key is normed before it is turned."""
        return self.model_type == "qwen3"

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def gate_block(self) -> int:
        """Channels of one block of the fused gate and up projection.

        There are as many blocks as every tensor-parallel size that divides both the intermediate size and the key-value
        heads allows, so that any such size gets whole blocks and the stored layout knows no topology.
        """
        return self.intermediate_size // math.gcd(self.intermediate_size, self.num_key_value_heads)


_SIZES = tuple(field.name for field in msgspec.structs.fields(LlamaConfig) if field.type is int)
"""Fields that must be at least 1: every plain integer."""
