"""A tokenizer as transformers saves it, for the exports of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec


class SavedTokenizer(msgspec.Struct, frozen=True):
    """The files of a tokenizer, and the token ids that a model's config repeats."""

    files: dict[str, bytes]
    """Content of each file by relative path."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    @classmethod
    def of(cls, hf: Any, template: str | None = None) -> SavedTokenizer:
        """Save a tokenizer of transformers.

        `template` replaces all chat templates of the tokenizer; None keeps them.
        """
        before = hf.chat_template
        if template is not None:
            hf.chat_template = template
        try:
            with tempfile.TemporaryDirectory() as directory:
                hf.save_pretrained(directory)
                paths = [path for path in Path(directory).rglob("*") if path.is_file()]
                files = {str(path.relative_to(directory)): path.read_bytes() for path in sorted(paths)}
        finally:
            hf.chat_template = before
        return cls(files, hf.bos_token_id, hf.eos_token_id, hf.pad_token_id)
