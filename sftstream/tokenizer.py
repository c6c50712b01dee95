"""Text and spans -> Example: one tokenization, and the loss mask read off the tokens' borders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, cached_property
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers.decoders import ByteLevel
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sftstream import fast_tokenizer
from sftstream.fast_tokenizer import FastTokenizer
from sftstream.records import Example, Refused, Rendered

Backend = Literal["auto", "huggingface", "fastokens"]


Pair = tuple[int, int]


class Trained(NamedTuple):
    """Tokens, the ranges of them that lie wholly inside a span, and how many lie there just in part."""

    tokens: NDArray[np.int32]
    ranges: list[Pair]
    straddling: int


class Tokenizer:
    """A Hugging Face fast tokenizer: a directory, a hub name, or one that is loaded.

    `backend` is what computes the ids: `tokenizers`, or fastokens once it has proved to give the same ones ("auto": where it is
    installed). Raises ValueError where there is no tokenizer, or where its tokens cannot be placed in the text.
    """

    def __init__(self, source: str | PathLike[str] | PreTrainedTokenizerBase, backend: Backend = "auto") -> None:
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
        self.fast_tokenizer = self._open_fast(backend)

    @property
    def fast(self) -> str | None:
        """What may compute the ids in the place of `tokenizers`, and its version."""
        return fast_tokenizer.version() if self.fast_tokenizer else None

    @property
    def variables(self) -> dict[str, str]:
        """What a chat template knows of the tokenizer: `bos_token` and the like."""
        return {name: str(token) for name, token in self.hf.special_tokens_map.items() if isinstance(token, str)}

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches every text that becomes one special token."""
        return re.compile("|".join(map(re.escape, self.special)) or r"(?!)")

    @cached_property
    def special(self) -> list[str]:
        """The texts of special tokens, longest first."""
        tokens = {str(token) for token in self.hf.added_tokens_decoder.values() if token.special}
        return sorted(tokens, key=lambda text: (-len(text), text))

    @property
    def pad_id(self) -> int:
        """What fills the untrained tail of a pack."""
        return next(i for i in (self.hf.pad_token_id, self.hf.eos_token_id, 0) if i is not None)

    @cached_property
    def _description(self) -> str:
        return str(self._backend.to_str())

    def json(self) -> str:
        """All that decides the ids: how text is divided, what the template's variables say, what fills a pack."""
        return json.dumps([self._description, self.variables, self.pad_id], sort_keys=True)

    def encode(self, rendered: Rendered) -> Example:
        """Tokens of the text, trained where they lie wholly inside a span; raises `Refused`."""
        spans = [(span.start, span.end) for span in rendered.spans]
        try:
            tokens, ranges, straddling = (
                self._by_offsets(rendered, spans) if self._byte_lengths is None else self._by_lengths(rendered, spans)
            )
        except UnicodeEncodeError as error:
            place = rendered.text.index(error.object[error.start])
            raise Refused("not text", f"character {place} is half of a surrogate pair") from None
        if not ranges:
            raise Refused("nothing to train", "no token lies wholly inside what the policy trains")
        mask = np.zeros(len(tokens), bool)
        for first, last in ranges:
            mask[first:last] = True
        return Example(tokens, mask, {"tokens across a span's border": straddling} if straddling else {})

    def _by_lengths(self, rendered: Rendered, spans: list[Pair]) -> Trained:
        assert self._byte_lengths is not None
        text = rendered.text
        total = len(text)
        if self._normalize is not None or not text.isascii():
            spans, total = _measured(text, spans, self._normalize or str)
        tokens = self._tokens(rendered)
        ends = self._byte_lengths[tokens].cumsum()
        if len(ends) and ends[-1] != total:
            raise Refused("tokens do not tile the text", f"they hold {ends[-1]} bytes of {total}")
        return Trained(tokens, *_inside_tiles(ends, spans))

    def _by_offsets(self, rendered: Rendered, spans: list[Pair]) -> Trained:
        if rendered.typed:
            raise Refused("special token typed", "this kind of tokenizer cannot take a special token's text as words")
        rendered.text.encode()  # half of a surrogate pair would not go through
        encoding = self._encoding(rendered.text)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return Trained(np.array(encoding.ids, np.int32), *_inside(offsets[:, 0], offsets[:, 1], spans))

    def _tokens(self, rendered: Rendered) -> NDArray[np.int32]:
        """Ids of the text. The text of a special token that somebody typed is tokenized as words."""
        if not rendered.typed:
            fast = self.fast_tokenizer(rendered.text) if self.fast_tokenizer else None
            return self._ids(rendered.text) if fast is None else fast
        pieces = (self._ids(rendered.text[start:end], typed=typed) for start, end, typed in _pieces(rendered))
        return np.concatenate(list(pieces))

    def _ids(self, text: str, *, typed: bool = False) -> NDArray[np.int32]:
        return np.array(self._encoding(text, typed=typed).ids, np.int32)

    def _encoding(self, text: str, *, typed: bool = False) -> Any:
        self._backend.encode_special_tokens = typed
        encoding = self._backend.encode(text, add_special_tokens=False)
        self._backend.encode_special_tokens = False
        return encoding

    @cached_property
    def _normalize(self) -> Callable[[str], str] | None:
        normalizer: Any = self._backend.normalizer
        if normalizer is None:
            return None
        if isinstance(normalizer, NFC):
            return lambda text: text if text.isascii() else str(normalizer.normalize_str(text))
        return lambda text: str(normalizer.normalize_str(text))

    def _open_fast(self, backend: Backend) -> FastTokenizer | None:
        found = fast_tokenizer.version()
        if backend == "fastokens" and (found is None or self._byte_lengths is None):
            said = "is not installed; pip install fastokens" if found is None else "is for byte-level tokenizers alone"
            raise ValueError(f"tokenizer backend 'fastokens' {said}, or leave the choice to \"auto\"")
        if backend == "huggingface" or found is None or self._byte_lengths is None:
            return None

        @cache
        def reference() -> Any:
            # Another than `_backend`, which changes its mind about special tokens from text to text while a thread compares.
            return self._backend.from_str(self._description)

        return FastTokenizer(
            self._description,
            lambda text: reference().encode(text, add_special_tokens=False).ids,
            lambda: fast_tokenizer.probes(self.special),
            required=backend == "fastokens",
        )

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


