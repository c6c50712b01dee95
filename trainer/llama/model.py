"""Llama and its close relatives, as Hugging Face computes them, on one pack: no batch dimension, no cache, no mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from trainer.llama.attention import Segments, attend
from trainer.llama.config import LlamaConfig
from trainer.llama.rotary import Rotation, inverse_frequencies, rotate, rotation_at
from trainer.llama.sharding import local_weight


class Embedding(nn.Embedding):
    """Zeros for tokens of other ranks' parts of the vocabulary, where the weight is split over it: the sum is whole."""

    def forward(self, ids: Tensor) -> Tensor:
        if not isinstance(self.weight, DTensor):
            return super().forward(ids)
        rows = local_weight(self.weight)
        ids = ids - self.weight.device_mesh.get_local_rank() * len(rows)
        here = (ids >= 0) & (ids < len(rows))
        return F.embedding(torch.where(here, ids, 0), rows) * here[:, None]


class Linear(nn.Linear):
    """Multiplies with this rank's part of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local_weight(self.weight), None if self.bias is None else local_weight(self.bias))


class Norm(nn.RMSNorm):
    """Norms this rank's tokens or heads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, local_weight(self.weight), self.eps)


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
        return rotation_at(position_ids, self.frequencies, dtype)
