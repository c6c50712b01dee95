"""Give NeMo Automodel exact data: a dataset, and a recipe whose checkpoints hold the data state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from torch.utils.data import IterableDataset

from sftstream.integrations.dataset import PackDataset
from sftstream.integrations.isolation import require_isolation
from sftstream.integrations.layouts import Batch, hugging_face
from sftstream.integrations.shards import Shards
from sftstream.records import Pack
from sftstream.streaming.assignment import Shard
from sftstream.toml_file import read_data_config

STATE = "sftstream"
"""Key of the state in a checkpoint of Automodel."""


def automodel(pack: Pack) -> Batch:
    """Return the arguments of `hugging_face`, with labels that are already shifted, as Automodel's
    losses expect: `labels[0, i]` is the token after position i if it is trained, else -100."""
    return {**hugging_face(pack), "labels": pack.labels[None]}


class Packs(IterableDataset[Batch]):
    """The packs of a run as the `dataset` of a YAML file of Automodel, one pack a batch.

    `config` is the path of a TOML file with a `[data]` table. Automodel calls `shard` with the
    data-parallel rank. The data ends at the same step on all processes. The state is that of the
    whole run, the same on all processes, and continues on another number of them.
    """

    use_distributed_checkpointing = True
    """Automodel then calls `state_dict` on all processes, and stores one state for all of them."""

    def __init__(self, config: str, shard: Shard | None = None) -> None:
        self.config = config
        data = read_data_config(Path(config))
        self.dataset = PackDataset(data, shard=shard, layout=automodel)
        self._shards: Shards | None = None
        self.scheduler: Any = None
        """Automodel's StepScheduler. `max_steps` is set to the last step when the data ends."""

    def shard(self, num_shards: int, index: int) -> Packs:
        """Return the packs of data-parallel rank `index` of `num_shards`."""
        return Packs(self.config, Shard(index, num_shards))

    def __iter__(self) -> Iterator[Batch]:
        if self.scheduler is None:
            raise ValueError(
                "Packs needs its recipe, which saves the state of the data; set recipe._target_ to "
                "sftstream.integrations.automodel_data.PackRecipe"
            )
        ended = self.shards.finished()
        for number, batch in enumerate(self.dataset if not ended else (), 1):
            if number % self.dataset.micro_batches == 0 and (ended := self.shards.finished()):
                self.scheduler.max_steps = self.scheduler.step + 1  # Automodel saves after its last step
            yield batch
            if ended:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the whole run after the last batch. All processes must call it."""
        return {STATE: json.dumps(self.shards.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, which may be of another number of processes."""
        self.dataset.load_state_dict(json.loads(state_dict[STATE]))

    @property
    def shards(self) -> Shards:
        """The processes of the run; all processes must ask for them the first time together."""
        if self._shards is None:
            self._shards = Shards(self.dataset)
        return self._shards


class PackRecipe(TrainFinetuneRecipeForNextTokenPrediction):  # type: ignore[misc]
    """Automodel's recipe of fine-tuning, whose `dataset` is `Packs`.

    Before the first step, the model is verified: conversations of a pack must not see each other.
    Each checkpoint holds the data state of the whole run.

    Raises ValueError from `setup` if the model or the settings would change the data.
    """

    rng: Any
    """Automodel's random states of this process."""

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """Verify model and settings, then continue from Automodel's newest checkpoint, if any."""
        packs = self.dataloader.dataset
        self._require_exact_settings(packs)
        (model,) = self.model_parts
        require_isolation(model, automodel)
        packs.scheduler = self.step_scheduler
        # Automodel would store the state of each rank, for the same number of ranks only.
        self.untrack_state("dataloader")
        self.packs = packs
        # With the global generator, each start would draw a seed and change the model's dropout.
        self.dataloader.generator = torch.Generator()
        super().load_checkpoint(restore_from)

    def _load_checkpoint_tracked_state(self, ckpt_dir: str) -> tuple[Any, Any, Any]:
        """Load all states, without random states if another number of processes saved them."""
        if len(list(Path(ckpt_dir, "rng").glob("*.pt"))) == dist.get_world_size():
            return super()._load_checkpoint_tracked_state(ckpt_dir)  # type: ignore[no-any-return]
        rng = self.rng
        self.untrack_state("rng")
        try:
            return super()._load_checkpoint_tracked_state(ckpt_dir)  # type: ignore[no-any-return]
        finally:
            self.rng = rng  # is tracked again

    def _require_exact_settings(self, packs: Any) -> None:
        if not isinstance(packs, Packs):
            raise ValueError(
                f"PackRecipe got a dataset of type {type(packs).__name__}; set dataset._target_ to "
                "sftstream.integrations.automodel_data.Packs, and remove packed_sequence"
            )
        if self.dataloader.batch_size is not None:
            raise ValueError(
                f"dataloader.batch_size = {self.dataloader.batch_size}, but a pack is a whole batch; set it to null"
            )
        batch = packs.dataset.config.global_batch
        if self.step_scheduler.grad_acc_steps != packs.dataset.micro_batches:
            raise ValueError(
                f"a step would be {self.step_scheduler.grad_acc_steps} packs on each rank, but data.global_batch = "
                f"{batch} is {packs.dataset.micro_batches}; set step_scheduler.global_batch_size: {batch} and "
                "step_scheduler.local_batch_size: 1"
            )
        if self.pp_enabled or self.mesh_context.cp_size > 1:
            raise ValueError(
                "pipeline or context parallelism would divide a pack, and the isolation of its conversations cannot be "
                "verified; set distributed.pp_size and distributed.cp_size to 1"
            )
