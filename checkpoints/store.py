"""Save steps under a root, find the newest undamaged step, and load a step into any sharding."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from checkpoints.commit import Marker
from checkpoints.compatibility import misfit, require_fit
from checkpoints.errors import CheckpointError, CorruptCheckpoint, LostRank
from checkpoints.manifest import About, Manifest, Span
from checkpoints.model.directory import MODEL_FILE_BYTES
from checkpoints.model.export import RECIPE, export, export_with_base, parse_recipe
from checkpoints.object_store import open_root
from checkpoints.ranks import Ranks
from checkpoints.retention import Retention
from checkpoints.staging import Staging
from checkpoints.state import flatten, restore_tuples
from checkpoints.storage import BlobKey, Share, StepWriter, read_tensors, verify
from checkpoints.values import encode_value, read_step_values

logger = logging.getLogger(__name__)

_DEFAULT_RETENTION = Retention()


class _Verified(NamedTuple):
    """The attempt that wrote a verified step, and the markers of verified files by name."""

    token: str
    markers: dict[str, Marker]


class CheckpointStore:
    """Checkpoints under a root shared by all ranks, a directory per step, such as `step-00000120`.

    A step is complete and verified, or ignored. A step is written under another name, forced to the
    disk and renamed; a committed step is never written to again. Step numbers only grow. A single
    run at a time saves under a root: from `claim` or the first `save` on, further runs are refused
    until rank 0 of this run ends, is killed, or closes the store. Behind a URL there are no locks;
    there, a save is refused once another run has saved.

    All ranks of the default process group call `claim`, `save`, `save_later`, `wait`, `load`,
    `latest`, `prune` and `close` in the same order, and an error on any rank is raised on all
    ranks. Without `torch.distributed` the methods work in a single process. The remaining methods
    are local: any rank may call such a method alone.

    Example:

        store = CheckpointStore("runs/my-run/checkpoints", Retention(keep=2))
        state = {"model": model.state_dict(), "step": 120}
        store.save(120, state)                      # on return, step-00000120 survives a power cut
        if (step := store.latest()) is not None:    # reads and verifies every byte
            store.load(step, state)                 # fills tensors in place

    Args:
        root: A directory, or the URL of a directory known to fsspec (`s3://`, `gs://`, ...). Made
            at the first save. Foreign names in the root are left alone.
        retention: The steps to keep; a save deletes the rest.
        timeout: Time to wait for another rank, possibly still writing a share, before raising
            LostRank.
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
        """Damage by step, as the last `latest` found; the next `save` renames the damaged steps."""
        self._verified: dict[int, _Verified] = {}
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
            logger.error("%s", late)  # `error` ended the run and is raised; `late` often follows from it.

    @cached_property
    def _ranks(self) -> Ranks:
        return Ranks.join(self.timeout)

    def steps(self) -> list[int]:
        """Return the committed steps from the names of directories, oldest first. Local."""
        return self._backend.steps()

    def claim(self) -> None:
        """Refuse saves of further runs under this root.

        Raises:
            CheckpointError: Another run holds the root (the message names the process), or the root
                cannot be made or locked.
        """
        self.wait()
        self._ranks.lead(f"claiming {self.root}", None, lambda _: self._backend.claim())

    def close(self) -> None:
        """Wait like `wait`, then let further runs save."""
        try:
            self.wait()
        finally:
            self._backend.release()

    def latest(self) -> int | None:
        """Return the newest undamaged step, or None if no step was ever committed.

        Reads every byte of the newest step, shared out among the ranks. A damaged step is logged as
        a warning, noted in `rejected`, and the next older step is tried.

        Raises:
            CorruptCheckpoint: There are steps, and all are damaged. A fresh start is a decision for
                people.
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
                f"every step in {self.root} is damaged ({reasons}); repair a step, or start afresh in another directory"
            )
        return None

    def save(
        self, step: int, state: dict[str, Any], values: Mapping[str, Any] = {}, about: About | None = None
    ) -> Path | str:
        """Commit a step, then delete old steps. On return the step survives a power cut.

        Args:
            step: The number of the step, above every committed step.
            state: Nested dicts and lists of tensors, DTensors and plain values (None, bool, int of
                64 bits, float, str, bytes, and lists, tuples and dicts of plain values). A plain
                tensor or plain value is equal on every rank.
            values: Plain values of this rank by key, such as `rng/rank00001`. The step holds the
                values of all ranks.
            about: Facts about the run for the manifest, from rank 0.

        Raises:
            CheckpointError: Nothing was committed, older steps are unchanged, and the step can be
                saved again. Or the step was committed, but older steps could not be deleted; the
                message tells which.
            LostRank: Another rank has ended meanwhile. The step is complete or absent.
        """
        self.wait()
        self._commit(step, *self._divided(step, state, values), about)
        return self._backend.path(step)

    def save_later(
        self, step: int, state: dict[str, Any], values: Mapping[str, Any] = {}, about: About | None = None
    ) -> None:
        """Copy this rank's part of a step to host memory and return; a thread then saves the copy.

        Only a single save is under way at a time: the next save, like every collective method,
        waits for the end. The first collective method afterwards raises the error of the save, if
        any; `failed` tells of an error beforehand.
        """
        self.wait()
        writer, share = self._divided(step, state, values)
        self._ranks.agree(_saving(step), lambda: writer.stage(share, self._staging))
        self._saving = self._thread.submit(self._commit, step, writer, share, about)

    @property
    def failed(self) -> bool:
        """True if the save under way has ended in an error not yet raised.

        Ranks may differ for a moment.
        """
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait for the save under way, if any, and raise a failure once."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Fill the tensors of `state` in place and replace the plain values.

        The sharding may differ from the saved sharding. Verifies the files of the step first,
        unless `latest` of this store just has. Tuples come back as tuples where `state` has a
        tuple.

        Raises:
            CorruptCheckpoint: A file differs from the committed file; `state` is unchanged. Or a
                file changed during the load; the tensors of `state` are worthless.
            CheckpointError: Keys, shapes or types of `state` differ from the step. `state` is
                unchanged.
        """
        self.wait()
        task, ranks = f"loading step {step}", self._ranks
        manifest, local = ranks.agree(task, lambda: self._verify(step, ranks))
        markers = ranks.lead(task, local.markers, _merged)
        flat = ranks.agree(task, lambda: flatten(state))
        ranks.lead(task, misfit(flat, manifest), lambda misfits: require_fit(step, misfits))
        plain = ranks.agree(task, lambda: self._read(step, manifest, {key: manifest.plain[key] for key in flat.plain}))
        step_files = self._backend.step_files(step, manifest)
        try:
            ranks.agree(task, lambda: read_tensors(step_files, manifest, markers, flat.tensors))
        except CheckpointError:
            self._verified.pop(step, None)
            raise
        for key, leaf in flat.plain.items():
            leaf.container[leaf.key] = restore_tuples(plain[key], leaf.value)

    def prune(self) -> list[int]:
        """Delete old steps as after a save, and return the deleted steps.

        Finds the newest undamaged step first, as `latest` does; the newest undamaged step and all
        later steps stay.
        """
        self.claim()
        good = self.latest()
        return [] if good is None else self._ranks.lead("pruning", None, lambda _: self._retain(good))

    def verify(self, step: int) -> Manifest:
        """Read every byte of a step and return the manifest. Local.

        Raises:
            CorruptCheckpoint: A file differs from the committed file.
        """
        return self._verify(step, Ranks(0, 1, None), anew=True)[0]

    def saved(self, step: int) -> datetime:
        """Return the local time at which a step was committed. Local."""
        return self._backend.saved(step)

    def manifest(self, step: int) -> Manifest:
        """Return the manifest of a step without reading further files. Local."""
        return self._backend.manifest(step)

    def export(
        self,
        step: int,
        out: Path | str,
        *,
        merged: bool = False,
        base: Path | None = None,
        file_bytes: int = MODEL_FILE_BYTES,
    ) -> None:
        """Verify a step and write a model directory by the recipe among the values. Local.

        `merged` adds the adapters of the step to the weights of the model in `base`, by default the
        directory that the run used.

        Raises:
            CheckpointError: The step has no recipe, `out` exists, or `base` is another model than
                the run's.
        """
        manifest, verified = self._verify(step, Ranks(0, 1, None), anew=True)
        if RECIPE not in manifest.values:
            raise CheckpointError(
                f"step {step} in {self.root} was saved without a recipe for an export; give save() the value {RECIPE!r}"
            )
        recipe = parse_recipe(self.values(step, RECIPE)[RECIPE])
        step_files, markers = self._backend.step_files(step, manifest), verified.markers
        if merged:
            export_with_base(step_files, manifest, markers, recipe, Path(out), base, file_bytes)
        else:
            export(step_files, manifest, markers, recipe, Path(out), file_bytes)

    def best(self) -> int | None:
        """Return the step of the lowest validation loss, of equal the older, or None. Local.

        Steps with a damaged manifest do not count.
        """
        losses = [(loss, step) for step in self.steps() if (loss := self._loss(step)) is not None]
        return min(losses)[1] if losses else None

    def values(self, step: int, prefix: str = "") -> dict[str, Any]:
        """Return the values of all ranks whose keys begin with `prefix`, by key. Local.

        Verifies the files with these values only.
        """
        manifest = self.manifest(step)
        spans = {key: span for key, span in manifest.values.items() if key.startswith(prefix)}
        return self._read(step, manifest, spans)

    def _divided(self, step: int, state: dict[str, Any], values: Mapping[str, Any]) -> tuple[StepWriter, Share]:
        """Return the writer of this rank, and the part of the step that the rank writes."""
        task, ranks = _saving(step), self._ranks
        writer = ranks.agree(task, lambda: _writer(step, state, values))
        return writer, ranks.divide(task, ranks.agree(task, writer.offer), writer.divide)

    def _commit(self, step: int, writer: StepWriter, share: Share, about: About | None) -> None:
        task, ranks = _saving(step), self._ranks
        self._losses.pop(step, None)  # A damaged step of this number may have had a loss.
        token = ranks.lead(task, step, self._begin)
        self.rejected = {}
        attempt = self._backend.attempt(step, token)
        try:
            part = ranks.agree(task, lambda: writer.write(attempt, share))
            ranks.lead(task, part, lambda parts: self._backend.commit(step, token, parts, about or About()))
        except LostRank:
            raise  # Another rank may have seen the commit. The next run deletes leftovers.
        except CheckpointError:
            if ranks.rank == 0:
                self._backend.abandon(step, token)
            raise
        ranks.lead(f"deleting steps after step {step}", None, lambda _: self._retain(step))

    def _judge(self, ranks: Ranks, step: int) -> str | None:
        """Return the damage of a step as seen by the lowest rank to see damage, or None."""
        task = f"verifying step {step}"
        self._verified.pop(step, None)
        local = ranks.agree(task, lambda: self._verified_or_damage(step, ranks))
        damage = local if isinstance(local, str) else None
        reason = ranks.lead(task, damage, lambda reasons: next((r for r in reasons if r is not None), None))
        if reason is None:
            assert isinstance(local, _Verified)
            self._verified[step] = _Verified(local.token, ranks.lead(task, local.markers, _merged))
        return reason

    def _verified_or_damage(self, step: int, ranks: Ranks) -> _Verified | str:
        try:
            return self._verify(step, ranks)[1]
        except CorruptCheckpoint as error:
            return str(error)

    def _verify(self, step: int, ranks: Ranks, *, anew: bool = False) -> tuple[Manifest, _Verified]:
        """Verify the files in this rank's share of a step; return the manifest and the markers.

        A step just found undamaged by `latest` is not read again, except if `anew`.
        """
        manifest = self.manifest(step)
        before = self._verified.get(step)
        if before is not None and before.token == manifest.token and not anew:
            return manifest, before
        largest_first = sorted(manifest.files, key=lambda name: -manifest.files[name].size)
        share = largest_first[ranks.rank :: ranks.size]
        return manifest, _Verified(manifest.token, verify(self._backend.step_files(step, manifest), manifest, share))

    def _read(self, step: int, manifest: Manifest, spans: Mapping[str, Span]) -> dict[str, Any]:
        return read_step_values(self._backend.step_files(step, manifest), manifest, spans)

    def _retain(self, good: int) -> list[int]:
        """Delete old steps, with `good` as an undamaged step; return the deleted steps."""
        surplus = self._retention.surplus(self.steps(), good, self._loss)
        self._backend.delete(surplus)
        return surplus

    def _loss(self, step: int) -> float | None:
        """Return the validation loss of a step. The manifest is read at the first call."""
        if step not in self._losses:
            try:
                self._losses[step] = self.manifest(step).about.validation_loss
            except CorruptCheckpoint:
                return None
        return self._losses[step]

    def _begin(self, steps: list[int]) -> str:
        if len(set(steps)) > 1:
            raise CheckpointError(f"the ranks save different steps, {steps}; all ranks must save the same step")
        return self._backend.begin(steps[0], self.rejected)


def _merged(markers: list[dict[str, Marker]]) -> dict[str, Marker]:
    return {name: marker for part in markers for name, marker in part.items()}


def _saving(step: int) -> str:
    return f"saving step {step}"


def _writer(step: int, state: dict[str, Any], values: Mapping[str, Any]) -> StepWriter:
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"the step is {step!r}; give an int from 0 to 2**63 - 1")
    flat = flatten(state)
    blobs: dict[BlobKey, bytes] = {("plain", key): encode_value(key, leaf.value) for key, leaf in flat.plain.items()}
    for key, value in values.items():
        if type(key) is not str:
            raise TypeError(f"a key of the values is {key!r}; keys are str")
        blobs["values", key] = encode_value(key, value)
    return StepWriter(flat.tensors, blobs)
