"""Low-rank adapters on frozen layers: LoRA (Hu et al. 2021, arXiv:2106.09685), as `peft` computes
it.

A layer with the frozen weight `W` computes `x W^T + s (x A^T) B^T`. Only `A` and `B` are trained;
`B` begins as zeros.

Our layers fuse matrices of Hugging Face, and each of these matrices has an adapter of its own. The
fused layer stacks the `A` of its targets, so that one product serves all of them, and keeps the
rows of `B` in the order of the fused rows. Example: queries and values are targets with rank 2, and
a group has 4 query rows, 2 key rows and 2 value rows:

| rows of `qkv` | rows of `lora_B`, `(6, 2)` | rows of the spread `B`, `(8, 4)` |
|---------------|----------------------------|----------------------------------|
| q 0-3         | q 0-3                      | `[B_q, 0]`                       |
| k 0-1         |                            | `[0, 0]`                         |
| v 0-1         | v 0-1                      | `[0, B_v]`                       |

`lora_A` is `(4, hidden_size)`: `A_q` above `A_v`. Under tensor parallelism `B` is cut with the rows
of the layer, or `A` with its columns; the other one is on every rank. The sums that the layers
exchange are linear, so that adapters need no further exchange.
"""

from __future__ import annotations

import json
import math
from typing import Literal, NamedTuple, get_args

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.llama.config import LlamaConfig

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Saved = Literal["embed_tokens", "lm_head"]

TARGETS: tuple[Target, ...] = get_args(Target)
"""The linear layers of a block, under their names in `peft`."""

MOST_RANK = 4096
"""Limit of the rank."""

