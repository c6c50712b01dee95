"""Each file of conversations by itself, stage by stage: tokens a CPU-second of this process."""

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
from sftstream.streaming.sampler import TOGETHER

SAMPLE = 200
"""Conversations on each of which the template is run: that is slow."""

X = TypeVar("X")
Variants = dict[str, Callable[[], int]]
"""Name -> what is run, which gives the tokens it made."""


def rates_of_files(data: Data, rows: int, rounds: int) -> Iterator[tuple[str, float, dict[str, float]]]:
    """The file's name, tokens of a conversation, and each variant's tokens a second. Ids and masks are compared first."""
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
        yield Path(path).name, tokens, span_byte_bounds(variants, rounds)


def stages(conversations: Sequence[Conversation], quick: ChatEncoder, slow: ChatEncoder) -> Variants:
    """`tokenizers` alone, the template run on each of some conversations, and the stages of a stream."""
    backend = slow.tokenizer.hf.backend_tokenizer
    some = conversations[:: max(1, len(conversations) // SAMPLE)]
    texts = [batch(slow, conversations) for conversations in in_batches(conversations)]
    return {
        "raw": lambda: sum(len(e) for t in texts for e in backend.encode_batch(t, add_special_tokens=False)),
        "whole": lambda: sum(len(slow.tokenizer.encode(slow.renderer.render_whole(d)[0]).tokens) for d in some),
        "quick": lambda: sum(encoded(quick, batch) for batch in in_batches(conversations)),
    }


def batch(encoder: ChatEncoder, conversations: Sequence[Conversation]) -> list[str]:
    """Their texts."""
    return [encoder.renderer.render_whole(conversation)[0].text for conversation in conversations]


def encoded(encoder: ChatEncoder, conversations: Sequence[Conversation]) -> int:
    """Tokens of conversations that are rendered, tokenized and masked as a stream does it."""
    examples = encoder.tokenize_all(
        [encoder.renderer.render_conversation(conversation) for conversation in conversations]
    )
    return sum(len(example.tokens) for several in examples if isinstance(several, list) for example in several)


def in_batches(values: Sequence[X]) -> Iterator[Sequence[X]]:
    """As many as a stream takes through its stages at once."""
    return (values[at : at + TOGETHER] for at in range(0, len(values), TOGETHER))


def packs(path: str, data: Data, found: Sequence[tuple[Conversation, Example]]) -> Callable[[], int]:
    """From file to packs, of a run that is under way."""
    config = msgspec.convert(
        {
            "sources": [{"path": path}],
            "tokenizer": {"path": data.tokenizer, "date": DAY},
            "streams": 1,
            "global_batch": 1,
            "workers": 0,
            "capacity": data.capacity,
            "max_refused": 1.0,
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


def span_byte_bounds(variants: Variants, rounds: int) -> dict[str, float]:
    """Tokens a CPU-second of each: the median of rounds, in each of which all have a turn."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            began = time.process_time()
            tokens = run()
            found[name].append(tokens / (time.process_time() - began))
    return {name: statistics.median(rates) for name, rates in found.items()}
