"""Give a Lightning trainer exact data, with a data module whose state is in each checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from sftstream.config import DataConfig
from sftstream.integrations.dataset import PackDataset
from sftstream.integrations.layouts import Batch, Layout, hugging_face, trained_tokens
from sftstream.integrations.shards import Shards, require_whole_step
from sftstream.state import DataState
from sftstream.streaming.assignment import Shard


class PackDataModule(LightningDataModule):  # type: ignore[misc]
    """The packs of a run as the data module of a Lightning trainer, one pack a batch.

    The state of the whole run is in each checkpoint of Lightning, and continues on another number
    of processes if `accumulate_grad_batches` is changed to match. A batch has a further entry
    `num_items_in_batch`: if the module's loss is the sum over the trained tokens of the pack
    divided by this number, then the gradient that Lightning averages over batches and processes is
    that of the mean over all trained tokens of the global batch. Models of transformers take this
    entry as an argument.

    Training ends with the data, at the same step on all processes. `data.epochs` is the number of
    passes over the data, so the trainer needs `max_epochs = 1`.

    `shard` is this process's part of the run; by default the trainer's process number of its number
    of processes. Give the data-parallel coordinate if several processes train on the same packs.

    Raises ValueError from `fit` if the trainer's settings would change the data or the loss.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        shard: Shard | None = None,
        workers: int | None = None,
        layout: Layout = hugging_face,
    ) -> None:
        super().__init__()
        self.config, self.shard, self.workers, self.layout = config, shard, workers, layout
        self._shards: Shards | None = None
        self._dataset: PackDataset | None = None
        self._start = self._first = 0
        """Packs consumed before this start of the trainer, and before its step 0."""

    def setup(self, stage: str) -> None:
        """Open the shard of this process, before Lightning restores a checkpoint."""
        trainer = self.trainer
        shard = self.shard or Shard(trainer.global_rank, trainer.world_size)
        if stage == "fit":
            self._require_exact_settings(trainer, shard)
        self._start = 0
        self._dataset = PackDataset(self.config, shard=shard, workers=self.workers, layout=self.layout)
        self._shards = Shards(self._dataset)
        if not any(isinstance(callback, _Progress) for callback in trainer.callbacks):
            trainer.callbacks.append(_Progress())

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of this process's packs."""
        # With the global generator, each start would draw a seed and change the model's dropout.
        generator = torch.Generator()
        return DataLoader(_Steps(self), batch_size=None, generator=generator, pin_memory=torch.cuda.is_available())

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the whole run after the trainer's last optimizer step.

        A checkpoint inside a step is that of the step before: its gradients are not in it.
        """
        return self.shards.state_dict(self._first + self.trainer.global_step * self.config.global_batch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint, which may be of another number of processes."""
        self.dataset.load_state_dict(state_dict)
        self._start = DataState.parse(state_dict).packs

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Stop the loader's workers."""
        if self._dataset is not None:
            self._dataset.close()

    @property
    def dataset(self) -> PackDataset:
        """The packs of this process."""
        assert self._dataset is not None, "Lightning calls setup first"
        return self._dataset

    @property
    def shards(self) -> Shards:
        """The processes of the run."""
        assert self._shards is not None, "Lightning calls setup first"
        return self._shards

    def begin(self) -> None:
        """Note the position at which the trainer starts, and count its batches in this topology."""
        trainer, batch = self.trainer, self.config.global_batch
        # The loader is ahead: Lightning has requested a batch.
        self._first = self._start - trainer.global_step * batch
        # Lightning ends a step after a multiple of accumulate_grad_batches, counted from batch 0.
        counted = trainer.fit_loop.epoch_loop.batch_progress.current
        moved = trainer.global_step * trainer.accumulate_grad_batches - counted.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(counted, name, getattr(counted, name) + moved)

    def _require_exact_settings(self, trainer: Any, shard: Shard) -> None:
        accumulated = trainer.accumulate_grad_batches
        require_whole_step(shard.count, accumulated, self.config.global_batch, "accumulate_grad_batches")
        if trainer.max_epochs != 1:
            raise ValueError(
                f"max_epochs = {trainer.max_epochs}, but data.epochs counts the passes over the data; set max_epochs=1"
            )


class _Progress(Callback):  # type: ignore[misc]
    """Tell the data module when a checkpoint is restored and training starts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        trainer.datamodule.begin()


class _Steps(IterableDataset[Batch]):
    """The batches of a process, a whole step at a time, with the loss's divisor in each."""

    def __init__(self, module: PackDataModule) -> None:
        self._module = module

    def __iter__(self) -> Iterator[Batch]:
        shards, dataset = self._module.shards, self._module.dataset
        batches = shards.batches()
        while step := list(islice(batches, dataset.micro_batches)):
            yield from _divided(step, shards.total(int(sum(map(trained_tokens, step)))), dataset.config.global_batch)


def _divided(step: Iterable[Batch], tokens: int, batch: int) -> Iterator[Batch]:
    """Yield batches with the divisor of their loss: Lightning divides the sum by `batch` itself."""
    for pack in step:
        yield {**pack, "num_items_in_batch": torch.tensor(tokens / batch)}
