"""Turn the errors of other libraries into one line that names the file.

The only place of this package, beside a command's `main`, that catches errors of any type.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from types import TracebackType

from sftstream.excerpt import one_line
from sftstream.refused import BrokenRow, Refused

_RAISE = dis.opmap["RAISE_VARARGS"]
_PACKAGE = __name__.partition(".")[0]
_PASSING = (Refused, BrokenRow, UnicodeEncodeError, StopIteration)
"""Errors with a meaning of their own; a text that is not Unicode raises UnicodeEncodeError."""
_LONGEST = 300
"""Characters of a library's message that are shown."""


class Door:
    """A context in which a library reads what may be damaged or hostile.

    Every error raised inside becomes `error("<line>: <reason>")`, by default a ValueError, such as
    "tokenizer 'models/x' cannot be loaded: KeyError: 'model'"; the cause keeps the traceback. A
    panic of a Rust library counts as an error, although its type is no Exception. ValueError and
    RuntimeError raised by this package, and errors with a meaning of their own, pass unchanged.
    A door has no state, so one object serves many calls.
    """

    def __init__(self, line: str, error: Callable[[str], Exception] = ValueError) -> None:
        self._line, self._error = line, error

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise the error of a library again, as one line."""
        if error is None or not _is_error(error) or is_ours(error):
            return
        raise self._error(f"{self._line}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the message of a library's error in one printable line, shortened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = one_line(error)
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    return f"KeyError: {line}" if isinstance(error, KeyError) else line  # its message is the key alone


def _is_error(error: BaseException) -> bool:
    panic = type(error).__name__ == "PanicException"  # pyo3 derives it from BaseException
    return panic or (isinstance(error, Exception) and not isinstance(error, _PASSING))


def is_ours(error: BaseException) -> bool:
    """Return True for a ValueError or RuntimeError with a message of this package.

    Such an error is raised by a `raise` statement, not by the call of an extension module, and its
    type is from no other package, as ArrowInvalid would be.
    """
    trace = error.__traceback__
    if not isinstance(error, ValueError | RuntimeError) or trace is None:
        return False
    if type(error).__module__.partition(".")[0] not in ("builtins", _PACKAGE):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    instruction = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return module.partition(".")[0] == _PACKAGE and instruction == _RAISE
