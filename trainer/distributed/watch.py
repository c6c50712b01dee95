"""End a run whose ranks do not answer, with a line that names rank, step and the work waited for.

gloo and NCCL report a lost rank differently, after timeouts of their own, or never. A thread of
each rank watches the present work instead, so that both behave alike.

Example: rank 1 of two is stopped during step 12, with parallel.timeout = "5m". After five minutes
rank 0 prints `error: rank 0, step 12: the counts of all ranks did not arrive within 300 s; ...` and
exits with code 1.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist

from checkpoints import LostRank

_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|[Tt]imed? ?out|Socket")
"""Words of the messages of gloo and NCCL about a rank without an answer."""


class Work(NamedTuple):
    """The work of all ranks that this rank takes part in."""

    step: int
    name: str
    began: float
    """Value of time.monotonic()."""


class Watch:
    """A context that ends the process if a work takes more than `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._work: Work | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def waiting_for(self, step: int, name: str) -> Iterator[None]:
        """Watch a work of `step`, counted from 1, inside the `with` block.

        Raises LostRank if gloo or NCCL reports a lost rank.
        """
        self._work = Work(step, name, time.monotonic())
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LostRank) or not _LOST.search(str(error)):
                raise
            raise LostRank(
                f"rank {dist.get_rank()}, step {step}: {name} did not arrive, since a rank has ended or does not answer; see "
                f"the output of the other ranks, and repeat the command ({str(error).splitlines()[0]})"
            ) from error
        finally:
            self._work = None

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10)):
            work = self._work
            if work is not None and time.monotonic() - work.began > self._seconds:
                _end(work, self._seconds)


def _end(work: Work, seconds: float) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(3)  # torchrun ends all ranks once rank 0 has printed and exited
    print(  # noqa: T201
        f"error: rank {rank}, step {work.step}: {work.name} did not arrive within {seconds:.0f} s; a rank is stopped or "
        "hangs: look at ranks that print no such line, or raise parallel.timeout for slower work",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread waits inside gloo or NCCL and can be woken by nothing
