"""Measure each file of conversations alone, stage by stage, in tokens per CPU-second of this
process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from corpus import DAY, Data, accepted, require_same

from sftstream import ChatEncoder, DataConfig, PackLoader
from sftstream.records import Conversation, Example
from sftstream.streaming.sampler import BATCH_ROWS

SAMPLE = 200
"""Conversations to run the template on; few, because running is slow."""

X = TypeVar("X")
Variants = dict[str, Callable[[], int]]
"""Name -> function that returns the number of tokens produced."""


def rates_of_files(data: Data, rows: int, rounds: int) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Yield file name, mean tokens per conversation, and tokens per second by variant; ids and
    masks are compared first."""
    quick = ChatEncoder(data.tokenizer, date=DAY, capacity=data.capacity)
    slow = ChatEncoder(data.tokenizer, date=DAY, backend="huggingface")
    if quick.tokenizer.fast_tokenizer:
        quick.tokenizer.fast_tokenizer.load()
    for path in data.files:
        found = list(accepted(path, rows, quick))
        if not found:
            continue
        for conversation, example in found:
            require_same(slow.tokenizer.encode(slow.renderer.render_whole(conversation)[0]), example)
        conversations = [conversation for conversation, _ in found]
        variants = stages(conversations, quick, slow) | {"packs": packs(path, data, found)}
        tokens = sum(len(example.tokens) for _, example in found) / len(found)
        yield Path(path).name, tokens, median_rates(variants, rounds)


def stages(conversations: Sequence[Conversation], quick: ChatEncoder, slow: ChatEncoder) -> Variants:
    """Return the variants: `tokenizers` alone, the template run on a sample, and the stages of a
    stream."""
    backend = slow.tokenizer.hf.backend_tokenizer
    some = conversations[:: max(1, len(conversations) // SAMPLE)]
    texts = [batch(slow, conversations) for conversations in in_batches(conversations)]
    return {
        "raw": lambda: sum(len(e) for t in texts for e in backend.encode_batch(t, add_special_tokens=False)),
        "whole": lambda: sum(len(slow.tokenizer.encode(slow.renderer.render_whole(d)[0]).tokens) for d in some),
        "quick": lambda: sum(encoded(quick, batch) for batch in in_batches(conversations)),
    }


def batch(encoder: ChatEncoder, conversations: Sequence[Conversation]) -> list[str]:
    """Return the rendered texts."""
    return [encoder.renderer.render_whole(conversation)[0].text for conversation in conversations]


def encoded(encoder: ChatEncoder, conversations: Sequence[Conversation]) -> int:
    """Render, tokenize and mask conversations as a stream does; return the tokens."""
    examples = encoder.tokenize_all(
        [encoder.renderer.render_conversation(conversation) for conversation in conversations]
    )
    return sum(len(example.tokens) for several in examples if isinstance(several, list) for example in several)


def in_batches(values: Sequence[X]) -> Iterator[Sequence[X]]:
    """Return slices of the batch size of a stream's stages."""
    return (values[at : at + BATCH_ROWS] for at in range(0, len(values), BATCH_ROWS))


def packs(path: str, data: Data, found: Sequence[tuple[Conversation, Example]]) -> Callable[[], int]:
    """Return a function that reads packs of a running loader from the file."""
    config = msgspec.convert(
        {
            "sources": [{"path": path}],
            "tokenizer": {"path": data.tokenizer, "date": DAY},
            "streams": 1,
            "global_batch": 1,
            "workers": 0,
            "capacity": data.capacity,
            "max_refused": 1.0,
            "max_too_long": 1.0,
        },
        DataConfig,
    )
    loader = PackLoader(config)
    if fast := loader.encoder.tokenizer.fast_tokenizer:
        fast.load()
    next(loader)

    def run() -> int:
        tokens = conversations = 0
        while conversations < len(found):
            pack = next(loader)
            tokens += pack.tokens
            conversations += pack.conversations
        return tokens

    return run


def median_rates(variants: Variants, rounds: int) -> dict[str, float]:
    """Return each variant's tokens per CPU-second, the median over rounds with one turn per
    variant."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            began = time.process_time()
            tokens = run()
            found[name].append(tokens / (time.process_time() - began))
    return {name: statistics.median(rates) for name, rates in found.items()}
