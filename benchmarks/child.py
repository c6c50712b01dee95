"""Processes of their own, one thread each, and what they hold in memory: `python child.py MODULE CPUS < request`."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from sftstream.cli.bench import private_memory

ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

X = TypeVar("X")


class Failed(RuntimeError):
    """A process ended with an error, whose traceback this is."""


def ask(module: str, request: msgspec.Struct, answer: type[X], cache: str, *, cpus: int | None, here: bool) -> X:
    """What the module's `respond` says to a request; whatever it caches goes into that directory.

    In a process of its own, on so many CPUs; or `here`, which is quicker, to see whether it works.
    """
    caches = {"SFTSTREAM_CACHE": f"{cache}/sftstream", "HF_DATASETS_CACHE": f"{cache}/datasets"}
    encoded = msgspec.json.encode(request)
    if here:
        os.environ |= caches
        return msgspec.json.decode(respond(module, encoded), type=answer)
    done = subprocess.run(
        [sys.executable, __file__, module, str(cpus or os.cpu_count())],
        input=encoded,
        capture_output=True,
        env=os.environ | ONE_THREAD | QUIET | caches,
        check=False,
    )
    if done.returncode:
        raise Failed(done.stderr.decode(errors="replace"))
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=answer)


def respond(module: str, request: bytes) -> bytes:
    """The module's answer."""
    return msgspec.json.encode(importlib.import_module(module).respond(request))


def high_water() -> int:
    """Return the peak resident memory of this process in bytes (VmHWM), shared libraries included."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) << 10 for words in lines if words[0] == "VmHWM:")


def workers_private() -> int:
    """Return the bytes of memory that each of this process's children alone holds, summed."""
    return sum(private_memory(child.pid) for child in multiprocessing.active_children() if child.pid)


def main() -> None:
    """Answer one request, in a line of its own, since libraries print too."""
    module, cpus = sys.argv[1:]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(cpus) :])
    print("\n" + respond(module, sys.stdin.buffer.read()).decode(), flush=True)


if __name__ == "__main__":
    main()
