"""Text and spans -> Example: one tokenization, and the loss mask read off the tokens' borders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sftstream.records import Example, Refused, Rendered

Borders = tuple[NDArray[np.int64], NDArray[np.int64]]


class Tokenizer:
    """A Hugging Face fast tokenizer: a directory, a hub name, or one that is loaded.

    Raises ValueError where there is none, or where its tokens cannot be placed in the text.
    """

    def __init__(self, source: str | PathLike[str] | PreTrainedTokenizerBase) -> None:
        self.hf: Any = source if isinstance(source, PreTrainedTokenizerBase) else _load(str(source))
        if not self.hf.is_fast:
            raise ValueError(
                f"tokenizer {self.hf.name_or_path!r} has no tokenizer.json, so its tokens cannot be placed in the text; "
                "convert it to a fast one"
            )
        self._backend = self.hf.backend_tokenizer
        # A tokenizer.json can carry these from other uses; both would change the text without a word.
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def variables(self) -> dict[str, str]:
        """What a chat template knows of the tokenizer: `bos_token` and the like."""
        return {name: str(token) for name, token in self.hf.special_tokens_map.items() if isinstance(token, str)}

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches every text that becomes one special token."""
        tokens = {str(token) for token in self.hf.added_tokens_decoder.values() if token.special}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    @property
    def pad_id(self) -> int:
        """What fills the untrained tail of a pack."""
        return next(i for i in (self.hf.pad_token_id, self.hf.eos_token_id, 0) if i is not None)

    def json(self) -> str:
        """All that decides the ids: how text is divided, what the template's variables say, what fills a pack."""
        return json.dumps([self._backend.to_str(), self.variables, self.pad_id], sort_keys=True)

    def encode(self, rendered: Rendered) -> Example:
        """Tokens of the text, trained where they lie wholly inside a span; raises `Refused`."""
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise Refused("not text", f"character {error.start} is half of a surrogate pair") from None
        pieces = [self._encode(rendered.text[start:end], typed) for start, end, typed in _pieces(rendered)]
        tokens = np.array([token for ids, _ in pieces for token in ids], np.int32)
        (starts, ends), measure = self._borders(rendered.text, tokens, [offsets for _, offsets in pieces])
        mask, straddling = np.zeros(len(tokens), bool), 0
        for span in rendered.spans:
            begin, stop = measure(span.start), measure(span.end)
            inside = (starts >= begin) & (ends <= stop)
            straddling += int(((starts < stop) & (ends > begin) & ~inside).sum())
            mask |= inside
        if not mask.any():
            raise Refused("nothing to train", "no token lies wholly inside what the policy trains")
        return Example(tokens, mask, {"tokens across a span's border": straddling} if straddling else {})

    def _encode(self, text: str, typed: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets. The text of a special token that somebody typed is tokenized as words."""
        self._backend.encode_special_tokens = typed
        encoding = self._backend.encode(text, add_special_tokens=False)
        self._backend.encode_special_tokens = False
        return encoding.ids, encoding.offsets

    def _borders(
        self, text: str, tokens: NDArray[np.int32], offsets: list[list[tuple[int, int]]]
    ) -> tuple[Borders, Callable[[int], int]]:
        """Where each token starts and ends, and how to measure a prefix of the text in the same unit."""
        if self._byte_lengths is None:
            return _offset_borders(offsets), int
        normalize = self._backend.normalizer.normalize_str if self._backend.normalizer else str
        lengths = self._byte_lengths[tokens]
        ends = np.cumsum(lengths)
        total = len(normalize(text).encode())
        if len(ends) and ends[-1] != total:
            raise Refused("tokens do not tile the text", f"they hold {ends[-1]} bytes of {total}")
        # A prefix is normalized alone: spans begin and end at special tokens, which no character combines with.
        return (ends - lengths, ends), lambda end: len(normalize(text[:end]).encode())

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


def _load(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {path!r} cannot be loaded: {str(error).splitlines()[0]}") from None


def _pieces(rendered: Rendered) -> list[tuple[int, int, bool]]:
    """Start, end, and whether it is a special token's text that was typed. Almost always one piece.

    The tokenizer splits the text at special tokens in any case, so what stands between two of them is not changed.
    """
    pieces, at = [], 0
    for typed in sorted(rendered.typed):
        pieces += [(at, typed.start, False), (typed.start, typed.end, True)]
        at = typed.end
    pieces.append((at, len(rendered.text), False))
    return [(start, end, typed) for start, end, typed in pieces if start < end]


def _offset_borders(pieces: list[list[tuple[int, int]]]) -> Borders:
    if len(pieces) > 1:
        raise Refused("special token typed", "this kind of tokenizer cannot take a special token's text as words")
    offsets = np.array(pieces[0] if pieces else [], np.int64).reshape(-1, 2)
    return offsets[:, 0], offsets[:, 1]
