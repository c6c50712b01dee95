"""Initial weights are drawn by tiles: each rank draws its own, and all ranks have the bits of one process."""

from __future__ import annotations

import hashlib

import pytest
import torch
from gloo_ranks import run_ranks

from trainer.distributed.mesh import ParallelConfig, data_and_tensor_mesh
from trainer.llama.config import LlamaConfig
from trainer.llama.init import TILE, init_weights, tiles
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import gather_full

WIDE = LlamaConfig(
    vocab_size=2 * TILE + 60,
    hidden_size=64,
    intermediate_size=TILE + 40,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
"""Matrices of several tiles, by rows and by columns, with parts that begin within a tile."""


def weights(model: Llama) -> dict[str, torch.Tensor]:
    init_weights(model, 3)
    return {name: gather_full(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def on_a_rank(rank: int, tp: int) -> dict[str, torch.Tensor]:
    mesh = data_and_tensor_mesh("cpu", ParallelConfig(tp=tp))
    return weights(build(WIDE, mesh, torch.device("cpu"), capacity=64))


@pytest.mark.parametrize("tp", [1, 2])
def test_matrices_of_several_tiles_have_the_bits_of_one_process_on_every_rank(tp: int) -> None:
    alone = weights(Llama(WIDE))
    for found in run_ranks(2 * tp, on_a_rank, tp):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_part_overlaps_its_own_tiles_only() -> None:
    assert list(tiles(slice(0, 2), slice(0, 3))) == [(0, 0)]
    assert list(tiles(slice(TILE, 2 * TILE), slice(TILE - 1, TILE + 1))) == [(TILE, 0), (TILE, TILE)]
    assert list(tiles(slice(5, 5), slice(0, 3))) == []


def test_tiles_are_drawn_apart_and_a_matrix_of_one_tile_as_a_whole() -> None:
    found = weights(Llama(WIDE))
    embedding = found["embedding.weight"]
    assert embedding.std().item() == pytest.approx(WIDE.initializer_range, rel=0.02)
    assert not torch.equal(embedding[:60], embedding[TILE : TILE + 60])
    name = "blocks.0.attention.qkv.weight"
    draws = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"3/{name}".encode()).digest()[:8], "little", signed=True)
    )
    assert torch.equal(found[name], torch.empty(found[name].shape).normal_(0.0, 0.02, generator=draws))
