"""Text and spans -> Example: one tokenization, and the loss mask read off the tokens' borders."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer

from sftstream.records import Example, Refused, Rendered


class Tokenizer:
    """A Hugging Face fast tokenizer.

    `path` is a directory or a hub name. Raises ValueError where there is none, or where its tokens cannot be placed in
    the text.
    """

    def __init__(self, path: str) -> None:
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {path!r} cannot be loaded: {str(error).splitlines()[0]}") from None
        if not self.hf.is_fast:
            raise ValueError(
                f"tokenizer {path!r} has no tokenizer.json, so its tokens cannot be placed in the text; convert it to a fast one"
            )
        self._backend = self.hf.backend_tokenizer
        # A tokenizer.json can carry these from other uses; both would change the text without a word.
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def special_tokens(self) -> dict[str, str]:
        """The variables of a chat template: `bos_token` and the like."""
        return {name: str(token) for name, token in self.hf.special_tokens_map.items() if isinstance(token, str)}

    @property
    def control_tokens(self) -> frozenset[str]:
        """Every string that becomes one special token."""
        return frozenset(str(token) for token in self.hf.added_tokens_decoder.values() if token.special)

    @property
    def pad_id(self) -> int:
        """What fills the untrained tail of a pack."""
        return next(i for i in (self.hf.pad_token_id, self.hf.eos_token_id, 0) if i is not None)

    def json(self) -> str:
        """All that decides the ids: how text is divided, what the template's variables say, what fills a pack."""
        return json.dumps([self._backend.to_str(), self.special_tokens, self.pad_id], sort_keys=True)

    def encode(self, rendered: Rendered) -> Example:
        """Tokens of the text, trained where they lie wholly inside a span; raises `Refused`."""
        encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        tokens = np.array(encoding.ids, np.int32)
        starts, ends, length = self._borders(rendered.text, tokens, encoding)
        mask = np.zeros(len(tokens), bool)
        for span in rendered.spans:
            start, end = length(span.start), length(span.end)
            mask |= (starts >= start) & (ends <= end)
        if not mask.any():
            raise Refused("nothing to train", "no token lies wholly inside an assistant's turn")
        return Example(tokens, mask)

    def _borders(self, text: str, tokens: NDArray[np.int32], encoding: Any) -> tuple[NDArray[Any], NDArray[Any], Any]:
        """Where each token starts and ends, and how to measure a prefix of the text in the same unit."""
        if self._byte_lengths is None:
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            return offsets[:, 0], offsets[:, 1], int
        normalize = self._backend.normalizer.normalize_str if self._backend.normalizer else str
        ends = np.cumsum(self._byte_lengths[tokens])
        total = len(normalize(text).encode())
        if len(ends) and ends[-1] != total:
            raise Refused("tokens do not tile the text", f"they hold {ends[-1]} bytes of {total}")
        # A prefix is normalized alone: spans end at special tokens, which no character combines with.
        return ends - self._byte_lengths[tokens], ends, lambda end: len(normalize(text[:end]).encode())

    @cached_property
    def _byte_lengths(self) -> NDArray[np.int64] | None:
        """Bytes of each token of a byte-level vocabulary; None for other kinds, whose offsets are exact.

        Offsets of byte-level tokens count characters, so the pieces of a split character all claim the whole of it.
        """
        if not isinstance(self._backend.decoder, ByteLevel):
            return None
        lengths = np.zeros(max(self._backend.get_vocab().values()) + 1, np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # one printable character stands for one byte
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = len(added.content.encode())
        return lengths
