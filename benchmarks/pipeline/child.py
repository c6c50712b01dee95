"""Run a request in a separate single-threaded process, and read memory figures.

python child.py MODULE CPUS < request
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec
from environment import ONE_THREAD, QUIET

from sftstream.cli.speed import private_memory

X = TypeVar("X")


class Failed(RuntimeError):
    """A process ended with an error; the message is its traceback."""


def ask(module: str, request: msgspec.Struct, answer: type[X], cache: str, *, cpus: int | None, here: bool) -> X:
    """Return the answer of the module's `respond` to a request, with caches under the directory
    `cache`.

    Runs in a new process on `cpus` CPUs (None: all), or in this process if `here`, as a quick
    trial. Raises Failed if the process ends with an error.
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
    """Return the encoded answer of the module's `respond`."""
    return msgspec.json.encode(importlib.import_module(module).respond(request))


def high_water() -> int:
    """Return the peak resident bytes of this process (VmHWM), shared libraries included."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) << 10 for words in lines if words[0] == "VmHWM:")


def workers_private() -> int:
    """Return the private bytes of all child processes."""
    return sum(private_memory(child.pid) for child in multiprocessing.active_children() if child.pid)


def main() -> None:
    """Answer the request on stdin in a separate line, since libraries print to stdout too."""
    module, cpus = sys.argv[1:]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-int(cpus) :])
    print("\n" + respond(module, sys.stdin.buffer.read()).decode(), flush=True)


if __name__ == "__main__":
    main()
