"""Tokens a second and core from file to pack, against tokenizing alone: `python benchmarks/pipeline.py > benchmarks/pipeline.md`.

    python benchmarks/pipeline.py [--data DIRECTORY] [--rows 3000] [--rounds 5]

DIRECTORY holds `conversations/*/*` and `tokenizers/llama3`; by default SFTSTREAM_REALDATA. All on one core, by CPU time, all
variants in turn, medians of rounds. Every conversation's ids and mask are compared with those of the reference first.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import msgspec
import numpy as np

from sftstream import ChatEncoder, DataConfig, PackLoader, Refused, SourceConfig
from sftstream.formats import conversation
from sftstream.records import Conversation
from sftstream.sources import BrokenRow, FileSet

DAY = "2025-01-31"


def conversations(path: Path, limit: int, encoder: ChatEncoder) -> list[Conversation]:
    """Those that the encoder takes."""
    rows = FileSet(SourceConfig(path=str(path)))
    result = []
    for row in range(min(len(rows), limit)):
        try:
            dialogue = conversation(rows.read(row))
            encoder.draft(dialogue)
        except (BrokenRow, Refused):
            continue
        result.append(dialogue)
    return result


def verified(dialogues: list[Conversation], quick: ChatEncoder, slow: ChatEncoder) -> int:
    """Tokens in all; an error where the quick way differs from the template run on each conversation and from `tokenizers`."""
    total = 0
    for dialogue in dialogues:
        (example,) = quick.tokenize(quick.draft(dialogue))
        reference = slow.tokenizer.encode(slow.render_whole(dialogue)[0])
        assert np.array_equal(example.tokens, reference.tokens)
        assert np.array_equal(example.loss_mask, reference.loss_mask)
        total += len(example.tokens)
    return total


def encoders(dialogues: list[Conversation], quick: ChatEncoder, slow: ChatEncoder) -> dict[str, Callable[[], int]]:
    """Tokenizing alone, the template run on each of some conversations, and what a stream does."""
    texts = [slow.render_whole(dialogue)[0].text for dialogue in dialogues]
    backend = slow.tokenizer.hf.backend_tokenizer
    some = dialogues[:: max(1, len(dialogues) // 200)]
    return {
        "raw": lambda: sum(len(e.ids) for e in backend.encode_batch_fast(texts, add_special_tokens=False)),
        "whole": lambda: sum(len(slow.tokenizer.encode(slow.render_whole(d)[0]).tokens) for d in some),
        "quick": lambda: sum(len(quick.tokenize(quick.draft(d))[0].tokens) for d in dialogues),
    }


def loaded(path: Path, tokenizer: str, rows: int) -> Callable[[], int]:
    """From file to packs of 8192, of a run that is under way."""
    config = msgspec.convert(
        {
            "sources": [{"path": str(path)}],
            "tokenizer": {"path": tokenizer, "date": DAY},
            "streams": 1,
            "global_batch": 1,
            "workers": 0,
        },
        DataConfig,
    )
    loader = PackLoader(config)
    if fast := loader.encoder.tokenizer.fast_tokenizer:
        fast.load()
    next(loader)

    def run() -> int:
        tokens = conversations = 0
        while conversations < rows:
            pack = next(loader)
            tokens += pack.tokens
            conversations += pack.conversations
        return tokens

    return run


def measured(variants: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens a CPU-second of each: the median of its rounds."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            began = time.process_time()
            tokens = run()
            found[name].append(tokens / (time.process_time() - began))
    return {name: statistics.median(rates) for name, rates in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=os.environ.get("SFTSTREAM_REALDATA"))
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = str(Path(options.data) / "tokenizers" / "llama3")
    quick = ChatEncoder(tokenizer, date=DAY)
    slow = ChatEncoder(tokenizer, date=DAY, backend="huggingface")
    if quick.tokenizer.fast_tokenizer:
        quick.tokenizer.fast_tokenizer.load()
    print("# From file to pack\n")
    print(
        f"`python benchmarks/pipeline.py`, {date.today()}; {platform.machine()}, {os.cpu_count()} CPUs, one core used; Python "
        f"{platform.python_version()}, {quick.tokenizer.fast}. Million tokens a CPU-second, and the ratio to `tokenizers`.\n"
    )
    print(
        "| conversations | tokens each | `tokenizers` alone | template run on each | render, tokenize, mask | file to pack |"
    )
    print("|---|---|---|---|---|---|")
    for path in sorted(Path(options.data).glob("conversations/*/*")):
        dialogues = conversations(path, options.rows, quick)
        if not dialogues:
            continue
        total = verified(dialogues, quick, slow)
        variants = encoders(dialogues, quick, slow) | {"packs": loaded(path, tokenizer, len(dialogues))}
        rate = measured(variants, options.rounds)
        cells = [f"{rate[name] / 1e6:.2f} ({rate[name] / rate['raw']:.1f}x)" for name in ("whole", "quick", "packs")]
        print(
            f"| {path.name} | {total / len(dialogues):.0f} | {rate['raw'] / 1e6:.2f} | {' | '.join(cells)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
