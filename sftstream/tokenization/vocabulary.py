"""A tokenizer's files -> all that a run asks of them. Of a directory it is worked out once on a machine: to transformers it is
half of a start."""

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
from sftstream.sources.rows import derived

SUFFIX, DIGEST = ".vocabulary", hashlib.sha256().digest_size
VERSION = 2
"""Of what is kept. A change of `Vocabulary`, or of how it is made, raises it."""
READ = (".json", ".jinja", ".model", ".txt")
"""The files of a directory that a tokenizer can be made of."""
MOST = 256 << 20
"""Bytes of such files beyond which a directory holds more than a tokenizer, and is not looked through at each start."""
OF_PYTHON = (Normalizer, PreTokenizer, Decoder)
"""What `tokenizers` calls parts that are not its own; those have types below these."""


class Vocabulary(msgspec.Struct, frozen=True):
    """A tokenizer as values."""

    description: str
    """A tokenizer.json that `tokenizers` makes it of."""
    template: str | None
    variables: dict[str, str]
    """What a chat template knows of it: `bos_token` and the like."""
    special: tuple[str, ...]
    """The texts of special tokens, longest first."""
    pad_id: int
    """What fills the untrained tail of a pack."""
    lengths: bytes | None
    """Bytes of each token of a byte-level vocabulary, as integers; None for other kinds, whose offsets are exact."""
    integers: str
    """Their type."""
    sha256: str
    """Of all that decides the ids: how text is divided, what the template's variables say, what fills a pack."""

    @property
    def byte_lengths(self) -> NDArray[np.integer[Any]] | None:
        """`lengths` as an array, as small as can be, for the core's cache."""
        return None if self.lengths is None else np.frombuffer(self.lengths, self.integers)


class Opened(NamedTuple):
    """A tokenizer."""

    vocabulary: Vocabulary
    backend: Backend
    """What computes the ids."""
    hf: Any = None
    """transformers' own, if it was loaded for this."""


def open_vocabulary(source: str | PathLike[str] | Any) -> Opened:
    """Of a directory, a hub name or a tokenizer of transformers. Raises ValueError where there is no fast tokenizer."""
    if not isinstance(source, str | PathLike):
        return Opened(describe(source), source.backend_tokenizer, source)
    directory = Path(os.path.expanduser(source))  # as it is where there is no such user
    key = _key(directory)
    if key and (known := _known(key)):
        return Opened(known, Backend.from_str(known.description))
    hf = load(str(source))
    vocabulary = describe(hf)
    if key and key == _key(directory):  # else a file changed meanwhile
        _keep(key, vocabulary)
    return Opened(vocabulary, hf.backend_tokenizer, hf)


