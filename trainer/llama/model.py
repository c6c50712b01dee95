"""Llama, Mistral, Qwen2 and Qwen3 as Hugging Face computes them, on one pack.

Activations are `(T, hidden_size)`, with `T` the tokens of the pack: no batch dimension, no
key-value cache, no mask. The same layers run on one process and under tensor parallelism;
hooks set by parallel.py exchange tokens between ranks.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from trainer.llama import float8
from trainer.llama.attention import Kernel, Segments, attend
from trainer.llama.config import LlamaConfig
from trainer.llama.lora.layers import A, Adapter, B, LoraConfig, Part
from trainer.llama.lora.nf4 import Nf4Weight
from trainer.llama.loss import WHOLE, Vocabulary, head_loss, token_losses
from trainer.llama.rotary import Rotation, inverse_frequencies, rotate, rotation_at
from trainer.llama.selection import Slices, in_slice, split_selection, take
from trainer.llama.sharding import weight_of
from trainer.llama.swiglu import swiglu


class Embedding(nn.Embedding):
    """Embedding lookup, int64 `(T,)` to `(T, hidden_size)`.

    With a weight split over the vocabulary, ids on other ranks give zeros: the sum over the ranks
    is the full result.
    """

    def forward(self, ids: Tensor) -> Tensor:
        rows = weight_of(self)
        if not isinstance(self.weight, DTensor):
            return F.embedding(ids, rows)
        ids = ids - self.weight.device_mesh.get_local_rank() * len(rows)
        here = (ids >= 0) & (ids < len(rows))
        return F.embedding(torch.where(here, ids, 0), rows) * here[:, None]


class Linear(nn.Linear):
    """Linear layer with the part of the weight on this rank, and adapters if `adapt` made them."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.adapter: Adapter | None = None
        self.nf4: Nf4Weight | None = None
        """The weight in 4 bits, in place of `weight`."""
        self.float8 = False
        """True multiplies in float8."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else weight_of(self, "bias")
        if self.nf4 is None and not self.float8:
            out = F.linear(x, weight_of(self), bias)
        else:
            out = float8.linear(x, weight_of(self)) if self.nf4 is None else self.nf4.linear(x)
            out = out if bias is None else out + bias
        return out if self.adapter is None else self.adapter.add(out, x, weight_of(self, A), weight_of(self, B))

    def adapt(self, lora: LoraConfig | None, *parts: Part) -> Self:
        """Add adapters for the targets of `lora` among `parts`; return the layer.

        `parts` are the matrices in each group of rows. `lora.quantize` replaces the weight.
        """
        if lora is not None and lora.quantize:
            groups = self.out_features // sum(part.rows for part in parts)
            self.nf4 = Nf4Weight(self.out_features, self.in_features, tuple(groups * part.rows for part in parts))
            self.register_parameter("weight", None)
        if lora is None or not any(part.target in lora.adapted for part in parts):
            return self
        self.adapter = Adapter(parts, lora.adapted, lora.rank, lora.scale)
        self.register_parameter(A, nn.Parameter(torch.empty(self.adapter.adapters * lora.rank, self.in_features)))
        self.register_parameter(B, nn.Parameter(torch.empty(self.adapter.rows_of(self.out_features), lora.rank)))
        return self


class Down(Linear):
    """Linear layer whose output is added to a residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return `residual` plus the layer's output, or the output alone."""
        if residual is None:
            return super().forward(x)
        if self.nf4 is not None or self.float8 or self.adapter is not None:
            return residual + super().forward(x)
        return torch.addmm(residual, x, weight_of(self).t())

    @property
    def is_split(self) -> bool:
        """True if tensor parallelism splits the weight."""
        return isinstance(self.weight if self.nf4 is None else self.nf4.codes, DTensor)


