"""Give the trainers of transformers and TRL exact data, with a callback."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sftstream.integrations.dataset import PackDataset
from sftstream.integrations.isolation import require_isolation
from sftstream.integrations.layouts import Batch
from sftstream.integrations.shards import Shards, require_whole_step
from sftstream.integrations.state_file import read_state_file, write_state_file
from sftstream.integrations.token_loss import require_token_loss
from sftstream.streaming.assignment import WHOLE


def one_pack(batches: Sequence[Batch]) -> Batch:
    """Return the only batch: the `data_collator` of a trainer whose dataset is a PackDataset.

    Raises ValueError if there are several, or if the trainer has removed a part of the batch.
    """
    if len(batches) != 1:
        raise ValueError(
            f"a batch of {len(batches)} packs, but a pack is a whole micro-batch; set per_device_train_batch_size=1 (and "
            "per_device_eval_batch_size=1), and data.capacity to the number of tokens of a micro-batch"
        )
    if "position_ids" not in batches[0]:
        raise ValueError(
            "the trainer has removed position_ids, without which conversations of a pack see each other; set "
            "remove_unused_columns=False, or pass PackCallback() to the trainer, which sets it"
        )
    return batches[0]


class PackCallback(TrainerCallback):  # type: ignore[misc]
    """Save and restore the data state of a PackDataset with the checkpoints of a Trainer.

    Works with `Trainer` of transformers, `SFTTrainer` of TRL, and classes derived from them. Each
    checkpoint directory gets a file `data_state.json`, written last, so `last_checkpoint` finds the
    newest complete checkpoint. A resume reads the file of the directory `checkpoint`; by default
    that of the trainer's step in `output_dir`. The trainer does not replay batches. The number of
    processes may change, with `gradient_accumulation_steps` changed to match.

    At the start of training, settings that would change the data or the loss are refused, and the
    model itself is tested: conversations of a pack must not see each other, and the loss must be a
    sum over trained tokens divided by their number in the global batch. Training ends with the
    data, at the same step on all processes, or earlier at `max_steps`.

    The callback sets `ignore_data_skip = True` and `remove_unused_columns = False`.
    """

    def __init__(self, checkpoint: str | os.PathLike[str] | None = None) -> None:
        self._checkpoint = checkpoint
        self._shards: Shards | None = None
        self._batch = self._first = 0
        """Packs of a global batch; packs consumed before the trainer's step 0."""

    def on_init_end(self, args: Any, *_: Any, **__: Any) -> None:
        """Set two arguments: a resume replays no batches, and batches keep all keys."""
        args.ignore_data_skip = True
        args.remove_unused_columns = False

    def on_train_begin(self, args: Any, state: Any, *_: Any, model: Any, train_dataloader: Any, **__: Any) -> None:
        """Check the settings, go to the data state of the trainer's step, and test the model."""
        _require_exact_loader(train_dataloader)
        dataset = train_dataloader.dataset
        _require_exact_settings(args, dataset)
        self._batch = dataset.config.global_batch
        if state.global_step:
            checkpoint = self._checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            dataset.load_state_dict(read_state_file(checkpoint))
        else:
            dataset.restart()
        self._first = dataset.loader.packs - state.global_step * self._batch
        # A DataLoader draws a seed when it is opened. With the global generator, a resumed run
        # would draw one time more than a run that was never killed, and get other dropout masks.
        getattr(train_dataloader, "base_dataloader", train_dataloader).generator = torch.Generator()
        _require_vocabulary(model, dataset)
        require_isolation(model, dataset.layout)
        require_token_loss(model, dataset.layout)
        self._shards = Shards(dataset)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop all processes at the end of the data, and save."""
        assert self._shards is not None
        # A resumed trainer without replayed batches counts its epoch from 0.
        state.epoch = state.global_step / state.max_steps
        if self._shards.finished(self._packs(state)):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write the data state of all shards into the checkpoint of this step."""
        assert self._shards is not None
        whole = self._shards.state_dict(self._packs(state))
        if args.should_save:
            write_state_file(Path(args.output_dir) / f"checkpoint-{state.global_step}", whole)

    def on_train_end(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
        """Stop the workers of the dataset."""
        train_dataloader.dataset.close()

    def _packs(self, state: Any) -> int:
        """Return the packs consumed by all shards up to the trainer's step."""
        return int(self._first + state.global_step * self._batch)


def _require_exact_loader(loader: Any) -> None:
    dataset = loader.dataset
    if type(loader).__name__ == "DataLoaderDispatcher" or getattr(loader, "split_batches", False):
        raise ValueError(
            "accelerate would cut the packs of the first process into pieces for the others; set "
            'accelerator_config={"dispatch_batches": False, "split_batches": False}, so that each process reads its own'
        )
    if not isinstance(dataset, PackDataset):
        raise ValueError(
            f"the trainer's loader reads a {type(dataset).__name__}, whose state PackCallback does not know; pass a "
            "PackDataset as train_dataset"
        )
    if getattr(loader.collate_fn, "data_collator", loader.collate_fn) is not one_pack:
        raise ValueError(
            "the data_collator would pad or mask packs again; pass data_collator=one_pack of "
            "sftstream.integrations.transformers_trainer"
        )


def _require_exact_settings(args: Any, dataset: PackDataset) -> None:
    if args.train_batch_size != 1:
        raise ValueError(
            f"a step would take {args.train_batch_size} packs at a time on each process, but a pack is a whole "
            "micro-batch; set per_device_train_batch_size=1, and make one GPU visible to each process"
        )
    processes, batch = (dataset.own_shard or WHOLE).count, dataset.config.global_batch
    require_whole_step(processes, args.gradient_accumulation_steps, batch, "gradient_accumulation_steps")
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices = False divides the loss by the tokens of each process alone; set it to True"
        )
    if args.save_total_limit == 1:
        raise ValueError(
            "save_total_limit = 1 deletes the last complete checkpoint before the next is complete; set it to 2 or more"
        )


def _require_vocabulary(model: Any, dataset: PackDataset) -> None:
    tokens, size = len(dataset.loader.encoder.tokenizer), model.config.get_text_config().vocab_size
    if tokens > size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model's vocab_size is {size}; use the tokenizer of the model, or "
            f"call model.resize_token_embeddings({tokens})"
        )