A, B = "lora_A", "lora_B"
"""Names of an adapter's parameters, in our layers and in `peft`."""


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[lora]` table: adapters to train instead of the weights of `model.init_from`.

    Without the table all weights are trained. See [lora.md](lora.md).
    """

    rank: int = 16
    """Rank of each adapter, 1 to 4096: peft's `r`."""
    alpha: float = 32.0
    """Scale of the adapters, above 0: their output is multiplied by alpha / rank."""
    targets: Literal["all-linear"] | tuple[Target, ...] = "all-linear"
    """Layers with an adapter, under peft's names, or "all-linear" for all seven."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA): large ranks then learn as fast as small
    ones."""
    modules_to_save: tuple[Saved, ...] = ()
    """Layers to train in full beside the adapters: the embedding, the head or both. Refused for a
    model that ties them."""
    quantize: Literal["nf4"] | None = None
    """Store the frozen matrices of the layers in 4 bits (QLoRA): "nf4" has the numbers of
    bitsandbytes with double quantization, and needs it. Default: none."""
    dropout: float = 0.0
    """Only 0, which is also peft's default. Present so that a copied setting is refused by name."""
    export_merged: bool = True
    """Write the model with the adapters added to its weights to `runs/<name>/export` as well, which
    `[evaluation]` needs. The adapter alone is always written, to `runs/<name>/adapter`."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise ValueError(f"rank = {self.rank} must be from 1 to {MOST_RANK}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha = {self.alpha} must be finite and above 0")
        if self.dropout != 0:
            raise ValueError(f"dropout = {self.dropout} is not supported; set dropout = 0, or remove the key")
        if not self.targets:
            raise ValueError('targets is empty; name layers such as "q_proj", or use "all-linear"')
        for name in ("targets", "modules_to_save"):
            listed = getattr(self, name)
            if isinstance(listed, tuple) and len(set(listed)) < len(listed):
                raise ValueError(f"{name} = {list(listed)} names a layer twice; remove one of the two")

    @property
    def scale(self) -> float:
        """Factor of the adapters' outputs."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def adapted(self) -> tuple[Target, ...]:
        """Names of the layers with an adapter, in the order of `TARGETS`."""
        return TARGETS if self.targets == "all-linear" else tuple(name for name in TARGETS if name in self.targets)

    @property
    def identity(self) -> dict[str, object]:
        """The settings that decide the numbers of a run, each in a single spelling."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.adapted),
            "rank_stabilized": self.rank_stabilized,
            "modules_to_save": sorted(self.modules_to_save),
            "quantize": self.quantize,
        }

    @property
    def toml(self) -> str:
        """The settings as an inline table."""
        targets = json.dumps(self.targets)
        return (
            f"{{ rank = {self.rank}, alpha = {self.alpha}, targets = {targets}, rank_stabilized = "
            f"{json.dumps(self.rank_stabilized)}, modules_to_save = {json.dumps(self.modules_to_save)} }}"
        )

    def require_base(self, init_from: str | None, *, resizes: bool, evaluates: bool) -> None:
        """Raise ValueError if the other tables of a run do not suit adapters.

        `resizes` is `model.resize_vocabulary`; `evaluates` is True with an `[evaluation]` table.
        """
        if init_from is None:
            raise ValueError(
                "[lora] trains adapters of an existing model, but [model] describes a new one; set model.init_from, or "
                "remove [lora]"
            )
        if resizes:
            raise ValueError(
                "model.resize_vocabulary adds rows that [lora] would not train and that no adapter can hold; resize the "
                "model before with resize_token_embeddings of transformers, or remove [lora]"
            )
        if evaluates and not self.export_merged:
            raise ValueError(
                "[evaluation] needs the merged model; set lora.export_merged = true, or remove [evaluation]"
            )

    def require_layers(self, *, float8: bool, muon: bool) -> None:
        """Raise ValueError if `run.float8` or `optimizer.kind = "muon"` does not suit adapters."""
        if float8 and self.quantize:
            raise ValueError(
                'run.float8 would round the 4-bit weights of lora.quantize = "nf4" once more; remove one of the two'
            )
        if muon:
            raise ValueError(
                'optimizer.kind = "muon" orthogonalizes the updates of whole weights, but [lora] trains two factors of '
                'each change; set optimizer.kind = "adamw", or remove [lora]'
            )

    def require_suits(self, shape: LlamaConfig) -> None:
        """Raise ValueError if a model of `shape` cannot have these adapters."""
        if self.modules_to_save and shape.tie_word_embeddings:
            raise ValueError(
                f"lora.modules_to_save = {list(self.modules_to_save)} would train a weight that the model uses as both "
                "embedding and head (tie_word_embeddings); leave lora.modules_to_save out, or start from a model that "
                "does not tie them"
            )


def adapter_weights(config: LlamaConfig, lora: LoraConfig) -> int:
    """Return the number of weights in the adapters of one layer."""
    hidden, wide, size = config.hidden_size, config.intermediate_size, config.head_size
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }
    return lora.rank * sum(sum(sizes[name]) for name in lora.adapted)


class Part(NamedTuple):
    """A matrix of Hugging Face in a fused layer."""

    target: Target
    rows: int
    """Rows of the matrix in each group of rows of the fused layer."""


class Adapter(NamedTuple):
    """The adapters of a fused layer; `lora_A` and `lora_B` lie in the layer."""

    parts: tuple[Part, ...]
    """All matrices of a group of rows, in order."""
    targets: tuple[Target, ...]
    """Names of the matrices with an adapter."""
    rank: int
    scale: float

    @property
    def adapters(self) -> int:
        """Number of matrices with an adapter."""
        return sum(part.target in self.targets for part in self.parts)

    def rows_of(self, out_features: int) -> int:
        """Return the rows of `lora_B` for a layer of `out_features` rows."""
        adapted = sum(part.rows for part in self.parts if part.target in self.targets)
        return out_features // sum(part.rows for part in self.parts) * adapted

    def add(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return `out`, `(T, rows)`, plus the adapters' outputs for `x`, `(T, columns)`.

        `a` and `b` are the parts of `lora_A` and `lora_B` on this rank.
        """
        return torch.addmm(out, F.linear(x, a), self.spread(b).t(), alpha=self.scale)

    def spread(self, b: Tensor) -> Tensor:
        """Return `lora_B` with zeros for the other adapters, `(rows, adapters * rank)`.

        One product with all stacked `A` then gives the outputs of all adapters.
        """
        if len(self.parts) == 1:
            return b
        sizes = [part.rows for part in self.parts if part.target in self.targets]
        adapted = iter(enumerate(b.unflatten(0, (-1, sum(sizes))).split(sizes, 1)))
        width = self.adapters * self.rank
        groups = len(b) // sum(sizes)
        placed = []
        for part in self.parts:
            if part.target in self.targets:
                number, rows = next(adapted)
                placed.append(F.pad(rows, (number * self.rank, width - (number + 1) * self.rank)))
            else:
                placed.append(b.new_zeros(groups, part.rows, width))
        return torch.cat(placed, 1).flatten(0, 1)
