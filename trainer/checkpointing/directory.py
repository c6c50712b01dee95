"""Let a single run at a time use `runs/<name>`, and replace no files of another run.

`run.json` in the directory holds the token of the run and the configured root of its checkpoints.
Every checkpoint holds the token as well, so that a run and its directory recognize each other.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch.distributed as dist

from checkpoints import CheckpointError, Lock
from sftstream import UNDECODABLE, one_line, require_files
from trainer.checkpointing.full_disk import full_disk_explained
from trainer.config import TrainConfig
from trainer.distributed.mesh import on_first_rank
from trainer.llama.lora.files import CONFIG as ADAPTER
from trainer.whole_file import write_whole

OWNER, STOPPED = "run.json", "stopped"


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `run.json`."""

    token: str
    """32 hexadecimal characters, drawn at the first start of the run."""
    checkpoints: str | None
    """Absolute path or URL of `checkpoint.root`; None for `checkpoints` in the run's directory."""


class RunDirectory:
    """The directory of a run. Only rank 0 calls the methods that write."""

    def __init__(self, config: TrainConfig) -> None:
        self.path = config.run.directory
        self._exports = config.run.export_directory / "config.json", config.run.adapter_directory / ADAPTER
        root = config.checkpoint.place
        self._checkpoints = root if root is None or "://" in root else str(Path(root).absolute())

    def own(self, saved_token: str | None, *, resumes: bool) -> str:
        """Return the run's token, after writing it to `run.json`.

        `resumes` is True if the root of checkpoints holds a step, `saved_token` the token in that
        step (None in steps of version 0.1.0). Raises CheckpointError if the directory holds lines
        or an export of a run that does not continue here.
        """
        owner = self._owner()
        if self._occupied and not self._continues(owner, saved_token, resumes):
            raise CheckpointError(
                f"{self.path} holds metrics.jsonl or an export of a run that does not continue from these checkpoints; give "
                "this run another run.name, or move the directory away"
            )
        token = saved_token or (owner.token if owner else secrets.token_hex(16))
        now = Owner(token=token, checkpoints=self._checkpoints)
        if now != owner:
            with full_disk_explained(self.path):
                write_whole(self.path / OWNER, now)
        return token

    @property
    def stopped(self) -> dict[str, int]:
        """Starts of each agent of torchrun whose workers were asked to stop; {} without a stop."""
        try:
            return msgspec.json.decode((self.path / STOPPED).read_bytes(), type=dict[str, int])
        except (FileNotFoundError, *UNDECODABLE):  # an empty file is one of version 0.2.0
            return {}

    def mark_stopped(self) -> None:
        """Leave a file that ends workers started again by torchrun after a stop. Collective."""
        everyone = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(everyone, _agent())
        if dist.get_rank() == 0:
            (self.path / STOPPED).write_bytes(msgspec.json.encode(dict(everyone)) + b"\n")

    def forget_stop(self) -> None:
        """Delete the file of `mark_stopped`."""
        (self.path / STOPPED).unlink(missing_ok=True)

    def _continues(self, owner: Owner | None, saved_token: str | None, resumes: bool) -> bool:
        if resumes and saved_token is not None:
            return owner is not None and owner.token == saved_token
        if resumes:
            return owner is None or owner.checkpoints == self._checkpoints
        # Killed before the first checkpoint; a finished run without checkpoints has an export.
        return owner is not None and owner.checkpoints == self._checkpoints and not self._has_export

    @property
    def _occupied(self) -> bool:
        metrics = self.path / "metrics.jsonl"
        return self._has_export or (metrics.exists() and metrics.stat().st_size > 0)

    @property
    def _has_export(self) -> bool:
        return any(config.exists() for config in self._exports)

    def _owner(self) -> Owner | None:
        path = self.path / OWNER
        try:
            return msgspec.json.decode(path.read_bytes(), type=Owner)
        except FileNotFoundError:
            return None
        except UNDECODABLE as error:
            raise CheckpointError(
                f"{path} was not written by a run: {one_line(error)}; move {self.path} away"
            ) from error


@contextmanager
def locked(directory: RunDirectory) -> Iterator[RunDirectory]:
    """Hold the lock of a run's directory on rank 0. Collective.

    Raises CheckpointError on all ranks if another run holds the lock.
    """
    lock = Lock(directory.path / ".lock")

    def take() -> None:
        with full_disk_explained(directory.path):
            directory.path.mkdir(parents=True, exist_ok=True)
            lock.take()
        # Without events.jsonl, the file for the report, a run goes on.
        names = OWNER, "metrics.jsonl", "refused.jsonl"
        require_files([*(directory.path / name for name in names), *directory.path.glob("ledger/*")])

    on_first_rank(take)
    try:
        yield directory
    finally:
        lock.release()


def ends_restarted_worker(directory: RunDirectory) -> bool:
    """Return True in a worker that torchrun started again although the run was asked to stop.

    An agent that starts workers again after a failure counts them as restarts; the exit of a
    stopped run looks like a failure. An agent that starts workers again because a node joins or
    leaves stops them by SIGTERM before, and does not count: such workers go on.
    """
    agent, restarts = _agent()
    before = directory.stopped.get(agent)
    return before is not None and restarts > before


def _agent() -> tuple[str, int]:
    """Return the name of the agent of torchrun of this worker, and the restarts that it counts."""
    return f"{os.uname().nodename}:{os.getppid()}", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
