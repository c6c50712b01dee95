"""The process of a command: its output, its errors, the command line that repeats it, its end.

Imports no torch, so that the help of a command is fast.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Never

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit code after a Ctrl-C that ended a command before its end, as shells report it."""


def prepare_output(*, debug: bool) -> None:
    """Set up logging, UTF-8 on stdout and stderr in any locale, and the stacks of a crash.

    A crash in native code, such as a kernel or a collective, prints the Python stack of each
    thread. `debug` shows the tracebacks behind errors; `LOGLEVEL=DEBUG`, torchrun's own variable,
    shows every library's messages as well.
    """
    # sys.stderr may be a stream without a descriptor; a handler that is there has its own place.
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    level = os.environ.get("LOGLEVEL", "WARNING")
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if debug:
        logger.setLevel(logging.DEBUG)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def print_error(error: BaseException, subject: str) -> int:
    """Print an error in one line, once for all ranks, and return the exit code 1.

    The message of a ValueError, OSError or CheckpointError is written for the user. Any other error
    comes from a library: its line names `subject`, such as the config. Rank 0 prints at once and
    exits; torchrun then ends the other ranks during their pause of 3 s.
    """
    from checkpoints import CheckpointError, one_line, printable

    if not is_first():
        time.sleep(3)
    line = one_line(error)
    if not isinstance(error, ValueError | OSError | CheckpointError):
        line = f"{printable(subject)}: {type(error).__name__}: {line}; --debug or LOGLEVEL=DEBUG shows the traceback"
    print(f"error: {line}", file=sys.stderr)  # noqa: T201
    logger.debug("traceback of the error", exc_info=error)
    return 1


def print_interrupt(command: str) -> int:
    """Print, on rank 0, the command that goes on after a Ctrl-C, and return `INTERRUPTED`."""
    if is_first():
        print(f"\ninterrupted; go on with: {command}", file=sys.stderr)  # noqa: T201
    return INTERRUPTED


def is_first() -> bool:
    """Return True in rank 0 of torchrun's processes, and in a process of its own."""
    return os.environ.get("RANK", "0") == "0"


def is_script() -> bool:
    """Return True if the process was started by a console script, such as `sftstream-train`."""
    return Path(sys.argv[0]).name.startswith("sftstream-")


def program(module: str) -> str:
    """Return the name of this program: that of its console script, or `python -m MODULE`."""
    return Path(sys.argv[0]).name if is_script() else f"python -m {module}"


def command_line(module: str, words: Sequence[str]) -> str:
    """Return the command line that starts this process again, with torchrun's number of processes.

    Options of torchrun that name other nodes are shown as "...".
    """
    started = program(module)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = os.environ.get("LOCAL_WORLD_SIZE", "1")
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        several = "" if nodes == "1" else f" --nnodes {nodes} ..."
        started = f"torchrun{several}{'' if local == '1' else f' --nproc-per-node {local}'} -m {module}"
    return f"{started} {shlex.join(words)}".rstrip()


def exit_process(code: int) -> Never:
    """End the process with an exit code, without the interpreter's shutdown.

    gloo's threads outlive their process group. A thread that releases a Python object during the
    shutdown aborts the process: about 1 in 15 finished runs would be reported as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
