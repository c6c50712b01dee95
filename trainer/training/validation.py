"""The loss on held-out conversations, of all and of each source, without an effect on the
training."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from checkpoints import About
from sftstream import ChatEncoder, DataConfig, Pack, PackAssignment, PackLoader, batch_digest
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology
from trainer.llama.model import Llama
from trainer.llama.parallel import reshard
from trainer.training.step import label_losses, trained_positions
from trainer.training.step_reader import StepReader, gather_refusals, reduce_totals

HELD_OUT = "held-out data"
"""Key of the held-out packs' digest in a checkpoint's manifest."""
JUDGED = "held-out conversations that are judged"
"""Key of the digest that a resume compares; left out by earlier versions, which compared the
digest of the packs."""
REPLACED = ("data.sources", "data.shuffle", "data.epochs", "data.stages", "data.ends_with", "data.skip")
"""Settings of the data that are others for held-out conversations, as in `TrainConfig.held_out`."""
WORDS = 8
"""32-bit words of a SHA-256; a sum of fewer than 2**31 of them fits 64 bits."""


class HeldOutLoss(NamedTuple):
    """A validation, equal on every rank."""

    loss: float
    """Mean cross-entropy over all held-out trained tokens, in nats."""
    by_source: tuple[float | None, ...]
    """Mean cross-entropy over the trained tokens of each held-out source, in nats; None for a
    source without a trained token."""
    judged: float | None
    """Loss that `checkpoint.keep_best` and `validation.patience` compare; None if they compare
    answers."""


class Validation:
    """The held-out packs, read once and kept in memory. Collective.

    Packs are assigned to ranks as in training, so that every topology validates on equal packs.
    `streams` is the run's number of streams, equal on every topology; `encoder` the run's encoder,
    None on ranks without a loader; `questions` the digest of the questions that are judged, if any.
    Raises ValueError if the sources hold no trained token.
    """

    def __init__(
        self,
        config: TrainConfig,
        topology: Topology,
        encoder: ChatEncoder | None,
        streams: int,
        questions: str | None = None,
    ) -> None:
        assert config.validation is not None
        self.every = config.validation.every
        self._best_by = config.validation.best_by
        self._questions = questions
        self.conversations = self.trained_tokens = 0
        self.refused = Counter[str]()
        self._topology = topology
        self._packs: list[Pack] = []
        self._digests: list[str] = []
        data = msgspec.structs.replace(config.held_out(config.validation.sources), streams=streams)
        loader = PackLoader(_with_date_of(data, encoder), shard=topology.shard) if encoder else None
        assignment = PackAssignment(streams, data.global_batch, topology.dp)
        step_reader = StepReader(loader, assignment, data.capacity, topology.tp_group, sources=len(data.sources))
        self._tokens, self._hashes = self._read(step_reader, config.validation.global_batches, len(data.sources))
        step_reader.close()
        if not self.trained_tokens:
            raise ValueError(f"validation.sources hold no trained token; use other sources ({self.describe()})")
        if isinstance(self._best_by, int) and not self._tokens[self._best_by]:
            raise ValueError(
                f"validation.best_by = {self._best_by} is a source without a held-out trained token; set "
                f'validation.best_by = "all", or name another source ({self.describe()})'
            )

    @property
    def digests(self) -> dict[str, str]:
        """Digests for a checkpoint's manifest: of the packs and the name of what is judged, and of
        the conversations or answers that are judged, in any packs and order."""
        match self._best_by:
            case "all":
                packs, judged = [], str(self._hashes.sum(0).tolist())
            case "answers":
                packs, judged = [f"answers {self._questions}"], f"answers {self._questions}"
            case source:
                packs, judged = [f"source {source}"], str(self._hashes[source].tolist())
        return {HELD_OUT: batch_digest([*self._digests, *packs]), JUDGED: batch_digest([judged])}

    def describe(self) -> str:
        """Return the counts in words; reasons of refusals are complete on rank 0 only."""
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.refused.most_common())
        refused = f"; refused {self.refused.total():,} ({reasons})" if reasons else ""
        return f"{self.conversations:,} conversations, {self.trained_tokens:,} trained tokens{refused}"

    def require_comparable(self, before: About, accepted: Sequence[str]) -> None:
        """Raise ValueError if a checkpoint's validation loss comes from other conversations.

        `before` is the manifest entry of the checkpoint, `accepted` the changes of the data that
        this resume has accepted. `keep_best` and `patience` compare losses of equal tokens and
        labels only; other packs and another order of them change no loss.
        """
        key = JUDGED if JUDGED in before.digests else HELD_OUT
        now = self.digests[key]
        if before.digests.get(key, now) == now:
            return
        settings = ["validation.sources", "validation.global_batches", "validation.best_by", "[evaluation]"]
        settings += [change for change in accepted if not change.startswith(REPLACED)]
        raise ValueError(
            "checkpoint.keep_best and validation.patience compare validation losses, but the checkpoint's losses come from "
            f"other held-out conversations or other tokens of them; restore {', '.join(settings[:-1])} and {settings[-1]}, or "
            "leave out keep_best and patience, or give the run another name"
        )

    def after(self, step: int, model: Llama) -> HeldOutLoss | None:
        """Return the validation losses after `step`, or None if `step` is not due. Collective.

        Raises ValueError if the loss is not a finite number.
        """
        if step % self.every:
            return None
        result = self._losses(model)
        if not math.isfinite(result.loss):
            raise ValueError(
                f"step {step}: the validation loss is {result.loss}; lower optimizer.learning_rate, and once there is a "
                'checkpoint, set run.accept_changed = ["optimizer"] as well'
            )
        return result

    def _losses(self, model: Llama) -> HeldOutLoss:
        # The losses stay on the device until the end, 4 bytes a label: no wait between packs.
        losses = [label_losses(model, pack, self._topology.device) for pack in self._packs]
        reshard(model)
        totals = torch.zeros(len(self._tokens), dtype=torch.float64)
        if self._topology.leads and losses:  # the other ranks of a tensor-parallel group have equal losses
            sources = np.concatenate([_sources_of_labels(pack) for pack in self._packs])
            # in float64, so that the sum over many tokens adds little rounding
            values = torch.cat(losses).double().cpu().numpy()
            totals += torch.from_numpy(np.bincount(sources, values, len(totals)))
        dist.all_reduce(totals)
        sums = totals.tolist()
        means = tuple(total / count if count else None for total, count in zip(sums, self._tokens, strict=True))
        loss = sum(sums) / self.trained_tokens
        judged = means[self._best_by] if isinstance(self._best_by, int) else loss
        if self._best_by == "answers":
            judged = None
        return HeldOutLoss(loss, means, judged)

    def _read(self, step_reader: StepReader, limit: int | None, sources: int) -> tuple[list[int], NDArray[np.int64]]:
        """Read the packs; return the trained tokens of each source, and the sums of the hashes of
        its conversations, equal on every rank."""
        tokens, hashes = torch.zeros(sources, dtype=torch.int64), torch.zeros(sources, WORDS, dtype=torch.int64)
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
                if mine := step_reader.step:
                    trained = np.bincount(mine.segments["source"], mine.segments["trained_tokens"], sources)
                    tokens += torch.from_numpy(trained.astype(np.int64))
                    hashes += torch.from_numpy(_hashes(mine.packs, sources))
            self.conversations += count.rows - count.refused
            self.trained_tokens += count.trained_tokens
            if not count.unexhausted_shards:
                break
        dist.all_reduce(tokens)
        dist.all_reduce(hashes)
        return tokens.tolist(), hashes.numpy()


def _hashes(packs: Sequence[Pack], sources: int) -> NDArray[np.int64]:
    """Return for each source the sum of its conversations' SHA-256, of tokens and labels."""
    sums = np.zeros((sources, WORDS), np.int64)
    for pack in packs:
        for segment, first, end in zip(pack.segments, pack.borders, pack.borders[1:], strict=False):
            digest = hashlib.sha256(pack.ids[first:end].astype("<i4").tobytes())
            digest.update(pack.trained[first:end].tobytes())
            sums[segment.source] += np.frombuffer(digest.digest(), "<u4")
    return sums


def _sources_of_labels(pack: Pack) -> NDArray[np.int64]:
    """Return the index of the source of each label that counts in the loss, in order."""
    numbers = np.array([segment.source for segment in pack.segments], np.int64)
    places = np.searchsorted(pack.borders, trained_positions(pack).numpy(), side="right") - 1
    found: NDArray[np.int64] = numbers[places]
    return found


def _with_date_of(data: DataConfig, encoder: ChatEncoder) -> DataConfig:
    """Return `data` with the date of the run's template, by default the date of its start."""
    date = encoder.template.date
    tokenizer = msgspec.structs.replace(data.tokenizer, date=date.isoformat() if date else data.tokenizer.date)
    return msgspec.structs.replace(data, tokenizer=tokenizer)