class Norm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, weight_of(self), self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    The rows of `qkv` are ordered by key-value head: the query heads of a group, then the key, then
    the value. With 4 query and 2 key-value heads the order is `[q0, q1, k0, v0, q2, q3, k1, v1]`,
    so the first half of the rows is a complete group for the first of two tensor-parallel ranks.
    """

    def __init__(self, config: LlamaConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.queries = config.heads_per_group
        self.head_size = size = config.head_size
        width = config.num_attention_heads * size
        rows = config.num_key_value_heads * (self.queries + 2) * size
        qkv = Part("q_proj", self.queries * size), Part("k_proj", size), Part("v_proj", size)
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias).adapt(lora, *qkv)
        self.query_norm, self.key_norm = _head_norm(config), _head_norm(config)
        output = Part("o_proj", config.hidden_size)
        self.output = Linear(width, config.hidden_size, bias=False).adapt(lora, output)
        self.kernel: Kernel | None = None
        """The attention kernel; None is the kernel of each device that needs no other package."""

    def heads(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of this rank's heads, each `(T, heads, D)`."""
        # (T, groups on this rank, queries + 2, D)
        qkv = self.qkv(x).unflatten(1, (-1, self.queries + 2, self.head_size))
        q, k, v = qkv.split((self.queries, 1, 1), dim=2)
        q, k = rotate(self.query_norm(q), rotation), rotate(self.key_norm(k), rotation)
        return q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)


def _head_norm(config: LlamaConfig) -> nn.Module:
    return Norm(config.head_size, eps=config.rms_norm_eps) if config.head_norms else nn.Identity()


class SwiGLU(nn.Module):
    """Gated feed-forward, `down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202).

    The rows of `gate_up` alternate between gate and up by block of `config.gate_block` channels: a
    contiguous share of whole blocks is complete for a tensor-parallel rank, as in `Attention.qkv`.
    With 2 blocks the order is `[gate0, up0, gate1, up1]`.
    """

    def __init__(self, config: LlamaConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.block = config.gate_block
        gate_up = Part("gate_proj", self.block), Part("up_proj", self.block)
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False).adapt(lora, *gate_up)
        down = Part("down_proj", config.hidden_size)
        self.down = Down(config.intermediate_size, config.hidden_size, bias=False).adapt(lora, down)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `residual` plus the feed-forward's output."""
        inner = swiglu(self.gate_up(x), self.block)
        if self.down.is_split:  # parallel.py sums the ranks' outputs first
            return residual + self.down(inner)  # type: ignore[no-any-return]
        return self.down(inner, residual)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Transformer layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    With `positions` all that follows the attention is computed for these tokens only, and the
    result has their number of rows. Under tensor parallelism `positions` are those of `Slices`, and
    the result has the rows of this rank's slice.

    `before` and `after` the attention are compiled, if at all; attention is not, since the borders
    of its segments differ from pack to pack.
    """

    tp: int = 1
    """Number of tensor-parallel ranks."""
    tp_rank: int = 0

    def __init__(self, config: LlamaConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.attention_norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config, lora)
        self.mlp_norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config, lora)

    def forward(self, x: Tensor, rotation: Rotation, segments: Segments, positions: Tensor | None = None) -> Tensor:
        attended = attend(*self.before(x, rotation), segments, self.attention.kernel)
        return self.after(x, attended, positions)

    def before(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, as `Attention.heads` does."""
        return self.attention.heads(self.attention_norm(x), rotation)

    def after(self, x: Tensor, attended: Tensor, positions: Tensor | None) -> Tensor:
        """Return the layer's output from its input and the attention's output, `(T, heads, D)`."""
        attended = attended.flatten(1)
        if positions is not None:
            attended = take(attended, positions)
            x = take(x, positions if self.tp == 1 else in_slice(positions, self.tp, self.tp_rank, len(x)))
        x = x + self.attention.output(attended)
        return self.mlp(self.mlp_norm(x), x)  # type: ignore[no-any-return]


