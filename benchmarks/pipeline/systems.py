"""The compared systems, each opening equal rows and returning packs: here sftstream and the bare
tokenizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from typing import Any, Literal

import msgspec
import numpy as np
from corpus import DAY, Job
from numpy.typing import NDArray

from sftstream import DataConfig, PackLoader
from sftstream.records import IGNORE_INDEX, Pack

Sequences = Iterator[tuple[NDArray[Any], NDArray[Any]]]
"""Ids and loss mask of each conversation."""
Open = Callable[[Job], Callable[[], Iterator[Any]]]
"""Load everything but rows, above all the tokenizer; return a function that starts the work on
rows."""

TEXTS = 128
"""Texts per call of a tokenizer: the batch size of our stages; more are no faster."""


@dataclass(frozen=True)
class System:
    """One row of the table and the way of measuring it."""

    name: str
    open: Open
    tokens: Callable[[Any], int]
    sequences: Callable[[Any], Sequences] | None = None
    requires: str = "sftstream"
    """Package that the system needs."""
    imports: tuple[str, ...] = ()
    """Modules imported before any clock runs."""
    counted: Literal["after the first pack", "until the first pack", "all"] = "all"
    """Period of counting tokens per second, opening excluded: after the first pack for systems that
    start workers or load while reading; until the first pack (with all tokens) for systems that
    finish their work before the first pack."""
    workers: int = 0
    settle: Callable[[Iterator[Any], Job], None] = lambda _packs, _job: None
    """Wait after the first pack, before the measurement."""
    endless: bool = False
    """Continues with a second pass, measured too."""
    backend: str = "auto"
    resumes: str = ""
    """Ability to resume, in a few words."""

    @property
    def present(self) -> bool:
        """Whether the package is installed."""
        return util.find_spec(self.requires) is not None


def data_config(job: Job, rows: str, *, epochs: int | None) -> DataConfig:
    """Return a config with one stream per worker."""
    return msgspec.convert(
        {
            "sources": [{"path": rows}],
            "tokenizer": {"path": job.tokenizer, "date": DAY, "backend": job.backend},
            "streams": max(1, job.workers),
            "global_batch": max(1, job.workers),
            "workers": job.workers,
            "capacity": job.capacity,
            "epochs": epochs,
        },
        DataConfig,
    )


def ours(job: Job) -> Callable[[], Iterator[Pack]]:
    """Open the loader as a trainer does."""
    return lambda: PackLoader(data_config(job, str(job.rows), epochs=1 if job.once else None))


def conversations_of(pack: Pack) -> Sequences:
    """Yield ids and mask of each conversation; a token's mask is read from the label one position
    earlier."""
    trained = np.roll((pack.labels != IGNORE_INDEX).numpy(), 1)
    ids, at = pack.input_ids.numpy(), 0
    for segment in pack.segments:
        yield ids[at : at + segment.length], trained[at : at + segment.length]
        at += segment.length


def tokens_of(pack: Pack) -> int:
    """Ask for all tensors, as a trainer does, and return the tokens."""
    assert pack.input_ids.shape == pack.labels.shape == pack.position_ids.shape
    return pack.tokens


def fastokens_loaded(loader: Any, _job: Job) -> None:
    """Load fastokens; until then this process encodes with `tokenizers`."""
    if fast := loader.encoder.tokenizer.fast_tokenizer:
        fast.load()


def workers_settled(packs: Iterator[Any], job: Job) -> None:
    """Read for `job.patience` seconds, until workers have loaded fastokens and reached their steady
    speed."""
    until = time.perf_counter() + job.patience
    while time.perf_counter() < until:
        next(packs)


def huggingface(job: Job) -> Callable[[], Iterator[int]]:
    """Open `tokenizers.encode_batch`, the unit of all ratios; yields numbers of tokens."""
    from tokenizers import Tokenizer

    backend, texts = Tokenizer.from_file(f"{job.tokenizer}/tokenizer.json"), batches(job)
    return lambda: (sum(map(len, backend.encode_batch(some, add_special_tokens=False))) for some in texts)


def huggingface_fast(job: Job) -> Callable[[], Iterator[int]]:
    """Open `tokenizers.encode_batch_fast`, without offsets."""
    from tokenizers import Tokenizer

    backend, texts = Tokenizer.from_file(f"{job.tokenizer}/tokenizer.json"), batches(job)
    return lambda: (sum(map(len, backend.encode_batch_fast(some, add_special_tokens=False))) for some in texts)


def fastokens(job: Job) -> Callable[[], Iterator[int]]:
    """Open fastokens alone."""
    from fastokens import Tokenizer
    from tokenizers import Tokenizer as HuggingFace

    tokenizer = Tokenizer.from_json_str(HuggingFace.from_file(f"{job.tokenizer}/tokenizer.json").to_str())
    texts = batches(job)
    return lambda: (len(tokenizer.encode_batch_flat(some, False)[0]) // 4 for some in texts)


def batches(job: Job) -> list[list[str]]:
    """Return the rendered texts in batches."""
    texts = msgspec.json.decode(job.texts.read_bytes(), type=list[str])
    return [texts[at : at + TEXTS] for at in range(0, len(texts), TEXTS)]


RAW = System("`tokenizers.encode_batch` of the rendered texts", huggingface, int)
TOKENIZERS = (
    RAW,
    System("`tokenizers.encode_batch_fast`, without offsets", huggingface_fast, int),
    System("fastokens", fastokens, int, requires="fastokens", imports=("fastokens",), counted="after the first pack"),
)


def _ours(name: str, workers: int = 0, backend: str = "auto") -> System:
    return System(
        name,
        ours,
        tokens_of,
        conversations_of,
        counted="after the first pack",
        workers=workers,
        settle=workers_settled if workers else fastokens_loaded,
        endless=True,
        backend=backend,
        resumes="exactly, with any workers",
    )


OURS = (
    _ours("sftstream"),
    _ours("sftstream, 1 worker", 1),
    _ours("sftstream, 2 workers", 2),
    _ours("sftstream without fastokens", backend="huggingface"),
)
