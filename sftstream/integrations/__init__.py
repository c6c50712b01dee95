"""Feed the packs of a run to other trainers, with exact resume on any number of processes.

`docs/integrations.md` shows each trainer. `hugging_face` has the callback of the trainers of
transformers and TRL; the other modules depend on no trainer.
"""

from sftstream.integrations.dataset import PackDataset
from sftstream.integrations.layouts import hugging_face, shifted, trained_tokens
from sftstream.integrations.shards import Shards
from sftstream.integrations.state_file import STATE_FILE, last_checkpoint, read_state_file, write_state_file

__all__ = [
    "STATE_FILE",
    "PackDataset",
    "Shards",
    "hugging_face",
    "last_checkpoint",
    "read_state_file",
    "shifted",
    "trained_tokens",
    "write_state_file",
]
