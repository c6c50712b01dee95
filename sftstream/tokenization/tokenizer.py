"""Text and spans -> Example: compute token ids and the loss mask.

Example with a byte-level tokenizer: the text "<user>hi</s><assistant>seven</s>" with the span
[23, 32) has the tokens "<user>", "hi", "</s>", "<assistant>", "se", "ven", "</s>". The tokens end
at the bytes 6, 8, 12, 23, 25, 28 and 32, so the last three tokens are trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers.normalizers import NFC

from sftstream.door import Door
from sftstream.excerpt import excerpt
from sftstream.records import NO_NOTES, Example, Refused, Rendered
from sftstream.tokenization import fast_tokenizer
from sftstream.tokenization.alignment import ByteBounds, align_batch, align_by_offsets, span_byte_bounds
from sftstream.tokenization.fast_tokenizer import FastTokenizer, Ids
from sftstream.tokenization.saved_tokenizer import SavedTokenizer
from sftstream.tokenization.vocabulary import load, open_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Backend = Literal["auto", "huggingface", "fastokens"]
"""Library that computes token ids, as described in `Tokenizer`."""

_ENCODING = Door("the text cannot be tokenized", error=lambda line: Refused("tokenizer raises", line))


class Tokenizer:
    """Tokenizes rendered conversations with a Hugging Face fast tokenizer.

    `source` is a directory, a hub name, or a tokenizer of transformers. `backend` is the library
    that computes the ids:

        "huggingface"  the library `tokenizers`
        "fastokens"    faster; used after its ids equal those of `tokenizers` on many test texts
        "auto"         "fastokens" if it is installed and the tokenizer is byte-level, otherwise
                       "huggingface"

    Raises ValueError if the tokenizer cannot be loaded or is not a fast tokenizer.
    """

    def __init__(self, source: str | PathLike[str] | PreTrainedTokenizerBase, backend: Backend = "auto") -> None:
        self._source = source
        self.vocabulary, self._backend, self._hf, self._files = open_vocabulary(source)
        self._lengths = self.vocabulary.byte_lengths
        self.fast_tokenizer = self._open_fast(backend)

    @property
    def name(self) -> str:
        """Directory or hub name of the tokenizer, for error messages."""
        return str(self._source if isinstance(self._source, str | PathLike) else self._source.name_or_path)

    @cached_property
    def hf(self) -> Any:
        """The tokenizer of transformers, loaded at first use."""
        return load(self.name) if self._hf is None else self._hf

    def saved(self, template: str) -> SavedTokenizer:
        """Return the tokenizer as transformers saves it, with `template` as the only chat template.

        The result is kept in the cache: making it needs the tokenizer of transformers, which a
        start from the cache does not load.
        """
        kept = self._files.read(SavedTokenizer, template) if self._files else None
        saved = kept or SavedTokenizer.of(self.hf, template)
        if self._files and not kept:
            self._files.keep(saved, template)
        return saved

    @property
    def fast(self) -> str | None:
        """Name and version of the library that may replace `tokenizers`; None if there is none."""
        return fast_tokenizer.version() if self.fast_tokenizer else None

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Pattern that matches the text of any special token."""
        return re.compile("|".join(map(re.escape, self.vocabulary.special)) or r"(?!)")

    def __len__(self) -> int:
        """Return the number of token ids: the largest id plus 1, added tokens included."""
        return self.vocabulary.ids

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, computed by `tokenizers`.

        Texts of special tokens become special tokens.
        """
        result: list[int] = self._encoding(text).ids
        return result

    def ranges(self, text: Rendered) -> list[tuple[int, int]]:
        """Return the characters `[start, end)` of each token of a text.

        A character of several tokens is in the range of each of them.
        """
        pieces = _pieces(text) if text.typed else [(0, len(text.text), False)]
        return [
            (start + first, start + last)
            for start, end, typed in pieces
            for first, last in self._encoding(text.text[start:end], typed=typed).offsets
        ]

    def token_text(self, token: int) -> str:
        """Return the text of a token in the vocabulary, such as "Ġhello" or "<|eot_id|>"."""
        return self._backend.id_to_token(token) or ""

    def encode(self, text: Rendered, stops: Sequence[str] = ()) -> Example:
        """Return the tokens and the loss mask of a text; raises `Refused`."""
        (example,) = self.encode_all([text], stops)
        if isinstance(example, Refused):
            raise example
        return example

    def encode_all(self, texts: Sequence[Rendered], stops: Sequence[str] = ()) -> list[Example | Refused]:
        """Return the example, or the refusal, of each text.

        `stops` are texts that end a turn, besides the special tokens. A token that holds the end of
        a turn and text after the turn would stay untrained, so such a text is refused.
        """
        try:
            with _ENCODING:
                if self._lengths is None:
                    examples = [self._by_offsets(text, stops) for text in texts]
                else:
                    examples = self._by_lengths(texts, self._lengths, stops)
                if not self._conditional:
                    return examples
                return [self._misread(*pair) or pair[1] for pair in zip(texts, examples, strict=True)]
        except UnicodeEncodeError as error:
            if len(texts) == 1:
                return [_surrogate_refusal(texts[0].text, error)]
        except Refused as refused:
            if len(texts) == 1:
                return [refused]
        return [self.encode_all([text], stops)[0] for text in texts]

    def _by_lengths(
        self, texts: Sequence[Rendered], lengths: NDArray[np.integer[Any]], stops: Sequence[str]
    ) -> list[Example | Refused]:
        squeezed = [self._squeezed(text) for text in texts] if self._absorbing else texts
        byte_bounds = self._byte_bounds(squeezed)
        tokens, offsets = self._ids_of_all(texts)
        inside, *counts = align_batch(lengths.take(tokens), offsets, byte_bounds)
        examples: list[Example | Refused] = [
            Example(tokens[start:end], inside[start:end], trained - begins, _notes(straddling))
            if trained and size == text_size
            else _refusal(size, text_size)
            for (start, end), (_, text_size), size, begins, trained, straddling in zip(
                pairwise(offsets.tolist()), byte_bounds, *counts, strict=True
            )
        ]
        for index, example in enumerate(examples):
            if isinstance(example, Example) and example.notes:
                ends = set(lengths.take(example.tokens).cumsum(dtype=np.int64).tolist())
                bounds = zip(squeezed[index].bounds, byte_bounds[index][0], strict=True)
                cut = [bound for bound, in_bytes in bounds if in_bytes not in ends]
                if stop := self._stop_ending_at(squeezed[index], cut, stops):
                    examples[index] = _cut_stop(stop)
        return examples

    def _byte_bounds(self, texts: Sequence[Rendered]) -> list[ByteBounds]:
        normalize = self._normalize
        return [
            (text.bounds, len(text.text))
            if normalize is None and text.text.isascii()
            else span_byte_bounds(text, normalize or str)
            for text in texts
        ]

    def _by_offsets(self, text: Rendered, stops: Sequence[str]) -> Example | Refused:
        if text.typed:
            return Refused(
                "special token typed",
                "a tokenizer that is not byte-level cannot encode a special token's text as words; remove the text from "
                "the message",
            )
        try:
            text.text.encode()
        except UnicodeEncodeError as error:
            return _surrogate_refusal(text.text, error)
        encoding = self._encoding(text.text)
        tokens = self._without_absorbed(text.text, encoding) if self._absorbing else encoding.offsets
        inside, trained, straddling = align_by_offsets(tokens, text.spans)
        if straddling:
            cut = [end for end in text.bounds if any(start < end < stop for start, stop in tokens)]
            if found := self._stop_ending_at(text, cut, stops):
                return _cut_stop(found)
        targets = trained - int(inside[:1].sum())
        return Example(np.array(encoding.ids, np.int32), inside, targets, _notes(straddling)) if trained else _refusal()

    def _ids_of_all(self, texts: Sequence[Rendered]) -> Ids:
        """Return the ids of all texts; special tokens typed in messages are encoded as words."""
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
        return (self._words_backend if typed else self._backend).encode(text, add_special_tokens=False)

    @cached_property
    def _words_backend(self) -> Any:
        """A copy of the backend that encodes the texts of special tokens as words."""
        backend = self._backend.from_str(self.vocabulary.description)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _absorbing(self) -> frozenset[int]:
        """Ids of added tokens that absorb white space beside their text.

        Phi-3's `<|end|>` has `rstrip = true`: in "hi<|end|>\\n<|user|>", the line end belongs to
        the token `<|end|>`.
        """
        added = self._backend.get_added_tokens_decoder().items()
        return frozenset(index for index, token in added if token.lstrip or token.rstrip)

    @cached_property
    def _conditional(self) -> Mapping[str, int]:
        """Special tokens, text -> id, whose text is the token only under a condition.

        With `single_word`, the tokenizer reads `<|end|>` beside a word as words. With `normalized`
        and a normalizer, the token is searched in the normalized text, so `</s>` may be words (a
        prefix was added to the token), and another text may be the token (`<|END|>`, lowered).
        """
        added = self._backend.get_added_tokens_decoder().items()
        normalizes = self._backend.normalizer is not None
        return {
            token.content: index
            for index, token in added
            if token.special and (token.single_word or (token.normalized and normalizes))
        }

    def _misread(self, text: Rendered, example: Example | Refused) -> Refused | None:
        """Return the refusal of a text in which a special token of `_conditional` is misread.

        Each span that ends with the token's text must train the token, and no other text may be
        read as the token. Return None if all tokens are read as they are written.
        """
        if isinstance(example, Refused):
            return None
        for token, index in self._conditional.items():
            ends = sum(text.text.endswith(token, start, end) for start, end in text.spans)
            if int((example.tokens[example.loss_mask] == index).sum()) < ends:
                return Refused(
                    "stop token read as words",
                    f"{token!r} has single_word = true or normalized = true, so the tokenizer does not read it as a token "
                    "after every text; set both to false in the tokenizer",
                )
            if int((example.tokens == index).sum()) > text.text.count(token):
                return Refused(
                    "special token typed",
                    f"the tokenizer reads another text as {token!r}, since the token has normalized = true; set it to false "
                    "in the tokenizer, or remove the text from the message",
                )
        return None

    @cached_property
    def _added(self) -> re.Pattern[str]:
        """Pattern of all added tokens, each with the white space that the token absorbs."""
        added = sorted(self._backend.get_added_tokens_decoder().values(), key=lambda token: -len(token.content))
        return re.compile(
            "|".join(
                (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
                for token in added
            )
        )

    def _squeezed(self, text: Rendered) -> Rendered:
        """Return the text without the white space that added tokens absorb, with adapted bounds.

        The byte length of a token does not count absorbed white space. If `<|end|>` absorbs a line
        end, the text "hi<|end|>\\n<|user|>yo<|end|>" with the span [18, 27) becomes
        "hi<|end|><|user|>yo<|end|>" with the span [17, 26).
        """
        gaps = [
            gap
            for start, end, typed in _pieces(text)
            if not typed
            for match in self._added.finditer(text.text, start, end)
            for gap in _absorbed(match)
        ]
        if not gaps:
            return text
        kept = [0, *chain.from_iterable(gaps), len(text.text)]
        pieces = [text.text[start:end] for start, end in zip(kept[::2], kept[1::2], strict=True)]
        bounds = tuple(bound - sum(max(0, min(bound, end) - start) for start, end in gaps) for bound in text.bounds)
        return Rendered("".join(pieces), bounds)

    def _without_absorbed(self, text: str, encoding: Any) -> list[tuple[int, int]]:
        """Return the range of characters of each token, without absorbed white space."""
        return [
            (end - len(held.lstrip()), start + len(held.rstrip()))
            if token in self._absorbing and (held := text[start:end]).strip()
            else (start, end)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _stop_ending_at(self, text: Rendered, offsets: Collection[int], stops: Sequence[str]) -> str | None:
        """Return a special token, or one of `stops`, with which a span ends at one of the offsets.

        Return None if there is none.
        """
        for start, end in text.spans:
            if end in offsets:
                special = (match[0] for match in self.control.finditer(text.text, start, end) if match.end() == end)
                plain = (stop for stop in stops if text.text.endswith(stop, start, end))
                if found := next(chain(special, plain), None):
                    return found
        return None

    @cached_property
    def _normalize(self) -> Callable[[str], str] | None:
        """The tokenizer's normalization of a text; None if the tokenizer does not normalize."""
        normalizer: Any = self._backend.normalizer
        if normalizer is None:
            return None
        if isinstance(normalizer, NFC):
            return lambda text: text if text.isascii() else str(normalizer.normalize_str(text))
        return lambda text: str(normalizer.normalize_str(text))

    def _open_fast(self, backend: Backend) -> FastTokenizer | None:
        version = fast_tokenizer.version()
        if backend == "fastokens" and version is None:
            raise ValueError(
                "tokenizer backend 'fastokens' is not installed; run `pip install fastokens`, or set backend = \"auto\""
            )
        if backend == "fastokens" and self._lengths is None:
            raise ValueError(
                f"tokenizer backend 'fastokens' needs a byte-level tokenizer, and {self.name!r} is not byte-level; "
                'set backend = "auto"'
            )
        if backend == "huggingface" or version is None or self._lengths is None:
            return None
        return FastTokenizer(
            self.vocabulary.description,
            self.ids,
            lambda: fast_tokenizer.probes(self.vocabulary.special),
            required=backend == "fastokens",
        )


