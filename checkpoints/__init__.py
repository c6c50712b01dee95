"""Crash-safe directories of tensors and plain values. Knows neither models nor data."""

from checkpoints.errors import CheckpointError, CorruptCheckpoint, LostRank
from checkpoints.store import CheckpointStore

__all__ = ["CheckpointError", "CheckpointStore", "CorruptCheckpoint", "LostRank"]
