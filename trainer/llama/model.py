"""Llama and its close relatives, as Hugging Face computes them, on one pack: no batch dimension, no cache, no mask."""

from __future__ import annotations

import hashlib
import math
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn import functional as F

from trainer.llama.attention import Segments, attend


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


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class Rotation(NamedTuple):
    """Cosines and sines of the positions' angles, each `(T, 1, 1, D / 2)`."""

    cos: Tensor
    sin: Tensor


def part(weight: Tensor) -> Tensor:
    """What this rank computes with of a weight, as a plain tensor.

    Layers compute on plain tensors: for DTensors torch goes through Python at each operation, and works out anew for each
    shape who holds what. A weight that all ranks hold meets the tokens of each by themselves, and so gets partial sums as
    its gradient.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])


class Embedding(nn.Embedding):
    """Zeros for tokens of other ranks' parts of the vocabulary, where the weight is split over it: the sum is whole."""

    def forward(self, ids: Tensor) -> Tensor:
        if not isinstance(self.weight, DTensor):
            return super().forward(ids)
        rows = part(self.weight)
        ids = ids - self.weight.device_mesh.get_local_rank() * len(rows)
        here = (ids >= 0) & (ids < len(rows))
        return F.embedding(torch.where(here, ids, 0), rows) * here[:, None]


class Linear(nn.Linear):
    """Multiplies with this rank's part of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, part(self.weight), None if self.bias is None else part(self.bias))


class Norm(nn.RMSNorm):
    """Norms this rank's tokens or heads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, part(self.weight), self.eps)


class Attention(nn.Module):
    """Grouped-query attention. The rows of `qkv` go by key-value head, `[its queries..., key, value]`.

    So a contiguous share of the rows is a set of whole groups, which is what a tensor-parallel rank needs.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.queries = config.heads_per_group
        self.head_size = config.head_size
        width = config.num_attention_heads * config.head_size
        rows = config.num_key_value_heads * (self.queries + 2) * config.head_size
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.query_norm, self.key_norm = _head_norm(config), _head_norm(config)
        self.output = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, segments: Segments) -> Tensor:
        # (T, groups of this rank, queries + 2, D): the groups are counted from the rows there are.
        qkv = self.qkv(x).unflatten(1, (-1, self.queries + 2, self.head_size))
        q, k, v = qkv.split((self.queries, 1, 1), dim=2)
        q, k = rotate(self.query_norm(q), rotation), rotate(self.key_norm(k), rotation)
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))
        return self.output(attend(q, k, v, segments).flatten(1))  # type: ignore[no-any-return]


def _head_norm(config: LlamaConfig) -> nn.Module:
    return Norm(config.head_size, eps=config.rms_norm_eps) if config.head_norms else nn.Identity()


class SwiGLU(nn.Module):
    """The gated feed-forward. The rows of `gate_up` go by block, `[gate, up]`, for the same reason as those of `qkv`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.block = config.gate_block
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).unflatten(1, (-1, 2, self.block)).unbind(2)
        return self.down((F.silu(gate) * up).flatten(1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotation: Rotation, segments: Segments) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, segments)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Select(nn.Module):
    """The rows that go on to the vocabulary; a module so that a sharded sequence can be gathered before it."""

    def forward(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        return hidden if positions is None else hidden[positions]


class Head(Linear):
    """Hidden states to logits: a DTensor where the weight is split over the vocabulary, as they are."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if not isinstance(self.weight, DTensor):
            return logits
        return DTensor.from_local(logits, self.weight.device_mesh, [Shard(1)], run_check=False)


class Llama(nn.Module):
    """The model. Its weights are arbitrary until `init_weights` or `load_weights` has set them."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.select = Select()
        self.head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        # Not a buffer: a cast of the model to bf16 would ruin it, and a model made on "meta" would lose it.
        self.frequencies = inverse_frequencies(config)

    def tie(self) -> None:
        """Make the head's weight the embedding's where the config says so; again after a parameter was replaced."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, segments: Segments, positions: Tensor | None = None
    ) -> Tensor:
        """Logits `(T, vocabulary)` of a pack, or `(n, vocabulary)` of those of its `positions`.

        `input_ids` and `position_ids` are int64 `(T,)`, `positions` int64 `(n,)` indices into the pack, each at most
        once. Under tensor parallelism every rank of the group passes the same, and the logits are a DTensor sharded
        over the vocabulary.
        """
        return self.head(self.select(self.hidden(input_ids, position_ids, segments), positions))  # type: ignore[no-any-return]

    def hidden(self, input_ids: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        """The normed hidden states `(T, hidden_size)`; under tensor parallelism those of this rank's tokens."""
        x = self.embedding(input_ids)
        rotation = self.rotation(position_ids, x.dtype)
        for block in self.blocks:
            x = block(x, rotation, segments)
        return self.norm(x)  # type: ignore[no-any-return]

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
        """Angles in fp32, cosines and sines in `dtype`, as Hugging Face has them."""
        if self.frequencies.device != position_ids.device:
            self.frequencies = self.frequencies.to(position_ids.device)
        angles = (position_ids[:, None].float() * self.frequencies)[:, None, None]
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


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Set every weight from `(seed, its name)` alone: norms to 1, biases to 0, matrices normal(0, initializer_range).

    The full tensor is drawn on the CPU and each rank keeps its share, so the bits are the same on any topology and any
    device. Costs one full tensor of host memory at a time.
    """
    for name, parameter in model.named_parameters():
        full = torch.full(parameter.shape, 0.0 if name.endswith(".bias") else 1.0)
        if parameter.ndim > 1:
            full.normal_(0.0, model.config.initializer_range, generator=_generator(seed, name))
        local(parameter).copy_(full[window(parameter)])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def window(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the full tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    # What distributed checkpoints ask a sharded tensor; it knows the strided shards of two mesh dimensions as well.
    (part,) = tensor.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(part.offsets, part.sizes, strict=True))
