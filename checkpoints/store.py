"""A directory of steps: save one, find the newest that is whole, load it into any other sharding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from checkpoints.compatibility import misfit, require_fit
from checkpoints.errors import CheckpointError, CorruptCheckpoint, LostRank
from checkpoints.export import RECIPE, export, parse_recipe
from checkpoints.manifest import About, Manifest, Span
from checkpoints.model_directory import MODEL_FILE_BYTES
from checkpoints.object_store import open_root
from checkpoints.ranks import Ranks
from checkpoints.retention import Retention
from checkpoints.staging import Staging
from checkpoints.state import decode_value, encode_value, flatten, restore_tuples
from checkpoints.storage import BlobKey, StepWriter, read_tensors, read_values, verify

logger = logging.getLogger(__name__)

_DEFAULT_RETENTION = Retention()


class CheckpointStore:
    """Checkpoints under one root that all ranks see, one directory `step-00000120` a step.

    A step is complete and verified or it does not count. It is written aside, forced to the disk and renamed; a
    committed step is never written to again, and steps only grow. One run at a time owns a root: from `claim` or the
    first `save` on, others that try are refused, until this one's rank 0 ends, is killed, or closes the store. Behind a
    URL, where there are no locks, a save is refused instead once another run has saved.

    All ranks of the default process group call `claim`, `save`, `save_later`, `wait`, `load`, `latest` and `close`, in the
    same order, and an error on any rank is raised on all. Without `torch.distributed` they work in one process. `steps`
    and `values` are local.

    Args:
        root: A directory, or the URL of one that fsspec knows (`s3://`, `gs://`, ...). Created at the first save. Whatever
            in it has another name than ours is left alone.
        retention: Steps that stay; others are deleted after a save.
        timeout: What one rank waits for another, which may be writing its share, before it takes it for lost.
    """

    def __init__(
        self,
        root: Path | str,
        retention: Retention = _DEFAULT_RETENTION,
        *,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        self._retention = retention
        self._backend = open_root(root)
        self.root = self._backend.root
        self.timeout = timeout
        self.rejected: dict[int, str] = {}
        """Steps that the last `latest` found damaged, and why, until the next `save` moves them aside."""
        self._verified: dict[int, str] = {}
        self._losses: dict[int, float | None] = {}
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving: Future[None] | None = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as late:
            if error is None:
                raise
            logger.error("%s", late)  # What ended the run is raised; this is its consequence, or bad luck on top.

    @cached_property
    def _ranks(self) -> Ranks:
        return Ranks.join(self.timeout)

    def steps(self) -> list[int]:
        """The committed steps by their directories' names, oldest first. Their content is not looked at."""
        return self._backend.steps()

    def claim(self) -> None:
        """Makes this run the only one that may save here.

        Raises:
            CheckpointError: Another run has the root, which is named, or it cannot be made or locked.
        """
        self.wait()
        self._ranks.lead(f"claiming {self.root}", None, lambda _: self._backend.claim())

    def close(self) -> None:
        """Waits like `wait`, then lets another run have the root."""
        try:
            self.wait()
        finally:
            self._backend.release()

    def latest(self) -> int | None:
        """The newest step whose every byte is as it was committed, or None where no step was ever committed.

        Costs one reading of that step's files, shared out among the ranks. A damaged step is reported by a warning and
        in `rejected`, and the one before it is tried.

        Raises:
            CorruptCheckpoint: There are steps, and all are damaged. Starting afresh is for people to decide.
        """
        self.wait()
        ranks = self._ranks
        steps = ranks.lead("listing the steps", None, lambda _: self.steps())
        self.rejected = {}
        for step in reversed(steps):
            reason = self._judge(ranks, step)
            if reason is None:
                return step
            self.rejected[step] = reason
            if ranks.rank == 0:
                logger.warning("step %d in %s is damaged and not used: %s", step, self.root, reason)
        if steps:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in self.rejected.items())
            raise CorruptCheckpoint(
                f"no step in {self.root} is whole ({reasons}); repair one, or start afresh in another directory"
            )
        return None

    def save(
        self, step: int, state: dict[str, Any], values: Mapping[str, Any] = {}, about: About | None = None
    ) -> Path | str:
        """Commits a step and then deletes what is not to stay. When it returns, the step survives a power cut.

        Args:
            step: Must be above every committed step.
            state: Nested dicts and lists of tensors, DTensors and plain values (None, bool, int of 64 bits, float, str,
                bytes, and lists, tuples and dicts of them). A tensor that is no DTensor, and a plain value, is the same
                on every rank.
            values: Plain values of this rank by key, such as `rng/rank00001`. The step holds those of all ranks.
            about: For the manifest, as rank 0 gives it.

        Raises:
            CheckpointError: Nothing was committed, older steps are as they were, and the same step can be tried again; or
                this step was committed and older ones could not be deleted, which the message says.
            LostRank: Another rank ended meanwhile. The step is whole or not there.
        """
        self.wait()
        self._commit(step, self._ranks.agree(_saving(step), lambda: _writer(step, state, values)), about)
        return self._backend.path(step)

    def save_later(
        self, step: int, state: dict[str, Any], values: Mapping[str, Any] = {}, about: About | None = None
    ) -> None:
        """Copies all that `save` takes to host memory and returns; a thread then does what `save` does.

        One such save is under way at a time: the next waits for it, and so do all other methods that ranks call together.
        Each of them raises what went wrong in it; `failed` tells that there is something to raise.
        """
        self.wait()
        writer = self._ranks.agree(_saving(step), lambda: _writer(step, state, values).stage(self._staging))
        self._saving = self._thread.submit(self._commit, step, writer, about)

    @property
    def failed(self) -> bool:
        """The save under way has ended in an error that is not raised yet. Ranks may come to know this at different times."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Returns when no save is under way any more; raises what went wrong in it, once."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Fills the tensors of `state` in place, whatever their sharding, and replaces its plain values.

        The step's files are verified first, unless `latest` of this store just did. Tuples come back as tuples where
        `state` has one.

        Raises:
            CorruptCheckpoint: A file is not what was committed. `state` is as it was.
            CheckpointError: Keys, shapes or types of `state` are not those of the step. `state` is as it was.
        """
        self.wait()
        task, ranks = f"loading step {step}", self._ranks
        manifest = ranks.agree(task, lambda: self._verify(step, ranks))
        flat = ranks.agree(task, lambda: flatten(state))
        ranks.lead(task, misfit(flat, manifest), lambda misfits: require_fit(step, misfits))
        plain = ranks.agree(task, lambda: self._read(step, manifest, {key: manifest.plain[key] for key in flat.plain}))
        ranks.agree(task, lambda: read_tensors(self._backend.step_files(step, manifest), manifest, flat.tensors))
        for key, leaf in flat.plain.items():
            leaf.container[leaf.key] = restore_tuples(plain[key], leaf.value)

    def prune(self) -> list[int]:
        """Deletes what is not to stay, as a save does, and returns it.

        The newest step that is whole stays in any case, and so does all that is newer: it is looked for first, as `latest`
        does.
        """
        self.claim()
        good = self.latest()
        return [] if good is None else self._ranks.lead("pruning", None, lambda _: self._retain(good))

    def verify(self, step: int) -> Manifest:
        """Reads every byte of a step and returns its manifest. Any rank, alone.

        Raises:
            CorruptCheckpoint: A file is not what was committed.
        """
        manifest = self.manifest(step)
        verify(self._backend.step_files(step, manifest), manifest, list(manifest.files))
        return manifest

    def saved(self, step: int) -> datetime:
        """When a step was committed, in local time. Any rank, alone."""
        return self._backend.saved(step)

    def manifest(self, step: int) -> Manifest:
        """What a step says it holds, without a look at its other files. Any rank, alone."""
        return self._backend.manifest(step)

    def export(self, step: int, out: Path | str, *, file_bytes: int = MODEL_FILE_BYTES) -> None:
        """Writes a model directory by the recipe that the run saved among the values, after verifying the step. Alone.

        Raises:
            CheckpointError: The step has no recipe, or `out` is there.
        """
        manifest = self.verify(step)
        if RECIPE not in manifest.values:
            raise CheckpointError(f"step {step} in {self.root} was saved without a recipe for an export")
        recipe = parse_recipe(self.values(step, RECIPE)[RECIPE])
        export(self._backend.step_files(step, manifest), manifest, recipe, Path(out), file_bytes)

    def values(self, step: int, prefix: str = "") -> dict[str, Any]:
        """The values that all ranks gave to `save`, by key, of the keys that begin with `prefix`. Any rank, alone.

        Verifies the files it reads, and no others.
        """
        manifest = self.manifest(step)
        spans = {key: span for key, span in manifest.values.items() if key.startswith(prefix)}
        return self._read(step, manifest, spans)

    def _commit(self, step: int, writer: StepWriter, about: About | None) -> None:
        task, ranks = _saving(step), self._ranks
        self._losses.pop(step, None)  # A damaged step of this number may have had one.
        token = ranks.lead(task, step, self._begin)
        self.rejected = {}
        attempt = self._backend.attempt(step, token)
        try:
            share = ranks.divide(task, ranks.agree(task, writer.offer), writer.divide)
            part = ranks.agree(task, lambda: writer.write(attempt, share))
            ranks.lead(task, part, lambda parts: self._backend.commit(step, token, parts, about or About()))
        except LostRank:
            raise  # Another rank may have seen it committed. The next run sweeps what was not.
        except CheckpointError:
            if ranks.rank == 0:
                self._backend.abandon(step, token)
            raise
        ranks.lead(f"deleting steps after step {step}", None, lambda _: self._retain(step))

    def _judge(self, ranks: Ranks, step: int) -> str | None:
        """Why a step is not whole, as the lowest rank that sees damage puts it; None if it is."""
        task = f"verifying step {step}"
        self._verified.pop(step, None)
        mine = ranks.agree(task, lambda: self._damage(step, ranks))
        reason = ranks.lead(task, mine, lambda reasons: next((r for r in reasons if r is not None), None))
        if reason is not None:
            self._verified.pop(step, None)
        return reason

    def _damage(self, step: int, ranks: Ranks) -> str | None:
        try:
            self._verified[step] = self._verify(step, ranks).token
        except CorruptCheckpoint as error:
            return str(error)
        return None

    def _verify(self, step: int, ranks: Ranks) -> Manifest:
        """The manifest of a step, once this rank's share of the files it names is found to be as committed."""
        manifest = self.manifest(step)
        if self._verified.get(step) != manifest.token:
            largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
            verify(self._backend.step_files(step, manifest), manifest, largest_first[ranks.rank :: ranks.size])
        return manifest

    def _read(self, step: int, manifest: Manifest, spans: Mapping[str, Span]) -> dict[str, Any]:
        blobs = read_values(self._backend.step_files(step, manifest), manifest, spans)
        return {key: decode_value(key, blob) for key, blob in blobs.items()}

    def _retain(self, good: int) -> list[int]:
        """Deletes what is not to stay, given that `good` is whole."""
        surplus = self._retention.surplus(self.steps(), good, self._loss)
        self._backend.delete(surplus)
        return surplus

    def _loss(self, step: int) -> float | None:
        """The validation loss of a step, from its manifest, which is read once."""
        if step not in self._losses:
            try:
                self._losses[step] = self.manifest(step).about.validation_loss
            except CorruptCheckpoint:
                return None
        return self._losses[step]

    def _begin(self, steps: list[int]) -> str:
        if len(set(steps)) > 1:
            raise CheckpointError(f"the ranks save different steps, {steps}")
        return self._backend.begin(steps[0], self.rejected)


def _saving(step: int) -> str:
    return f"saving step {step}"


def _writer(step: int, state: dict[str, Any], values: Mapping[str, Any]) -> StepWriter:
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"the step is {step!r}; it must be an int from 0 to 2**63 - 1")
    flat = flatten(state)
    blobs: dict[BlobKey, bytes] = {("plain", key): encode_value(key, leaf.value) for key, leaf in flat.plain.items()}
    for key, value in values.items():
        if type(key) is not str:
            raise TypeError(f"a key of the values is {key!r}; keys are str")
        blobs["values", key] = encode_value(key, value)
    return StepWriter(flat.tensors, blobs)
