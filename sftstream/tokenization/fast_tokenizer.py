"""Tokenize with the library fastokens, 20 to 40 times faster than Hugging Face's `tokenizers`.

fastokens (`pip install fastokens`) is used only if both libraries compute the same ids for many
test texts (`probes`). During a run, the ids of some of the run's own texts are compared too.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata, util
from threading import current_thread, main_thread
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.door import Door
from sftstream.excerpt import excerpt

REMEDY = "set data.tokenizer.backend = 'huggingface'"

Reference = Callable[[str], Sequence[int]]
"""Function that returns the ids of a text, computed by `tokenizers`."""


class Ids(NamedTuple):
    """Token ids of several texts in a single array.

    Text `i` has the ids `ids[offsets[i] : offsets[i + 1]]`: with offsets `[0, 2, 5]`, the first
    text has 2 ids and the second has 3.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def of(self, text: int) -> NDArray[np.int32]:
        """Return the ids of the text with the index `text`."""
        return self.ids[self.offsets[text] : self.offsets[text + 1]]


LOAD_AFTER = 1 << 22
"""Number of characters after which fastokens is loaded. `tokenizers` needs about as long for these
characters as loading needs. So the first packs do not wait for the loading, and the samples that a
run takes at its start do not load at all."""
COMPARE_FIRST, COMPARE_EVERY = 32, 4096
"""The ids of the first 32 texts of a run are compared, then the ids of every 4,096th text."""


def version() -> str | None:
    """Return the installed version, such as "fastokens 0.3.5", or None."""
    return f"fastokens {metadata.version('fastokens')}" if util.find_spec("fastokens") else None


class FastTokenizer:
    """An encoder that uses fastokens once its ids of all test texts equal those of `reference`.

    `description` is the text of a tokenizer.json. The call that reaches `LOAD_AFTER`, or the first
    call if fastokens is `required`, loads the description and compares the test texts, which needs
    about a second. Afterwards, some texts of the run are compared as well, and a difference raises
    RuntimeError.

    If fastokens cannot load the description, or a test text has other ids, all later calls return
    None, or raise RuntimeError if fastokens is `required`.

    Only a call in the main thread loads, unless fastokens is `required`. Loading in another thread
    ended processes by SIGSEGV: fastokens reads environment variables, and a library that sets
    variables meanwhile, as accelerate does, frees the memory that is being read.
    """

    def __init__(
        self, description: str, reference: Reference, probes: Callable[[], Iterable[str]], *, required: bool
    ) -> None:
        self._description = description
        self._reference = reference
        self._probes = probes
        self._required = required
        self._characters = self._count = 0
        self._encode: Callable[[Sequence[str]], Ids] | None = None
        self._refused: str | None = None

    def __call__(self, texts: Sequence[str]) -> Ids | None:
        """Return the ids of the texts; None if fastokens is not loaded.

        Texts of special tokens become special tokens.
        """
        if self._encode is None and self._refused is None:
            self._characters += sum(map(len, texts))
            if self._required or (self._characters >= LOAD_AFTER and current_thread() is main_thread()):
                self.load()
        if self._refused is not None and self._required:
            raise RuntimeError(self._refused)
        if self._encode is None:
            return None
        encoded = self._encode(texts)
        first = range(min(COMPARE_FIRST - self._count, len(texts)))
        later = range(~self._count % COMPARE_EVERY, len(texts), COMPARE_EVERY)
        for index in (*first, *later):
            self._compare(texts[index], encoded.of(index))
        self._count += len(texts)
        return encoded

    def _compare(self, text: str, ids: NDArray[np.int32]) -> None:
        if ids.tolist() != list(self._reference(text)):
            raise RuntimeError(_difference(text))

    def load_if_required(self) -> None:
        """Load the description now if fastokens is `required`, and not in the first call."""
        if self._required and self._encode is None and self._refused is None:
            self.load()

    def load(self) -> None:
        """Load the description with fastokens, and compare the ids of the test texts."""
        # A data loader has a process per core; more threads of fastokens would only wait, busily.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
        import fastokens

        try:
            with Door(f"{version()} cannot load this tokenizer"):
                tokenizer = fastokens.Tokenizer.from_json_str(self._description)
        except ValueError as error:
            self._refused = f"{error}; {REMEDY}"
            return

        def encode(texts: Sequence[str]) -> Ids:
            ids, offsets = tokenizer.encode_batch_flat(texts, False)
            return Ids(np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64))

        _release_memory()
        for probe in self._probes():
            if encode([probe]).ids.tolist() != list(self._reference(probe)):
                self._refused = _difference(probe)
                return
        self._encode = encode


def _release_memory() -> None:
    """Return freed memory to the operating system.

    Loading a large description allocates 250 MB and frees 150 MB, but glibc would keep the freed
    memory for the thread.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _difference(text: str) -> str:
    return f"{version()} gives other ids than tokenizers for {excerpt(text, 200)}; {REMEDY}"


def probes(special: Sequence[str]) -> Iterator[str]:
    """Yield test texts, for which two tokenizer libraries may compute different ids.

    The texts mix characters of many scripts with spaces, digits, punctuation and special tokens.
    """
    draw = random.Random(0)
    yield from (
        "",
        " ",
        "a",
        "\n",
        "a" * 3000,
        "1234567890" * 40,
        " " * 100,
        "\n" * 100,
        "".join(map(chr, range(1, 128))),
    )
    for token in special[:300]:
        yield from (token, f"a{token}b", f" {token}\n", token[:-1], token * 2)
    blocks = [
        *((32, 127), (0, 32), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x780), (0x900, 0xE00)),
        *((0x1E00, 0x2100), (0x2000, 0x2070), (0x2190, 0x2600), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)),
        *((0xE000, 0xE100), (0xFE00, 0xFFF0), (0x1D400, 0x1D800), (0x1F300, 0x1FAFF), (0x20000, 0x20100)),
    ]
    common = [*"etaoin shrdlu  \n\n\t.,'\"-_/\\()[]{}<>=+*#@!?0123456789", "'s", "'LL", "\r\n", "   ", *special[:8]]
    for length in (3, 10, 40, 200):
        for block in blocks * 4:
            characters = [chr(draw.randrange(*block)) for _ in range(length)]
            yield "".join(draw.choice((character, draw.choice(common))) for character in characters)
        for _ in range(100):
            yield "".join(draw.choices(common, k=length))
