"""Give torchtitan exact data: a data loader whose state torchtitan saves in its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from sftstream.integrations.dataset import PackDataset
from sftstream.integrations.layouts import shifted
from sftstream.integrations.shards import Shards
from sftstream.streaming.assignment import Shard
from sftstream.toml_file import read_data_config

STATE = "sftstream"
"""Key of the state in a checkpoint of torchtitan."""


class PackDataLoader(BaseDataLoader):  # type: ignore[misc]
    """The packs of a run as the data loader of torchtitan, `local_batch_size` packs a batch.

    A batch is `{"input", "positions"}` and labels, each int64 of shape (local_batch_size, seq_len);
    torchtitan masks attention between conversations by the positions, and divides the loss by the
    trained tokens of the global batch. Each checkpoint holds the state of the whole run, which
    continues on another data-parallel size.

    Training ends with the data, at the same step on all processes. `training.seq_len` is
    `data.capacity`, and `training.global_batch_size` is `data.global_batch`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        """The settings of the loader."""

        dataset: str = "run.toml"
        """TOML file with a `[data]` table, which may hold `seed` and `epochs` too, or of a run."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        data = read_data_config(Path(config.dataset))
        if data.capacity != seq_len:
            raise ValueError(
                f"training.seq_len = {seq_len}, but data.capacity = {data.capacity}; give both the same number of tokens"
            )
        if data.global_batch % (local_batch_size * dp_world_size):
            raise ValueError(
                f"a batch of {local_batch_size} packs on each of {dp_world_size} data-parallel ranks does not divide "
                f"data.global_batch = {data.global_batch}; set training.global_batch_size={data.global_batch}, and a "
                "training.local_batch_size that divides it"
            )
        self._packs = local_batch_size
        self._dataset = PackDataset(data, shard=Shard(dp_rank, dp_world_size), layout=shifted)
        self._shards = Shards(self._dataset)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        batches = self._shards.batches()
        while packs := list(islice(batches, self._packs)):
            stacked = {
                name: torch.cat([pack[name] for pack in packs]) for name in ("input_ids", "position_ids", "labels")
            }
            yield {"input": stacked["input_ids"], "positions": stacked["position_ids"]}, stacked["labels"]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the whole run after the last batch, the same on all ranks.

        Raises ValueError inside a step, which is where torchtitan has another global batch.
        """
        if (packs := self._dataset.loader.packs) % self._dataset.config.global_batch:
            raise ValueError(
                f"{packs} packs are not a multiple of data.global_batch = {self._dataset.config.global_batch}; set "
                "training.global_batch_size to data.global_batch"
            )
        return {STATE: json.dumps(self._shards.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, which may be of another data-parallel size."""
        if state_dict:
            self._dataset.load_state_dict(json.loads(state_dict[STATE]))
