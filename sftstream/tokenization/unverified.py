"""Rows without turns -> Example. What is trained is as the row says, and is not proved."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from sftstream.formats.unverified import Unverified
from sftstream.records import Example, Refused
from sftstream.tokenization.tokenizer import Tokenizer

NOTE = "unverified"
"""Name of the count of such rows in a state."""


def encode_unverified(row: Unverified, tokenizer: Tokenizer) -> Example:
    """Return the example of a row.

    A text gets the tokenizer's first token and an end token, unless it has them. Raises Refused if
    a token id is not in the vocabulary, or if nothing is trained.
    """
    hf = _loaded(tokenizer)
    ids = row.ids if row.text is None else _ids(row.text, hf)
    trained = row.trained if row.text is None else [True] * len(ids)
    if wrong := [token for token in ids if not 0 <= token < len(hf)]:
        raise Refused("bad tokens", f"token id {wrong[0]} is not in the vocabulary of {len(hf):,} tokens")
    mask = np.array(trained, bool)
    targets = int(mask[1:].sum())
    if not targets:
        raise Refused("nothing to train", "no token is trained that has a token before it")
    return Example(np.array(ids, np.int32), mask, targets, {NOTE: 1})


@lru_cache(maxsize=8)
def _loaded(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer of transformers, whose first tokens and end token a text gets."""
    return tokenizer.hf


def _ids(text: str, hf: Any) -> list[int]:
    ids: list[int] = hf(text, verbose=False)["input_ids"]
    if hf.bos_token_id is not None and ids[:2] == [hf.bos_token_id] * 2:
        ids = ids[1:]  # the text begins with the token that the tokenizer adds
    if hf.eos_token_id is not None and ids[-1:] != [hf.eos_token_id]:
        ids = [*ids, hf.eos_token_id]
    return ids
