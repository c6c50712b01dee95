"""A tokenizer's files -> the values needed by a run (`Vocabulary`).

The values are cached by the content of the files: opening a tokenizer with transformers takes half
of the time in which a run starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from importlib import metadata
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

from sftstream.cache import Unwritable, cached, found
from sftstream.door import Door
from sftstream.sources.rows import derived
from sftstream.tokenization.tokenizer_bounds import require_bounded

SUFFIX, DIGEST = ".vocabulary", hashlib.sha256().digest_size
VERSION = 2
"""Version of cached files, to be raised when `Vocabulary` or the way to compute a field changes."""
READ = (".json", ".jinja", ".model", ".txt")
"""Suffixes of a tokenizer's files."""
MAX_BYTES = 256 << 20
"""Bytes in a tokenizer's files above which a directory is not cached.

A larger directory holds more than a tokenizer, and hashing it at each start would be slow.
"""
PYTHON_PARTS = (Normalizer, PreTokenizer, Decoder)
"""Types of parts written in Python; the parts of `tokenizers` have subtypes."""


class Vocabulary(msgspec.Struct, frozen=True):
    """A tokenizer as values."""

    description: str
    """Text of a tokenizer.json, as `Tokenizer.from_str` of `tokenizers` reads it."""
    template: str | None
    """Text of the tokenizer's own chat template: the only one, or the template named "default"."""
    templates: dict[str, str]
    """Texts of the tokenizer's named chat templates; empty if the template has no name."""
    variables: dict[str, str]
    """Variables of chat templates, such as `{"bos_token": "<s>"}`."""
    special: tuple[str, ...]
    """Texts of special tokens, longest first."""
    pad_id: int
    """Token id for the untrained tail of a pack."""
    lengths: bytes | None
    """Size of each token in bytes, an encoded array of `integers`; None if not byte-level.

    Offsets from tokenizers of another kind are exact.
    """
    integers: str
    """numpy dtype of `lengths`, such as "|u1"; empty if `lengths` is None."""
    sha256: str
    """Digest (hex) of `description`, `variables` and `pad_id`, which decide all ids of a pack."""

    @property
    def byte_lengths(self) -> NDArray[np.integer[Any]] | None:
        """`lengths` as an array `(tokens,)` of the smallest dtype, to fit into a core's cache."""
        return None if self.lengths is None else np.frombuffer(self.lengths, self.integers)


class Opened(NamedTuple):
    """An opened tokenizer."""

    vocabulary: Vocabulary
    backend: Backend
    """Tokenizer of the library `tokenizers`."""
    hf: Any = None
    """Tokenizer of transformers, unless the vocabulary was cached."""


def open_vocabulary(source: str | PathLike[str] | Any) -> Opened:
    """Open a directory, a hub name or a tokenizer of transformers, from the cache if possible.

    Raises ValueError if there is no fast tokenizer.
    """
    if not isinstance(source, str | PathLike):
        with _door(source.name_or_path):
            return Opened(describe(source), source.backend_tokenizer, source)
    with _door(str(source)):
        directory = Path(os.path.expanduser(source))  # leaves ~name as it is if there is no such user
        key = _cache_key(directory)
        if key and (cached_vocabulary := _read_cached(key)):
            return Opened(cached_vocabulary, Backend.from_str(cached_vocabulary.description))
        if (file := directory / "tokenizer.json").is_file():
            require_bounded(file.read_bytes(), str(source))
        hf = load(str(source))
        vocabulary = describe(hf)
        if key and key == _cache_key(directory):  # else a file has changed in the meantime
            _write_cached(key, vocabulary)
        return Opened(vocabulary, hf.backend_tokenizer, hf)


def _door(source: str) -> Door:
    return Door(f"tokenizer {source!r} cannot be loaded")


def load(source: str) -> Any:
    """Load a tokenizer with transformers; raises ValueError if there is none, or it is not fast."""
    from transformers import AutoTokenizer  # takes 0.2 s, and a cached vocabulary does not need it

    with _door(source):
        hf = AutoTokenizer.from_pretrained(os.path.expanduser(source), trust_remote_code=False)
        _backend(hf)
        return hf


