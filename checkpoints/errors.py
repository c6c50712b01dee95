"""What goes wrong with a checkpoint. Messages name the place, the reason and what to do where that is not plain."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read or agreed on. Raised on every rank alike."""


class CorruptCheckpoint(CheckpointError):
    """The files of a step are not the files that were committed."""


class LostRank(CheckpointError):
    """A process of the run has ended or does not answer, so that nothing can be agreed on any more."""
