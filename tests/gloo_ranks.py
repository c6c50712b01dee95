"""Run a function on several ranks, each a process, joined by gloo through a file instead of a
port."""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The fork server imports the modules of all ranks once. A rank then starts in about 50 ms, without
# a copy of this process's threads. A process has one server: a second preload list would replace
# the first.
MODELS = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "mistral", "qwen2", "qwen3")]
OPTIMIZERS = ["torchao.optim.adam"] if importlib.util.find_spec("torchao") else []
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "trainer.main",
        # With a GPU, these open the device at import, and no child of the server could use the
        # device.
        *([] if torch.cuda.is_available() else [*MODELS, *OPTIMIZERS]),
    ]
)


def run_ranks(size: int, work: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `work(rank, *args)` on `size` ranks and return the results by rank.

    Fails if a rank raises or does not answer within `timeout` s.
    """
    with tempfile.TemporaryDirectory() as meeting:
        started = [_start(rank, size, meeting, work, args) for rank in range(size)]
        try:
            results = [_receive(process, pipe, rank, timeout) for rank, (process, pipe) in enumerate(started)]
        finally:
            for process, _ in started:
                process.kill()
                process.join()
    errors = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(results) if error]
    assert not errors, "\n".join(errors)
    return [result for _, result in results]


def join(rank: int, size: int, meeting: str) -> None:
    """Make this process rank `rank` of `size`; `meeting` is a directory shared by all ranks."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = f"file://{Path(meeting) / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)


def _start(
    rank: int, size: int, meeting: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Any, Connection]:
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_run, args=(rank, size, meeting, theirs, work, args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(rank: int, size: int, meeting: str, pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    faulthandler.enable()
    try:
        join(rank, size, meeting)
        pipe.send((None, work(rank, *args)))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        raise
    signal.pause()  # until killed: a rank that exits early breaks the last collective of slower ranks


def _receive(process: Any, pipe: Connection, rank: int, timeout: float) -> tuple[str | None, Any]:
    if not pipe.poll(timeout):
        return f"no answer from rank {rank} within {timeout} s", None
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        return f"rank {rank} ended without an answer, with exit code {process.exitcode}", None
