"""The conversations that all systems read: one file of JSON lines, their rendered texts, and what must become of them."""

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
from sftstream.records import BrokenRow, Conversation, Example, Rendered
from sftstream.rendering.template import template_message
from sftstream.sources import FileSet

HERE = Path(__file__).resolve().parent
DAY = "2024-07-26"
"""What Llama 3.1's template prints where it is not told the day, as peers do not tell it."""
SEED = 0


class Truth(NamedTuple):
    """What must become of the rows."""

    digests: Counter[tuple[bytes, bytes]]
    """How often a pair of ids and loss mask occurs, each as a digest."""
    typed: frozenset[bytes]
    """Digests of the ids of conversations in which somebody typed a special token's text: words to us, a token to others."""


class Data(msgspec.Struct, frozen=True):
    """Where conversations, tokenizer and chat template lie."""

    files: tuple[str, ...]
    tokenizer: str
    tagged: str
    """A template that prints the same text, with `{% generation %}` around what the assistant says."""
    capacity: int


class Job(msgspec.Struct, frozen=True):
    """What each system is given. All of it lies in one directory, which is deleted in the end."""

    directory: str
    tokenizer: str
    tagged: str
    capacity: int
    tokens: int
    """Of all rows."""
    conversations: int
    workers: int = 0
    backend: str = "auto"
    once: bool = False
    """Read all rows once and stop."""
    patience: float = 6.0
    """Seconds that workers are given to settle before they are measured; a third of it is the least that is measured of a run
    that goes on. 0 for a trial."""
    here: bool = False
    """In one process, for a trial."""

    @property
    def rows(self) -> Path:
        """JSON lines with `messages`, and `tools` where there are any."""
        return Path(self.directory) / "rows.jsonl"

    @property
    def texts(self) -> Path:
        """The same as the chat template prints them: a JSON list."""
        return Path(self.directory) / "texts.json"

    def parts(self, count: int) -> list[str]:
        """The rows dealt out to as many files, for systems whose workers share files and not rows."""
        lines = self.rows.read_bytes().splitlines(keepends=True)
        paths = [Path(self.directory) / f"part{part}of{count}.jsonl" for part in range(count)]
        for part, path in enumerate(paths):
            path.write_bytes(b"".join(lines[part::count]))
        return [str(path) for path in paths]


def find_data(directory: Path | None, capacity: int) -> Data:
    """Real conversations where there are any, else those of the demo."""
    beside = HERE.parents[1] / "shared" / "data"
    root = directory or Path(os.environ.get("SFTSTREAM_REALDATA") or beside)
    if root.is_dir():
        llama = root / "tokenizers" / "llama3"
        files = tuple(str(path) for path in sorted(root.glob("conversations/*/*")))
        return Data(files, str(llama), str(llama / "chat_template_training.jinja"), capacity)
    if directory:
        raise SystemExit(f"{directory} is no directory")
    demo = HERE.parent / "examples" / "demo"
    files = tuple(
        str(demo / "data" / name) for name in ("messages.jsonl", "sharegpt.json", "alpaca.jsonl", "pairs.parquet")
    )
    return Data(files, str(demo / "tokenizer"), str(HERE / "demo_tagged.jinja"), capacity)


def accepted(path: str, limit: int, encoder: ChatEncoder) -> Iterator[tuple[Conversation, Example]]:
    """The first of a file's conversations that the encoder takes."""
    rows = FileSet(SourceConfig(path=path))
    for row in range(min(len(rows), limit)):
        try:
            conversation = parse_row(rows.read(row))
            (example,) = encoder.tokenize(encoder.render_conversation(conversation))
        except (BrokenRow, Refused):
            continue
        if len(example.tokens) <= encoder.policy.capacity:
            yield conversation, example


def prepare(data: Data, rows: int, directory: str) -> tuple[Job, Truth]:
    """Some of all files' conversations in any order, written down; and what our encoder makes of them.

    Each is compared with the template run on it and `tokenizers`; and its text with that of the template with tags.
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
    """The texts, every example having been compared with the reference."""
    slow = ChatEncoder(data.tokenizer, date=DAY, backend="huggingface")
    tagged = Path(data.tagged).read_text(encoding="utf-8")
    texts = []
    for conversation, example in found:
        rendered, _ = slow.render_whole(conversation)
        require_same(slow.tokenizer.encode(rendered), example)
        plain = row(conversation)
        printed = slow.tokenizer.hf.apply_chat_template(
            plain["messages"], tools=plain.get("tools"), chat_template=tagged, tokenize=False
        )
        assert printed == rendered.text, f"the template with tags prints {printed!r} for {rendered.text!r}"
        texts.append(rendered)
    return texts


def require_same(reference: Example, example: Example) -> None:
    """AssertionError where ids or mask are not those of the reference."""
    assert np.array_equal(example.tokens, reference.tokens)
    assert np.array_equal(example.loss_mask, reference.loss_mask)


def row(conversation: Conversation) -> dict[str, Any]:
    """As a file holds it: what the chat template is given, without empty fields."""
    messages = [template_message(message) for message in conversation.messages]
    return {"messages": messages} | ({"tools": list(conversation.tools)} if conversation.tools else {})


def digest(tokens: NDArray[Any], mask: NDArray[Any]) -> tuple[bytes, bytes]:
    """Of the ids; of the mask but for the first token, which follows nothing."""
    ids = np.ascontiguousarray(tokens, np.int32).tobytes()
    trained = np.ascontiguousarray(mask[1:], bool).tobytes()
    return hashlib.blake2b(ids, digest_size=16).digest(), hashlib.blake2b(trained, digest_size=16).digest()
