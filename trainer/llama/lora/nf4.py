"""Frozen matrices in 4 bits: NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314),
with the numbers of bitsandbytes.

Each 64 numbers of a row are a block: 64 codes of 4 bits, times the largest absolute number of the
block. That number is a code of 8 bits, times the scale of 256 successive blocks, plus an offset:
4.127 bits for each weight. Whole tensors of Hugging Face are quantized, as in bitsandbytes, and
each rank keeps the codes of its own rows and columns: a topology changes no number.

Example: a row of 128 columns has 64 bytes of codes and 2 blocks. Blocks 0 and 1 belong to row 0,
and blocks 0 to 255, of rows 0 to 127, share a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.llama.config import LlamaConfig, uneven
from trainer.llama.sharding import local

BLOCK = 64
"""Weights of a block."""
BYTES = BLOCK // 2
"""Bytes of the codes of a block."""
GROUP = 256
"""Blocks that share a scale."""


class Quantized(NamedTuple):
    """A whole quantized matrix of `rows` x `columns`."""

    codes: Tensor
    """uint8 `(rows, columns / 2)`."""
    blocks: Tensor
    """Codes of the blocks' largest numbers, uint8 `(rows, columns / 64)`."""
    groups: Tensor
    """Scales, float32 `(ceil(blocks / 256),)`."""
    offset: Tensor
    """float32 scalar."""
    table: Tensor
    """Numbers of the codes of 8 bits, float32 `(256,)`."""


def quantize(weight: Tensor) -> Quantized:
    """Return a matrix as bitsandbytes quantizes it.

    Raises ValueError if bitsandbytes is not installed.
    """
    codes, state = _functions().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    rows = len(weight)
    return Quantized(
        codes.view(rows, -1), state.absmax.view(rows, -1), state.state2.absmax, state.offset, state.state2.code
    )


def _functions() -> Any:
    try:
        import bitsandbytes.functional
    except ModuleNotFoundError:
        raise ValueError(
            'lora.quantize = "nf4" needs bitsandbytes; run `pip install -e ".[qlora]"`, or remove lora.quantize'
        ) from None
    return bitsandbytes.functional


def require_blocks(config: LlamaConfig, tp: int) -> None:
    """Raise ValueError if the columns on a rank of `tp` are not whole blocks."""
    if sizes := uneven(config.columns(tp), BLOCK):
        raise ValueError(
            f'lora.quantize = "nf4" needs multiples of {BLOCK}: {sizes}; remove lora.quantize'
            f"{', or lower parallel.tp' if tp > 1 else ''}"
        )


class Nf4Weight(nn.Module):
    """The frozen weight of a fused layer in 4 bits, in buffers: neither trained nor saved.

    `sizes` are the rows of each matrix of Hugging Face in the layer.
    """

    codes: Tensor
    blocks: Tensor
    groups: Tensor
    rows: Tensor
    offsets: Tensor
    table: Tensor

    def __init__(self, rows: int, columns: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        groups = sum(-(-size * columns // BLOCK // GROUP) for size in sizes)
        buffers = {
            "codes": torch.empty(rows, columns // 2, dtype=torch.uint8),
            "blocks": torch.empty(rows, columns // BLOCK, dtype=torch.uint8),
            "groups": torch.empty(groups),
            # Of each row the number of its first block, counted in its matrix of Hugging Face, and
            # the place of this matrix's first scale in `groups`.
            "rows": torch.empty(rows, 2, dtype=torch.int32),
            "offsets": torch.empty(rows),
            "table": torch.empty(256),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def fill(self, matrices: Mapping[str, Quantized], pieces: list[tuple[str, int, int, int]], column: int) -> None:
        """Take the codes of this rank.

        `pieces` hold the name of a matrix, its first row, the first row here, and a number of rows;
        `column` is the first byte of codes of this rank in a row.
        """
        starts, next_group = {}, 0
        groups, rows = local(self.groups), local(self.rows)
        for name, matrix in matrices.items():
            starts[name] = next_group
            groups[next_group : next_group + len(matrix.groups)].copy_(matrix.groups)
            next_group += len(matrix.groups)
            local(self.table).copy_(matrix.table)
        width, blocks = local(self.codes).shape[1], local(self.blocks).shape[1]
        for name, first, here, count in pieces:
            matrix, their, our = matrices[name], slice(first, first + count), slice(here, here + count)
            local(self.codes)[our].copy_(matrix.codes[their, column : column + width])
            local(self.blocks)[our].copy_(matrix.blocks[their, column // BYTES : column // BYTES + blocks])
            numbers = torch.arange(first, first + count, device=rows.device) * matrix.blocks.shape[1]
            rows[our, 0] = (numbers + column // BYTES).int()
            rows[our, 1] = starts[name]
            local(self.offsets)[our] = matrix.offset

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight on this rank."""
        codes, blocks, rows = local(self.codes), local(self.blocks), local(self.rows)
        number = rows[:, :1] + torch.arange(blocks.shape[1], device=rows.device)
        scales = local(self.groups)[rows[:, 1:] + number // GROUP]
        largest = local(self.table)[blocks.int()] * scales + local(self.offsets)[:, None]
        shape = [len(codes), 2 * codes.shape[1]]
        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes.view(-1, 1), largest.view(-1), BLOCK, "nf4", shape, dtype
        )
        return found

    @property
    def shape(self) -> list[int]:
        """Rows and columns of the whole matrix."""
        return [self.codes.shape[0], 2 * self.codes.shape[1]]

    def linear(self, x: Tensor) -> Tensor:
        """Return the product of `x`, `(T, columns)`, with the weight, `(T, rows)`.

        The backward pass makes the weight again, so that none is kept.
        """
        product: Tensor = _Linear.apply(x, self)  # type: ignore[no-untyped-call]
        return product


def quantized(model: nn.Module) -> dict[str, Nf4Weight]:
    """Return the weights in 4 bits, by the names of the weights that they replace."""
    suffix = ".nf4"
    return {
        f"{path.removesuffix(suffix)}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, Nf4Weight)
    }


def count_weights(model: nn.Module) -> int:
    """Return the number of weights of a model, in 4 bits or not."""
    return sum(p.numel() for p in model.parameters()) + sum(2 * q.codes.numel() for q in quantized(model).values())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Nf4Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream @ ctx.weight.weight(upstream.dtype), None