def load(source: str) -> Any:
    """transformers' own tokenizer; raises ValueError where there is none, or none that is fast."""
    from transformers import AutoTokenizer  # a fifth of a second, which most starts do without

    try:
        hf = AutoTokenizer.from_pretrained(os.path.expanduser(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {source!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    _backend(hf)
    return hf


def _backend(hf: Any) -> Backend:
    """What computes its ids."""
    if not hf.is_fast:
        raise ValueError(
            f"tokenizer {hf.name_or_path!r} has no tokenizer.json, so its tokens cannot be placed in the text; "
            "convert it to a fast one"
        )
    backend: Backend = hf.backend_tokenizer
    # A tokenizer.json can carry these from other uses; both would change the text without a word.
    backend.no_truncation()
    backend.no_padding()
    return backend


def describe(hf: Any) -> Vocabulary:
    """What a run asks of a tokenizer of transformers."""
    backend = _backend(hf)
    parts = backend.normalizer, backend.pre_tokenizer, backend.decoder
    if own := [type(part).__name__ for part in parts if type(part) in OF_PYTHON]:
        raise ValueError(
            f"tokenizer {hf.name_or_path!r} has a {own[0]} of Python code, which no tokenizer.json can hold; take one without"
        )
    description = backend.to_str()
    variables = {name: str(token) for name, token in hf.special_tokens_map.items() if isinstance(token, str)}
    special = {str(token) for token in hf.added_tokens_decoder.values() if token.special}
    pad_id = next(i for i in (hf.pad_token_id, hf.eos_token_id, 0) if i is not None)
    lengths = _byte_lengths(backend)
    return Vocabulary(
        description=with_short_merges(description),
        template=hf.chat_template if isinstance(hf.chat_template, str) else None,
        variables=variables,
        special=tuple(sorted(special, key=lambda text: (-len(text), text))),
        pad_id=pad_id,
        lengths=None if lengths is None else lengths.tobytes(),
        integers="" if lengths is None else lengths.dtype.str,
        sha256=_digest(json.dumps([description, variables, pad_id], sort_keys=True).encode()).hex(),
    )


def with_short_merges(description: str) -> str:
    """The same tokenizer with its merges as `"a b"`, the older notation, not `["a", "b"]`, where that can hold them.

    A vocabulary of 128,000 is read in three quarters of the time then, and fastokens keeps a fifth less memory of it.
    """
    tokenizer = msgspec.json.decode(description, type=dict[str, msgspec.Raw])
    model = msgspec.json.decode(tokenizer["model"], type=dict[str, msgspec.Raw])
    lines = [" ".join(merge) for merge in msgspec.json.decode(model.get("merges", b"[]"))]
    text = "\n".join(("", *lines))
    # A line of `#version` was the heading of a file of merges once, and is still passed over.
    if not lines or text.count(" ") > len(lines) or "\n#version" in text:
        return description
    return msgspec.json.encode({**tokenizer, "model": {**model, "merges": lines}}).decode()


def _byte_lengths(backend: Backend) -> NDArray[np.integer[Any]] | None:
    """Offsets of byte-level tokens count characters, so the pieces of a split character all claim the whole of it."""
    if not isinstance(backend.decoder, ByteLevel):
        return None
    vocabulary, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
    tokens = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    lengths = np.zeros(max(tokens.max(initial=-1), max(added, default=-1)) + 1, np.int64)
    # One printable character stands for one byte.
    lengths[tokens] = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
    for index, token in added.items():
        lengths[index] = len(token.content.encode())
    return lengths.astype(np.min_scalar_type(lengths.max()))


def _key(directory: Path) -> str | None:
    """Names what is made of a directory's files, by their content and by who reads them; None where nothing is to be kept."""
    readers = (metadata.version(library) for library in ("transformers", "tokenizers"))
    try:
        inside = (*directory.glob("*"), *directory.glob("additional_chat_templates/*"))
        files = sorted(path for path in inside if path.suffix in READ and path.is_file())
        if directory / "tokenizer.json" not in files or sum(path.stat().st_size for path in files) > MOST:
            return None
        content = [f"{path.relative_to(directory)} {_digest(path.read_bytes()).hex()}" for path in files]
    except OSError:
        return None  # whoever loads it says what is wrong
    return derived("vocabulary", VERSION, *Vocabulary.__struct_fields__, *readers, *content)


def _known(key: str) -> Vocabulary | None:
    with suppress(OSError):  # then it is made anew
        path = found(key, SUFFIX)
        encoded = _content(path) if path else None
        return msgspec.msgpack.decode(encoded, type=Vocabulary) if encoded else None
    return None


def _keep(key: str, vocabulary: Vocabulary) -> None:
    encoded = msgspec.msgpack.encode(vocabulary)
    with suppress(Unwritable, OSError):  # each start takes as long as the first then
        cached(key, SUFFIX, lambda: (_digest(encoded), encoded), lambda path: _content(path) is not None)


def _content(path: Path) -> bytes | None:
    """What stands behind its digest, if that is right."""
    content = path.read_bytes()
    return content[DIGEST:] if _digest(content[DIGEST:]) == content[:DIGEST] else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