class Select(nn.Module):
    """Selection of the hidden states to project to the vocabulary; None selects all.

    A separate module, because parallel.py hooks a gather of the tokens before the selection.
    """

    def forward(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        return hidden if positions is None else take(hidden, positions)


class Head(Linear):
    """Projection `(n, hidden_size)` to logits `(n, vocabulary)`, or to their loss.

    With a weight split over the vocabulary the logits are a DTensor, split over dimension 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if not isinstance(self.weight, DTensor):
            return logits
        return DTensor.from_local(logits, self.weight.device_mesh, [Shard(1)], run_check=False)

    def loss(self, x: Tensor, labels: Tensor, scale: Tensor, z_loss: float = 0.0) -> Tensor:
        """Return `scale` times the summed cross-entropy, or both losses, as `head_loss` does."""
        rows = weight_of(self)
        return head_loss(x, rows, labels, scale, self._vocabulary(rows), z_loss)

    def token_losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each token, fp32 `(n,)`, without a gradient."""
        rows = weight_of(self)
        return token_losses(x, rows, labels, self._vocabulary(rows))

    def _vocabulary(self, rows: Tensor) -> Vocabulary:
        if not isinstance(self.weight, DTensor):
            return WHOLE
        mesh = self.weight.device_mesh
        return Vocabulary(mesh.get_local_rank() * len(rows), mesh.get_group())


class Llama(nn.Module):
    """The complete model. `init_weights` or `load_weights` must set the weights before use.

    With `lora` only the adapters and `lora.modules_to_save` are trained: `init_adapters` or
    `load_adapters` must set the adapters as well.
    """

    tp: int = 1
    """Number of tensor-parallel ranks."""

    def __init__(self, config: LlamaConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.config, self.lora = config, lora
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, lora) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.select = Select()
        self.head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        # Not a buffer: a cast of the model to bf16 would round the frequencies, and a model made on
        # "meta" would have none.
        self.frequencies = inverse_frequencies(config)
        if lora is not None:
            self._freeze(lora)

    def _freeze(self, lora: LoraConfig) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in (A, B))
        if "embed_tokens" in lora.modules_to_save:
            self.embedding.requires_grad_(True)
        if "lm_head" in lora.modules_to_save:
            self.head.requires_grad_(True)

    def tie(self) -> None:
        """Share the embedding's weight with the head if the config ties them.

        Call again after replacing parameters.
        """
        if self.config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Segments,
        positions: Tensor | Slices | None = None,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        each: bool = False,
    ) -> Tensor:
        """Return the logits of a pack, `(T, vocabulary)`, or of `positions`, `(n, vocabulary)`.

        `input_ids` and `position_ids` are int64 `(T,)`; `positions` holds int64 indices `(n,)`
        into the pack, distinct and in rising order. Under tensor parallelism every rank of the
        group passes equal inputs, and the logits are a DTensor split over the vocabulary. Positions
        given as `Slices` spare the last layer all other tokens after its attention, as on one rank.

        With `labels`, int64 `(T,)` or `(n,)`, returns `scale` (an fp32 scalar, by default 1) times
        the summed cross-entropy instead, an fp32 scalar, equal on every rank of the group; with a
        coefficient `z_loss` above 0 the cross-entropy and the z-loss, fp32 `(2,)`, as `head_loss`
        does. With `labels` and `each` returns the cross-entropy of each label, fp32, without a
        gradient.
        """
        hidden = self.hidden(input_ids, position_ids, segments, positions)
        if labels is None:
            return self.head(hidden)  # type: ignore[no-any-return]
        if each:
            return self.head.token_losses(hidden, labels)
        scale = torch.ones((), device=hidden.device) if scale is None else scale
        return self.head.loss(hidden, labels, scale, z_loss)

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Segments,
        positions: Tensor | Slices | None = None,
    ) -> Tensor:
        """Return the normed hidden states of `positions`, `(n, hidden_size)`, or of all tokens."""
        x = self.embedding(input_ids)
        rotation = self.rotation(position_ids, x.dtype)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, rotation, segments)
        early, late = split_selection(positions, self.tp)
        x = last(x, rotation, segments, early)
        return self.select(self.norm(x), late)  # type: ignore[no-any-return]

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
        """Return cosines and sines for `position_ids`, on the device of `position_ids`."""
        if self.frequencies.device != position_ids.device:
            self.frequencies = self.frequencies.to(position_ids.device)
        return rotation_at(position_ids, self.frequencies, dtype)
