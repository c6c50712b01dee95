"""Errors of a checkpoint. A message names the file or rank, the reason, and a remedy."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or agreed on. Raised on every rank alike."""


class CorruptCheckpoint(CheckpointError):
    """The files of a step differ from the committed files."""


class LostRank(CheckpointError):
    """A process of the run has ended or does not answer; the ranks cannot agree any more."""


def printable(text: str) -> str:
    """Return `text` with control characters escaped, for a terminal; newlines and tabs stay.

    Example: `printable("a\x1b[2J")` returns `"a\\x1b[2J"`, which clears no screen.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return the message of an error as a single printable line; without a message, its type."""
    return " ".join(printable(str(error)).split()) or type(error).__name__
