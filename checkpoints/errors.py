"""Errors of a checkpoint. A message names the file or rank, the reason, and a remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or agreed on. Raised on every rank alike."""


class CorruptCheckpoint(CheckpointError):
    """The files of a step differ from the committed files."""


class LostRank(CheckpointError):
    """A process of the run has ended or does not answer; the ranks cannot agree any more."""
