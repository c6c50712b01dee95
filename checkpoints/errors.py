"""What goes wrong with a checkpoint. Every message names the step, the place and the reason."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or agreed on. Raised on every rank alike."""


class CorruptCheckpoint(CheckpointError):
    """The files of a step are not the files that were committed."""
