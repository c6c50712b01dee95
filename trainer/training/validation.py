"""The loss on held-out conversations, without an effect on the training."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from checkpoints import About
from sftstream import ChatEncoder, DataConfig, Pack, PackAssignment, PackLoader, batch_digest
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology
from trainer.llama.model import Llama
from trainer.training.step import pack_loss
from trainer.training.step_reader import StepReader, gather_refusals, reduce_totals

HELD_OUT = "held-out data"
"""Key of the held-out packs' digest in a checkpoint's manifest."""


class Validation:
    """The held-out packs, read once and kept in memory. Collective.

    Packs are assigned to ranks as in training, so that every topology validates on equal packs.
    `streams` is the run's number of streams, equal on every topology; `encoder` the run's encoder,
    None on ranks without a loader. Raises ValueError if the sources hold no trained token.
    """

    def __init__(self, config: TrainConfig, topology: Topology, encoder: ChatEncoder | None, streams: int) -> None:
        assert config.validation is not None
        self.every = config.validation.every
        self.conversations = self.trained_tokens = 0
        self.refused = Counter[str]()
        self._topology = topology
        self._packs: list[Pack] = []
        self._digests: list[str] = []
        data = msgspec.structs.replace(config.held_out(config.validation.sources), streams=streams)
        loader = PackLoader(_with_date_of(data, encoder), shard=topology.shard) if encoder else None
        assignment = PackAssignment(streams, data.global_batch, topology.dp)
        step_reader = StepReader(loader, assignment, data.capacity, topology.tp_group, sources=len(data.sources))
        self._read(step_reader, config.validation.global_batches)
        step_reader.close()
        if not self.trained_tokens:
            raise ValueError(f"validation.sources hold no trained token; use other sources ({self.describe()})")

    @property
    def digest(self) -> str:
        """Hash of the held-out packs of all ranks, in order."""
        return batch_digest(self._digests)

    def describe(self) -> str:
        """Return the counts in words; reasons of refusals are complete on rank 0 only."""
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.refused.most_common())
        refused = f"; refused {self.refused.total():,} ({reasons})" if reasons else ""
        return f"{self.conversations:,} conversations, {self.trained_tokens:,} trained tokens{refused}"

    def require_comparable(self, before: About) -> None:
        """Raise ValueError if a checkpoint's validation loss comes from other held-out packs.

        `before` is the manifest entry of the checkpoint. `keep_best` compares losses of equal packs
        only.
        """
        if before.digests.get(HELD_OUT, self.digest) != self.digest:
            raise ValueError(
                "checkpoint.keep_best compares validation losses, but the checkpoint's losses come from other held-out "
                "conversations; restore validation.sources, leave out keep_best, or give the run another name"
            )

    def after(self, step: int, model: Llama) -> float | None:
        """Return the validation loss after `step`, or None if `step` is not due. Collective.

        The loss is the mean cross-entropy over the held-out trained tokens, in nats.

        Equal on every rank. Raises ValueError if the loss is not a finite number.
        """
        if step % self.every:
            return None
        loss = self._loss(model)
        if not math.isfinite(loss):
            raise ValueError(
                f"step {step}: the validation loss is {loss}; lower optimizer.learning_rate, and once there is a "
                'checkpoint, set run.accept_changed = ["optimizer"] as well'
            )
        return loss

    @torch.no_grad()
    def _loss(self, model: Llama) -> float:
        # in float64, so that the sum over many packs adds little rounding
        total = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        for pack in self._packs:
            total += pack_loss(model, pack, self._topology.device)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else gathered weights stay in memory, without a backward pass
        dist.all_reduce(total, group=self._topology.mesh["dp"].get_group())
        return total.item() / self.trained_tokens

    def _read(self, step_reader: StepReader, limit: int | None) -> None:
        for step in itertools.count() if limit is None else range(limit):
            packs = step_reader.packs(step)
            count = reduce_totals(step, packs, step_reader, self._topology, stop=False)
            if count.refused:
                self.refused.update(
                    refusal.reason for refusal, _ in gather_refusals(packs, step_reader, self._topology)
                )
            if count.tokens:
                self._packs += packs
                self._digests.append(count.digest)
            self.conversations += count.rows - count.refused
            self.trained_tokens += count.trained_tokens
            if not count.unexhausted_shards:
                break


def _with_date_of(data: DataConfig, encoder: ChatEncoder) -> DataConfig:
    """Return `data` with the date of the run's template, by default the date of its start."""
    date = encoder.template.date
    tokenizer = msgspec.structs.replace(data.tokenizer, date=date.isoformat() if date else data.tokenizer.date)
    return msgspec.structs.replace(data, tokenizer=tokenizer)
