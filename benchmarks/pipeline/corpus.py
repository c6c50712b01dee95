"""Prepare the conversations for all systems: a file of JSON lines, rendered texts, and expected ids
and masks."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from sftstream import ChatEncoder, Refused, SourceConfig
from sftstream.formats import parse_row
from sftstream.records import Conversation, Example, Rendered
from sftstream.rendering.template import template_message
from sftstream.sources import BrokenRow, FileSet

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DAY = "2024-07-26"
"""The date that Llama 3.1's template prints without a date argument; peers pass none."""
SEED = 0


class Truth(NamedTuple):
    """Expected ids and masks of the rows."""

    digests: Counter[tuple[bytes, bytes]]
    """Count of each pair (digest of ids, digest of loss mask)."""
    typed: frozenset[bytes]
    """Digests of ids of conversations with a typed special token's text: words to us, a token to
    peers."""


class Data(msgspec.Struct, frozen=True):
    """Paths of conversations, tokenizer and chat template."""

    files: tuple[str, ...]
    tokenizer: str
    tagged: str
    """A template with equal output and `{% generation %}` tags around the assistant's turns."""
    capacity: int


class Job(msgspec.Struct, frozen=True):
    """The input of a system: files in one directory, deleted at the end, and settings."""

    directory: str
    tokenizer: str
    tagged: str
    capacity: int
    tokens: int
    """Tokens of all rows."""
    conversations: int
    workers: int = 0
    backend: str = "auto"
    once: bool = False
    """Read all rows once, then stop."""
    patience: float = 6.0
    """Seconds for workers to settle before a measurement; an endless run is measured for at least a
    third. 0 for a trial."""
    here: bool = False
    """Run in this process, as a trial."""

    @property
    def rows(self) -> Path:
        """Path of the JSON lines with `messages` and optional `tools`."""
        return Path(self.directory) / "rows.jsonl"

    @property
    def texts(self) -> Path:
        """Path of the rendered texts, a JSON list."""
        return Path(self.directory) / "texts.json"

    def parts(self, count: int) -> list[str]:
        """Split the rows over `count` files, for systems that give each worker a file; return the
        paths."""
        lines = self.rows.read_bytes().splitlines(keepends=True)
        paths = [Path(self.directory) / f"part{part}of{count}.jsonl" for part in range(count)]
        for part, path in enumerate(paths):
            path.write_bytes(b"".join(lines[part::count]))
        return [str(path) for path in paths]


def find_data(directory: Path | None, capacity: int) -> Data:
    """Return the real conversations if present, else the demo's."""
    beside = ROOT.parent / "shared" / "data"
    root = directory or Path(os.environ.get("SFTSTREAM_REALDATA") or beside)
    if root.is_dir():
        llama = root / "tokenizers" / "llama3"
        files = tuple(str(path) for path in sorted(root.glob("conversations/*/*")))
        return Data(files, str(llama), str(llama / "chat_template_training.jinja"), capacity)
    if directory:
        raise SystemExit(f"{directory} is no directory")
    demo = ROOT / "examples" / "demo"
    files = tuple(
        str(demo / "data" / name) for name in ("messages.jsonl", "sharegpt.json", "alpaca.jsonl", "pairs.parquet")
    )
    return Data(files, str(demo / "tokenizer"), str(HERE / "demo_tagged.jinja"), capacity)


def accepted(path: str, limit: int, encoder: ChatEncoder) -> Iterator[tuple[Conversation, Example]]:
    """Yield those of a file's first `limit` conversations accepted by the encoder."""
    rows = FileSet(SourceConfig(path=path))
    for row in range(min(len(rows), limit)):
        try:
            conversation = parse_row(rows.read(row))
            (example,) = encoder.encode_conversation(conversation)
        except (BrokenRow, Refused):
            continue
        if len(example.tokens) <= encoder.policy.capacity:
            yield conversation, example


def prepare(data: Data, rows: int, directory: str) -> tuple[Job, Truth]:
    """Write `rows` conversations of all files in random order; return the job and the expected ids
    and masks.

    Every example is compared with the template run on the conversation alone and `tokenizers`, and
    every text with the output of the template with tags.
    """
    quick = ChatEncoder(data.tokenizer, date=DAY, capacity=data.capacity)
    if quick.tokenizer.fast_tokenizer:
        quick.tokenizer.fast_tokenizer.load()
    found = [pair for path in data.files for pair in accepted(path, rows, quick)]
    random.Random(SEED).shuffle(found)
    found = found[:rows]
    texts = verified(found, data)
    tokens = sum(len(example.tokens) for _, example in found)
    job = Job(directory, data.tokenizer, data.tagged, data.capacity, tokens, len(found))
    job.rows.write_bytes(b"".join(msgspec.json.encode(row(conversation)) + b"\n" for conversation, _ in found))
    job.texts.write_bytes(msgspec.json.encode([text.text for text in texts]))
    digests = [digest(example.tokens, example.loss_mask) for _, example in found]
    typed = frozenset(ids for (ids, _), text in zip(digests, texts, strict=True) if text.typed)
    return job, Truth(Counter(digests), typed)


def verified(found: Sequence[tuple[Conversation, Example]], data: Data) -> list[Rendered]:
    """Compare every example with the reference and return the rendered texts."""
    slow = ChatEncoder(data.tokenizer, date=DAY, backend="huggingface")
    tagged = Path(data.tagged).read_text(encoding="utf-8")
    texts = []
    for conversation, example in found:
        rendered, _ = slow.renderer.render_whole(conversation)
        require_same(slow.tokenizer.encode(rendered), example)
        plain = row(conversation)
        printed = slow.tokenizer.hf.apply_chat_template(
            plain["messages"], tools=plain.get("tools"), chat_template=tagged, tokenize=False
        )
        assert printed == rendered.text, f"the template with tags prints {printed!r} for {rendered.text!r}"
        texts.append(rendered)
    return texts


def require_same(reference: Example, example: Example) -> None:
    """Raise AssertionError if ids or mask differ from the reference."""
    assert np.array_equal(example.tokens, reference.tokens)
    assert np.array_equal(example.loss_mask, reference.loss_mask)


def row(conversation: Conversation) -> dict[str, Any]:
    """Return the conversation as a row: the chat template's input without empty fields."""
    messages = [template_message(message) for message in conversation.messages]
    return {"messages": messages} | ({"tools": list(conversation.tools)} if conversation.tools else {})


def digest(tokens: NDArray[Any], mask: NDArray[Any]) -> tuple[bytes, bytes]:
    """Return digests of the ids and of the mask without the first token, never a target."""
    ids = np.ascontiguousarray(tokens, np.int32).tobytes()
    trained = np.ascontiguousarray(mask[1:], bool).tobytes()
    return hashlib.blake2b(ids, digest_size=16).digest(), hashlib.blake2b(trained, digest_size=16).digest()
