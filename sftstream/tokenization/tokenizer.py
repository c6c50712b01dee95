"""Text and spans -> Example: one tokenization, and the loss mask read off the tokens' borders."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers.normalizers import NFC

from sftstream.records import NO_NOTES, Example, Refused, Rendered
from sftstream.tokenization import fast_tokenizer
from sftstream.tokenization.alignment import ByteBounds, align_batch, align_by_offsets, span_byte_bounds
from sftstream.tokenization.fast_tokenizer import FastTokenizer, Ids
from sftstream.tokenization.vocabulary import load, open_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Backend = Literal["auto", "huggingface", "fastokens"]


class Tokenizer:
    """A Hugging Face fast tokenizer: a directory, a hub name, or one that is loaded.

    `backend` is what computes the ids: `tokenizers`, or fastokens once it has proved to give the same ones ("auto": where it is
    installed). Raises ValueError where there is no tokenizer, or where its tokens cannot be placed in the text.
    """

    def __init__(self, source: str | PathLike[str] | PreTrainedTokenizerBase, backend: Backend = "auto") -> None:
        self._source = source
        self.vocabulary, self._backend, self._hf = open_vocabulary(source)
        self._lengths = self.vocabulary.byte_lengths
        self.fast_tokenizer = self._open_fast(backend)

    @property
    def name(self) -> str:
        """The directory or hub name, for messages."""
        return str(self._source if isinstance(self._source, str | PathLike) else self._source.name_or_path)

    @cached_property
    def hf(self) -> Any:
        """transformers' own, for exports. Where what it says was known it is loaded when it is asked for."""
        return load(self.name) if self._hf is None else self._hf

    @property
    def fast(self) -> str | None:
        """What may compute the ids in the place of `tokenizers`, and its version."""
        return fast_tokenizer.version() if self.fast_tokenizer else None

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches every text that becomes one special token."""
        return re.compile("|".join(map(re.escape, self.vocabulary.special)) or r"(?!)")

    def __len__(self) -> int:
        """Tokens, added ones included."""
        return self._backend.get_vocab_size()

    def ids(self, text: str) -> list[int]:
        """What `tokenizers` makes of a text, special tokens in it recognized."""
        result: list[int] = self._encoding(text).ids
        return result

    def encode(self, text: Rendered) -> Example:
        """Tokens of the text, trained where they lie wholly inside a span; raises `Refused`."""
        (example,) = self.encode_all([text])
        if isinstance(example, Refused):
            raise example
        return example

    def encode_all(self, texts: Sequence[Rendered]) -> list[Example | Refused]:
        """The same of several texts at once, or why not."""
        if self._lengths is None:
            return [self._by_offsets(text) for text in texts]
        try:
            return self._by_lengths(texts, self._lengths)
        except UnicodeEncodeError as error:
            if len(texts) == 1:
                return [_half_a_character(texts[0].text, error)]
            return [self.encode_all([text])[0] for text in texts]

    def _by_lengths(self, texts: Sequence[Rendered], lengths: NDArray[np.integer[Any]]) -> list[Example | Refused]:
        byte_bounds = self._byte_bounds(texts)
        tokens, borders = self._ids_of_all(texts)
        inside, *tiles = align_batch(lengths.take(tokens), borders, byte_bounds)
        return [
            Example(tokens[start:end], inside[start:end], trained - begins, _noted(straddling))
            if trained and size == whole
            else _refused(size, whole)
            for (start, end), (_, whole), size, begins, trained, straddling in zip(
                pairwise(borders.tolist()), byte_bounds, *tiles, strict=True
            )
        ]

    def _byte_bounds(self, texts: Sequence[Rendered]) -> list[ByteBounds]:
        normalize = self._normalize
        return [
            (text.bounds, len(text.text))
            if normalize is None and text.text.isascii()
            else span_byte_bounds(text, normalize or str)
            for text in texts
        ]

    def _by_offsets(self, text: Rendered) -> Example | Refused:
        if text.typed:
            return Refused("special token typed", "this kind of tokenizer cannot take a special token's text as words")
        try:
            text.text.encode()
        except UnicodeEncodeError as error:
            return _half_a_character(text.text, error)
        encoding = self._encoding(text.text)
        inside, trained, cut = align_by_offsets(encoding.offsets, text.spans)
        targets = trained - int(inside[:1].sum())
        return Example(np.array(encoding.ids, np.int32), inside, targets, _noted(cut)) if trained else _refused()

    def _ids_of_all(self, texts: Sequence[Rendered]) -> Ids:
        """Ids of the texts. The text of a special token that somebody typed is tokenized as words."""
        if self.fast_tokenizer and not any(text.typed for text in texts):
            ids = self.fast_tokenizer([text.text for text in texts])
            if ids is not None:
                return ids
        pieces = [self._by_pieces(text) for text in texts]
        offsets = np.array([0, *accumulate(map(len, pieces))], np.int64)
        return Ids(np.fromiter(chain.from_iterable(pieces), np.int32, offsets[-1]), offsets)

    def _by_pieces(self, text: Rendered) -> list[int]:
        pieces = _pieces(text) if text.typed else [(0, len(text.text), False)]
        return [
            token for start, end, typed in pieces for token in self._encoding(text.text[start:end], typed=typed).ids
        ]

    def _encoding(self, text: str, *, typed: bool = False) -> Any:
        return (self._typing if typed else self._backend).encode(text, add_special_tokens=False)

    @cached_property
    def _typing(self) -> Any:
        """For special tokens' text that was typed: words. Few conversations ask for it."""
        # Another than `_backend`, with which a thread may be comparing.
        backend = self._backend.from_str(self.vocabulary.description)
        backend.encode_special_tokens = True
        return backend

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
        if backend == "fastokens" and (found is None or self._lengths is None):
            said = "is not installed; pip install fastokens" if found is None else "is for byte-level tokenizers alone"
            raise ValueError(f"tokenizer backend 'fastokens' {said}, or leave the choice to \"auto\"")
        if backend == "huggingface" or found is None or self._lengths is None:
            return None
        return FastTokenizer(
            self.vocabulary.description,
            self.ids,
            lambda: fast_tokenizer.probes(self.vocabulary.special),
            required=backend == "fastokens",
        )


def _pieces(rendered: Rendered) -> list[tuple[int, int, bool]]:
    """Start, end, and whether it is a special token's text that was typed. Almost always one piece.

    The tokenizer splits the text at special tokens in any case, so what stands between two of them is not changed.
    """
    pieces, at = [], 0
    for start, end in sorted(rendered.typed):
        pieces += [(at, start, False), (start, end, True)]
        at = end
    pieces.append((at, len(rendered.text), False))
    return [(start, end, typed) for start, end, typed in pieces if start < end]


def _noted(straddling: int) -> Mapping[str, int]:
    return {"tokens across a span's border": straddling} if straddling else NO_NOTES


def _refused(size: int = 0, whole: int = 0) -> Refused:
    if size != whole:
        return Refused("tokens do not tile the text", f"they hold {size} bytes of {whole}")
    return Refused("nothing to train", "no token lies wholly inside what the policy trains")


def _half_a_character(text: str, error: UnicodeEncodeError) -> Refused:
    return Refused("not text", f"character {text.index(error.object[error.start])} is half of a surrogate pair")
