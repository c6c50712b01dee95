"""The public names of the package, in the modules that define them; importing it imports torch."""

from checkpoints.errors import CheckpointError, CorruptCheckpoint, LostRank, one_line, printable
from checkpoints.lock import Lock
from checkpoints.manifest import About
from checkpoints.model.base import BaseTensor, Merged, Product, Rows, merge, weight_digests
from checkpoints.model.card import ORIGIN, Origin, hub_name
from checkpoints.model.directory import MODEL_FILE_BYTES, write_model
from checkpoints.model.export import RECIPE, Recipe
from checkpoints.retention import Retention
from checkpoints.store import CheckpointStore
from checkpoints.tensor_file import TensorSpec

__all__ = [
    "MODEL_FILE_BYTES",
    "ORIGIN",
    "RECIPE",
    "About",
    "BaseTensor",
    "CheckpointError",
    "CheckpointStore",
    "CorruptCheckpoint",
    "Lock",
    "LostRank",
    "Merged",
    "Origin",
    "Product",
    "Recipe",
    "Retention",
    "Rows",
    "TensorSpec",
    "hub_name",
    "merge",
    "one_line",
    "printable",
    "weight_digests",
    "write_model",
]