def _pieces(rendered: Rendered) -> list[tuple[int, int, bool]]:
    """Cut a text around special tokens typed in messages; return pieces `(start, end, typed)`.

    A text of 30 characters with `typed = [(10, 20)]` gives
    `[(0, 10, False), (10, 20, True), (20, 30, False)]`. The cuts do not change the ids of the other
    pieces, because a tokenizer splits every text at special tokens first.
    """
    pieces, at = [], 0
    for start, end in sorted(rendered.typed):
        pieces += [(at, start, False), (start, end, True)]
        at = end
    pieces.append((at, len(rendered.text), False))
    return [(start, end, typed) for start, end, typed in pieces if start < end]


def _absorbed(match: re.Match[str]) -> list[tuple[int, int]]:
    """Return the ranges of white space at the beginning and at the end of a match."""
    held = match[0]
    left, right = len(held) - len(held.lstrip()), len(held) - len(held.rstrip())
    ranges = [(match.start(), match.start() + left), (match.end() - right, match.end())]
    return [(start, end) for start, end in ranges if start < end]


def _cut_stop(stop: str) -> Refused:
    return Refused(
        "stop token cut",
        f"a token holds the end of {excerpt(stop)} and text after the turn, so it cannot be trained; use a tokenizer "
        f"with the special token {stop!r}",
    )


def _notes(straddling: int) -> Mapping[str, int]:
    return {"tokens across a span's border": straddling} if straddling else NO_NOTES


def _refusal(size: int = 0, text_size: int = 0) -> Refused:
    if size != text_size:
        return Refused("tokens do not tile the text", f"the tokens hold {size} bytes of the text's {text_size}")
    return Refused("nothing to train", "no token lies wholly inside a span that the policy trains")


def _surrogate_refusal(text: str, error: UnicodeEncodeError) -> Refused:
    return Refused("not text", f"character {text.index(error.object[error.start])} is half of a surrogate pair")
