"""Crash-safe directories of tensors and plain values. Knows neither models nor data."""

from checkpoints.errors import CheckpointError, CorruptCheckpoint, LostRank
from checkpoints.export import RECIPE, Recipe, Rows
from checkpoints.manifest import About
from checkpoints.store import CheckpointStore

__all__ = [
    "RECIPE",
    "About",
    "CheckpointError",
    "CheckpointStore",
    "CorruptCheckpoint",
    "LostRank",
    "Recipe",
    "Rows",
]
