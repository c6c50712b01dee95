"""A command called in this process through the function that its console script calls."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch


class Outcome(NamedTuple):
    """Result of a command as a shell sees it."""

    exit_code: int
    stdout: str
    stderr: str


def run(main: Callable[[Sequence[str]], None], *arguments: object) -> Outcome:
    """Call `main` with arguments; a message in SystemExit goes to stderr with exit code 1.

    The terminal is wide, so that no path is folded.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = None
    with redirect_stdout(stdout), redirect_stderr(stderr), patch.dict(os.environ, COLUMNS="400"):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
    if isinstance(code, str):
        return Outcome(1, stdout.getvalue(), f"{stderr.getvalue()}{code}\n")
    return Outcome(int(code or 0), stdout.getvalue(), stderr.getvalue())
