"""A tokenizer's files -> the values that a run needs (`Vocabulary`).

The values are kept in the cache. Without the cache, opening a tokenizer with transformers would be
half of the time that a run needs to start.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel, Decoder
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from sftstream.door import Door
from sftstream.tokenization.tokenizer_bounds import require_bounded
from sftstream.tokenization.tokenizer_files import TokenizerFiles

VERSION = 4
"""Version of the kept values. Raise the number if the value of a field of `Vocabulary` changes."""
PYTHON_PARTS = (Normalizer, PreTokenizer, Decoder)
"""Types of tokenizer parts written in Python; parts of the library `tokenizers` have subtypes."""


class Vocabulary(msgspec.Struct, frozen=True):
    """A tokenizer, reduced to plain values that can be stored in the cache."""

    description: str
    """Text of a tokenizer.json, for `Tokenizer.from_str` of the library `tokenizers`."""
    template: str | None
    """The tokenizer's own chat template: its only template, or else the template "default"."""
    templates: dict[str, str]
    """The tokenizer's chat templates by name; empty if its template has no name."""
    variables: dict[str, str]
    """Variables of chat templates, such as `{"bos_token": "<s>"}`."""
    special: tuple[str, ...]
    """Texts of special tokens, longest first."""
    pad_id: int
    """Token id that fills the free slots at the end of a pack."""
    ids: int
    """Number of token ids: the largest id plus 1, added tokens included."""
    lengths: bytes | None
    """Number of bytes of each token, as the buffer of an array with the dtype `integers`.

    None if the tokenizer is not byte-level; the character offsets of its tokens are exact, and are
    used instead of lengths.
    """
    integers: str
    """numpy dtype of `lengths`, such as "|u1"; empty if `lengths` is None."""
    sha256: str
    """Hex digest of `description`, `variables` and `pad_id`, which decide all ids of a pack."""

    @property
    def byte_lengths(self) -> NDArray[np.integer[Any]] | None:
        """`lengths` as an array of shape `(tokens,)`, small enough for a processor's cache."""
        return None if self.lengths is None else np.frombuffer(self.lengths, self.integers)


class Opened(NamedTuple):
    """A tokenizer, opened from the cache or with transformers."""

    vocabulary: Vocabulary
    backend: Backend
    """The tokenizer of the library `tokenizers`."""
    hf: Any = None
    """The tokenizer of transformers; None if the vocabulary came from the cache."""
    files: TokenizerFiles | None = None
    """The files that were read; None for a tokenizer of transformers."""


def open_vocabulary(source: str | PathLike[str] | Any) -> Opened:
    """Open a tokenizer, from the cache if possible.

    `source` is a directory, a hub name, or a tokenizer of transformers. Raises ValueError if
    `source` has no fast tokenizer.
    """
    if not isinstance(source, str | PathLike):
        with _door(source.name_or_path):
            return Opened(describe(source), source.backend_tokenizer, source)
    with _door(str(source)):
        directory, files = _files(source)
        if kept := files.read(Vocabulary, VERSION):
            return Opened(kept, Backend.from_str(kept.description), files=files)
        return _made(str(source), directory, files)


def count_token_ids(source: str) -> int:
    """Return the number of token ids of a tokenizer: the largest id plus 1.

    `source` is a directory or a hub name. Raises ValueError if the tokenizer cannot be loaded.
    """
    with _door(source):
        directory, files = _files(source)
        return (files.read(Vocabulary, VERSION) or _made(source, directory, files).vocabulary).ids


def _files(source: str | PathLike[str]) -> tuple[Path, TokenizerFiles]:
    directory = Path(os.path.expanduser(source))  # leaves ~name as it is if there is no such user
    return directory, TokenizerFiles(directory)


def _made(source: str, directory: Path, files: TokenizerFiles) -> Opened:
    """Open a tokenizer with transformers, and keep its vocabulary in the cache."""
    _require_tokenizer(directory, source)
    hf = load(source)
    vocabulary = describe(hf)
    files.keep(vocabulary, VERSION)
    return Opened(vocabulary, hf.backend_tokenizer, hf, files)


def _require_tokenizer(directory: Path, source: str) -> None:
    """Raise ValueError if a directory has no tokenizer, or its tokenizer.json is too large."""
    if (file := directory / "tokenizer.json").is_file():
        require_bounded(file.read_bytes(), source)
    elif directory.is_dir() and not any(_OTHER.search(path.name) for path in directory.iterdir()):
        raise ValueError(
            f"{source!r} has no tokenizer.json; name the directory of a tokenizer, or save one there by "
            "save_pretrained of transformers"
        )


_OTHER = re.compile(r"\.model$|\.tiktoken$|^vocab\.(json|txt)$|^merges\.txt$|^tekken\.json$")
"""Names of files with a tokenizer in other forms, which transformers may convert."""


def _door(source: str) -> Door:
    return Door(f"tokenizer {source!r} cannot be loaded")