def _backend(hf: Any) -> Backend:
    """Return the tokenizer of `tokenizers` inside, without truncation and padding."""
    if not hf.is_fast:
        raise ValueError(
            f"tokenizer {hf.name_or_path!r} has no tokenizer.json, so the offsets of its tokens are unknown; "
            "convert it to a fast tokenizer (PreTrainedTokenizerFast)"
        )
    backend: Backend = hf.backend_tokenizer
    # A tokenizer.json can hold both from earlier uses. They would cut or extend texts silently.
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
            f"tokenizer {hf.name_or_path!r} has a {python[0]} of Python code, which no tokenizer.json can hold; "
            "replace it by a part of the library tokenizers"
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
        lengths=None if lengths is None else lengths.tobytes(),
        integers="" if lengths is None else lengths.dtype.str,
        sha256=_digest(json.dumps([description, variables, pad_id], sort_keys=True).encode()).hex(),
    )


def with_short_merges(description: str) -> str:
    """Return a tokenizer.json with merges in the older notation, `"a b"` for `["a", "b"]`.

    A vocabulary of 128,000 tokens loads in 3/4 of the time, and fastokens needs 20 % less memory.
    A text with a merge outside that notation, such as `["a b", "c"]`, is returned unchanged.
    """
    tokenizer = msgspec.json.decode(description, type=dict[str, msgspec.Raw])
    model = msgspec.json.decode(tokenizer["model"], type=dict[str, msgspec.Raw])
    lines = [" ".join(merge) for merge in msgspec.json.decode(model.get("merges", b"[]"))]
    text = "\n".join(("", *lines))
    # `tokenizers` skips lines that begin with #version, once the heading of a file of merges.
    if not lines or text.count(" ") > len(lines) or "\n#version" in text:
        return description
    return msgspec.json.encode({**tokenizer, "model": {**model, "merges": lines}}).decode()


def _byte_lengths(backend: Backend) -> NDArray[np.integer[Any]] | None:
    """Return the size of each token in bytes, `(tokens,)`, or None if not byte-level.

    Offsets of byte-level tokens cannot tell the bytes: they count characters, and each of two
    tokens that share a character covers the whole character.
    """
    if not isinstance(backend.decoder, ByteLevel):
        return None
    vocabulary, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    tokens = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    lengths = np.zeros(max(tokens.max(initial=-1), max(added, default=-1)) + 1, np.int64)
    # Byte-level vocabularies print each byte as a single character, such as "Ġ" for a space.
    lengths[tokens] = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
    for index, token in added.items():
        lengths[index] = len(token.content.encode())
    return lengths.astype(np.min_scalar_type(lengths.max()))


def _cache_key(directory: Path) -> str | None:
    """Return a key of the content of a directory's files and the versions of their readers.

    The result is None if the directory has no tokenizer.json or more than `MAX_BYTES`.
    """
    readers = (metadata.version(library) for library in ("transformers", "tokenizers"))
    try:
        inside = (*directory.glob("*"), *directory.glob("additional_chat_templates/*"))
        files = sorted(path for path in inside if path.suffix in READ and path.is_file())
        if directory / "tokenizer.json" not in files or sum(path.stat().st_size for path in files) > MAX_BYTES:
            return None
        content = [f"{path.relative_to(directory)} {_digest(path.read_bytes()).hex()}" for path in files]
    except OSError:
        return None  # `load` reports the error
    return derived("vocabulary", VERSION, *Vocabulary.__struct_fields__, *readers, *content)


def _read_cached(key: str) -> Vocabulary | None:
    with suppress(OSError):  # the vocabulary is computed again
        path = found(key, SUFFIX)
        encoded = _content(path) if path else None
        return msgspec.msgpack.decode(encoded, type=Vocabulary) if encoded else None
    return None


def _write_cached(key: str, vocabulary: Vocabulary) -> None:
    encoded = msgspec.msgpack.encode(vocabulary)
    with suppress(Unwritable, OSError):  # without a cache each start takes as long as the first
        cached(key, SUFFIX, lambda: (_digest(encoded), encoded), lambda path: _content(path) is not None)


def _content(path: Path) -> bytes | None:
    """Return the bytes after the digest of a file, or None if the digest does not match."""
    content = path.read_bytes()
    return content[DIGEST:] if _digest(content[DIGEST:]) == content[:DIGEST] else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