def _inside_tiles(ends: NDArray[np.int64], spans: list[Pair]) -> tuple[list[Pair], int]:
    """Of tokens that lie side by side, in one search for all borders."""
    borders = [border for span in spans for border in span]
    at = ends.searchsorted(borders)  # the tokens that they cut, or end with
    cut = (ends.take(at, mode="clip") != borders).tolist()
    at = at.tolist()
    ranges, straddling = [], 0
    for begin in range(0, len(borders), 2):
        end = begin + 1
        opens_cut = cut[begin] and borders[begin] > 0
        first, last = at[begin] + (borders[begin] > 0), at[end] + (not cut[end])
        if first < last:
            ranges.append((first, last))
        straddling += opens_cut + (cut[end] and not (opens_cut and at[begin] == at[end]))
    return ranges, straddling


def _inside(starts: NDArray[np.int64], ends: NDArray[np.int64], spans: list[Pair]) -> tuple[list[Pair], int]:
    """Of tokens with anything between them."""
    ranges, straddling = [], 0
    for begin, end in spans:
        first, last = int(starts.searchsorted(begin)), int(ends.searchsorted(end, "right"))
        if first < last:
            ranges.append((first, last))
        straddling += int(starts.searchsorted(end)) - int(ends.searchsorted(begin, "right")) - max(0, last - first)
    return ranges, straddling


def _measured(text: str, spans: list[Pair], normalize: Callable[[str], str]) -> tuple[list[Pair], int]:
    """The spans, which are in order, in bytes of the normalized text, and how many it has.

    What lies between two of their ends is normalized alone: spans begin and end at special tokens, which no character
    combines with.
    """
    at = total = 0
    result = []
    for start, end in spans:
        begin = total + len(normalize(text[at:start]).encode())
        total = begin + len(normalize(text[start:end]).encode())
        result.append((begin, total))
        at = end
    return result, total + len(normalize(text[at:]).encode())