def load(source: str) -> Any:
    """Load a tokenizer with transformers.

    Raises ValueError if `source` has no tokenizer, or a tokenizer that is not fast.
    """
    from transformers import AutoTokenizer  # 0.2 s that a start from the cache saves

    with _door(source):
        hf = AutoTokenizer.from_pretrained(os.path.expanduser(source), trust_remote_code=False)
        _backend(hf)
        return hf


def _backend(hf: Any) -> Backend:
    """Return the tokenizer of the library `tokenizers`, with truncation and padding turned off."""
    if not hf.is_fast:
        raise ValueError(
            f"tokenizer {hf.name_or_path!r} has no tokenizer.json, so the offsets of its tokens are unknown; "
            "save it as a fast tokenizer (PreTrainedTokenizerFast)"
        )
    backend: Backend = hf.backend_tokenizer
    # A tokenizer.json may store truncation and padding, which would cut or extend texts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def describe(hf: Any) -> Vocabulary:
    """Return the vocabulary of a tokenizer of transformers.

    Raises ValueError if a part of the tokenizer calls Python code.
    """
    backend = _backend(hf)
    parts = backend.normalizer, backend.pre_tokenizer, backend.decoder
    if python := [type(part).__name__ for part in parts if type(part) in PYTHON_PARTS]:
        raise ValueError(
            f"tokenizer {hf.name_or_path!r} has a {python[0]} written in Python, which a tokenizer.json cannot store; "
            f"use a {python[0]} of the library tokenizers"
        )
    description = backend.to_str()
    require_bounded(description, hf.name_or_path)
    variables = {name: str(token) for name, token in hf.special_tokens_map.items() if isinstance(token, str)}
    special = {str(token) for token in hf.added_tokens_decoder.values() if token.special}
    pad_id = next(i for i in (hf.pad_token_id, hf.eos_token_id, 0) if i is not None)
    lengths = _byte_lengths(backend)
    templates = {"default": hf.chat_template} if isinstance(hf.chat_template, str) else dict(hf.chat_template or {})
    return Vocabulary(
        description=with_short_merges(description),
        template=next(iter(templates.values())) if len(templates) == 1 else templates.get("default"),
        templates={} if isinstance(hf.chat_template, str) else templates,
        variables=variables,
        special=tuple(sorted(special, key=lambda text: (-len(text), text))),
        pad_id=pad_id,
        ids=max(backend.get_vocab().values(), default=-1) + 1,
        lengths=None if lengths is None else lengths.tobytes(),
        integers="" if lengths is None else lengths.dtype.str,
        sha256=hashlib.sha256(json.dumps([description, variables, pad_id], sort_keys=True).encode()).hexdigest(),
    )


def with_short_merges(description: str) -> str:
    """Return the tokenizer.json with its merges in the short notation, `"a b"` for `["a", "b"]`.

    In the short notation, a vocabulary of 128,000 tokens loads in 3/4 of the time, and fastokens
    needs 20 % less memory. If a merge cannot be written in the short notation, for example
    `["a b", "c"]`, the description is returned unchanged.
    """
    tokenizer = msgspec.json.decode(description, type=dict[str, msgspec.Raw])
    model = msgspec.json.decode(tokenizer["model"], type=dict[str, msgspec.Raw])
    merges = _short_merges(bytes(model.get("merges", b"[]")))
    if merges is None:
        return description
    return msgspec.json.encode({**tokenizer, "model": {**model, "merges": msgspec.Raw(merges)}}).decode()


def _short_merges(merges: bytes) -> bytes | None:
    """Return `["a b","c d"]` for the JSON text `[["a","b"],["c","d"]]`, or None if impossible.

    Replaces bytes instead of decoding hundreds of thousands of tokens. Without escaped quotes and
    backslashes, each quote begins or ends a token.
    """
    plain = merges.replace(b"\\\\", b"\0").replace(b'\\"', b"\1")
    # `tokenizers` skips a merge that begins with "#version", the heading of old files of merges.
    # A space or "#" may be written as "\u0020" or "\u0023".
    if not plain.startswith(b'[["') or any(text in plain for text in (b" ", b"\\u002", b'["#version')):
        return None
    short = plain.replace(b'"],["', b"\2").replace(b'","', b" ").replace(b"\2", b'","')[1:-1]
    return short.replace(b"\1", b'\\"').replace(b"\0", b"\\\\")


def _byte_lengths(backend: Backend) -> NDArray[np.integer[Any]] | None:
    """Return the number of bytes of each token, shape `(tokens,)`; None if not byte-level.

    The library's own offsets cannot replace the lengths, because offsets count characters. If the
    bytes of a character, such as an emoji, lie in two tokens, both tokens have the same offsets.
    """
    if not isinstance(backend.decoder, ByteLevel):
        return None
    vocabulary, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    tokens = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    lengths = np.zeros(max(tokens.max(initial=-1), max(added, default=-1)) + 1, np.int64)
    # A byte-level vocabulary writes each byte as one character, such as "Ġ" for a space, so the
    # number of characters is the number of bytes.
    lengths[tokens] = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
    for index, token in added.items():
        lengths[index] = len(token.content.encode())
    return lengths.astype(np.min_scalar_type(lengths.max()))
