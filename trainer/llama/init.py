"""Initial weights with equal bits on every topology and device."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Generator, Tensor, nn

from trainer.llama.lora.layers import A, B
from trainer.llama.model import Llama
from trainer.llama.sharding import local, window

TILE = 1024
"""Rows and columns of a tile of a matrix. Each tile is drawn by a generator of its own, so a rank
draws no more than the tiles that its part overlaps, and holds one tile for each of its cores."""


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Set norms to 1, biases to 0, and matrices to draws from normal(0, initializer_range).

    Adapters stay as they are.

    The draws of a matrix depend only on `seed` and on the name of the parameter. Each rank draws
    the tiles of its part on the CPU, so the bits do not depend on topology or device.
    """
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in (A, B):
            continue
        if parameter.ndim > 1:
            _draw(parameter, f"{seed}/{name}", partial(nn.init.normal_, mean=0.0, std=model.config.initializer_range))
        else:
            local(parameter).fill_(0.0 if name.endswith(".bias") else 1.0)


@torch.no_grad()
def init_adapters(model: Llama, seed: int) -> None:
    """Set each `lora_B` to 0, and each `lora_A` to draws from uniform(-1/sqrt(n), 1/sqrt(n)).

    `n` is the number of columns, so that the distribution is peft's. Drawn as in `init_weights`.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(f".{B}"):
            local(parameter).zero_()
        elif name.endswith(f".{A}"):
            bound = 1 / math.sqrt(parameter.shape[1])
            _draw(parameter, f"{seed}/{name}", partial(nn.init.uniform_, a=-bound, b=bound))


def _draw(parameter: nn.Parameter, source: str, draw: Callable[..., Tensor]) -> None:
    """Fill the part of a matrix on this rank with draws of `draw(tile, generator=...)`; `source` is
    their name."""
    rows, columns = window(parameter)
    part = local(parameter).detach()

    def fill(corner: tuple[int, int]) -> None:
        top, left = corner
        height, width = (min(TILE, size - start) for size, start in zip(parameter.shape, (top, left), strict=True))
        tile = draw(torch.empty(height, width), generator=_generator(source, top, left))
        first, last = max(top, rows.start), min(top + height, rows.stop)
        begin, end = max(left, columns.start), min(left + width, columns.stop)
        part[first - rows.start : last - rows.start, begin - columns.start : end - columns.start].copy_(
            tile[first - top : last - top, begin - left : end - left]
        )

    with ThreadPoolExecutor(_cores()) as pool:
        list(pool.map(fill, tiles(rows, columns)))


def _cores() -> int:
    """Return this rank's share of the cores of its host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def tiles(rows: slice, columns: slice) -> Iterator[tuple[int, int]]:
    """Yield the first row and column of each tile that overlaps a part of a matrix."""
    if rows.start == rows.stop or columns.start == columns.stop:
        return
    for top in range(rows.start // TILE * TILE, rows.stop, TILE):
        for left in range(columns.start // TILE * TILE, columns.stop, TILE):
            yield top, left


def _generator(source: str, top: int, left: int) -> Generator:
    # The first tile has the draws of a matrix that was drawn as a whole, as in version 0.1.0.
    digest = hashlib.sha256((f"{source}/{top}/{left}" if top or left else source).encode()).digest()
    return Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
