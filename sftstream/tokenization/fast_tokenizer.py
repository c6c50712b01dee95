"""fastokens in the place of `tokenizers`: 20 to 40 times faster, and trusted no further than it was compared."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata, util
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftstream.excerpt import excerpt

REMEDY = "set data.tokenizer.backend = 'huggingface'"

Reference = Callable[[str], Sequence[int]]


class Ids(NamedTuple):
    """Token ids of several texts, side by side: those of text `i` are `ids[offsets[i] : offsets[i + 1]]`."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def of(self, text: int) -> NDArray[np.int32]:
        """Those of one of them."""
        return self.ids[self.offsets[text] : self.offsets[text + 1]]


LOADS_AT = 2
"""Of the calls in a process. The first gives the first pack as a rule, which a thread beside it would hold up."""
FIRST, BETWEEN = 32, 4096
"""Texts of a run that are compared: the first ones, and later one of so many."""


def version() -> str | None:
    """What is installed of it."""
    return f"fastokens {metadata.version('fastokens')}" if util.find_spec("fastokens") else None


class FastTokenizer:
    """Gives the ids of `reference`, or None as long as that is not shown.

    It takes a second to load, which a thread does while others go on with the reference. Then it must agree with that on all
    `probes`. Texts of the run are compared as well; where one differs, RuntimeError is raised. `required` makes an error of a
    probe that differs, or of a description that it cannot load, which otherwise leaves everything to the reference.
    """

    def __init__(
        self, description: str, reference: Reference, probes: Callable[[], Iterable[str]], *, required: bool
    ) -> None:
        self._description = description
        self._reference = reference
        self._probes = probes
        self._required = required
        self._process = self._calls = 0
        self._encode: Callable[[Sequence[str]], Ids] | None = None
        self._refused: str | None = None
        self._count = 0

    def __call__(self, texts: Sequence[str]) -> Ids | None:
        """Ids of some texts, special tokens in them recognized."""
        if self._encode is None:
            if self._refused is not None and self._required:
                raise RuntimeError(self._refused)
            if self._process != os.getpid():  # of a fork, the thread stayed behind
                self._process, self._calls = os.getpid(), 0
            self._calls += 1
            if self._calls == LOADS_AT:
                threading.Thread(target=self.load, name="fastokens").start()
            return None
        encoded = self._encode(texts)
        first, later = range(min(FIRST - self._count, len(texts))), range(~self._count % BETWEEN, len(texts), BETWEEN)
        for index in (*first, *later):
            self._compare(texts[index], encoded.of(index))
        self._count += len(texts)
        return encoded

    def _compare(self, text: str, ids: NDArray[np.int32]) -> None:
        if ids.tolist() != list(self._reference(text)):
            raise RuntimeError(_difference(text))

    def load(self) -> None:
        """Load and certify, unless the process ends before that: it would abort were a thread cut off in foreign code."""
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # a loader's process is one of many; its own threads spin
        import fastokens

        try:
            tokenizer = fastokens.Tokenizer.from_json_str(self._description)
        except ValueError as error:
            self._refused = f"{version()} cannot load this tokenizer: {error}; {REMEDY}"
            return

        def encode(texts: Sequence[str]) -> Ids:
            ids, offsets = tokenizer.encode_batch_flat(texts, False)
            return Ids(np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64))

        _give_back_memory()
        for probe in self._probes():
            if not threading.main_thread().is_alive():
                return
            if encode([probe]).ids.tolist() != list(self._reference(probe)):
                self._refused = _difference(probe)
                return
        self._encode = encode


def _give_back_memory() -> None:
    """Of 250 MB that reading a large description takes, 150 are freed again, and glibc keeps them for the thread."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _difference(text: str) -> str:
    return f"{version()} gives other ids than tokenizers for {excerpt(text, 200)}; {REMEDY}"


def probes(special: Sequence[str]) -> Iterator[str]:
    """Texts on which tokenizers may part: what borders on what, in every script, and special tokens among them."""
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
