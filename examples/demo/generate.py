"""Write the demo's conversations and tokenizer: `python examples/demo/generate.py [directory]`.

The same seed gives the same conversations and the same tokenizer; what it wrote is in the
repository.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import layouts
import vocabulary
from dialogues import FAMILIES, SHARES, draw

from sftstream.records import Conversation
from sftstream.rendering.template import ChatTemplate, template_message

HERE = Path(__file__).parent
SEED = 1
CONVERSATIONS = 9000
HELD_OUT = 40
"""Test questions per family."""


class File(NamedTuple):
    """A layout on disk and its relative share of the conversations."""

    name: str
    layout: Callable[[Conversation], layouts.Row]
    write: Callable[[Path, Sequence[layouts.Row]], None]
    share: int
    holds_tools: bool = True


FILES = (
    File("messages.jsonl", layouts.openai, layouts.write_jsonl, 1),
    File("sharegpt.json", layouts.sharegpt, layouts.write_json, 1),
    File("alpaca.jsonl", layouts.alpaca, layouts.write_jsonl, 1, holds_tools=False),
    File("pairs.parquet", layouts.pair, layouts.write_parquet, 3, holds_tools=False),
)


def main(directory: Path = HERE) -> None:
    """Write `data/` and `tokenizer/` into the directory."""
    rng = Random(SEED)
    families = rng.choices(list(SHARES), list(SHARES.values()), k=CONVERSATIONS)
    trained = [draw(rng, family, held_out=False) for family in families]
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    vocabulary.save(vocabulary.train(_rendered(trained, template)), template, directory / "tokenizer")
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    for file, conversations in _split_counters(rng, trained).items():
        file.write(data / file.name, [file.layout(conversation) for conversation in conversations])
    layouts.write_jsonl(data / "heldout.jsonl", [layouts.openai(conversation) for conversation in _held_out(rng)])


def _split_counters(rng: Random, conversations: Sequence[Conversation]) -> dict[File, list[Conversation]]:
    dealt: dict[File, list[Conversation]] = {file: [] for file in FILES}
    for conversation in conversations:
        files = [file for file in FILES if file.holds_tools or not conversation.tools]
        dealt[rng.choices(files, [file.share for file in files])[0]].append(conversation)
    return dealt


def _held_out(rng: Random) -> list[Conversation]:
    """Return distinct conversations, families in turn."""
    by_family = []
    for family in FAMILIES:
        chosen: list[Conversation] = []
        while len(chosen) < HELD_OUT:
            conversation = draw(rng, family, held_out=True)
            if conversation not in chosen:
                chosen.append(conversation)
        by_family.append(chosen)
    return [conversation for turn in zip(*by_family, strict=True) for conversation in turn]


def _rendered(conversations: Sequence[Conversation], template: str) -> Iterator[str]:
    chat = ChatTemplate(template, {"bos_token": vocabulary.BOS})
    for conversation in conversations:
        yield chat.render([template_message(message) for message in conversation.messages], conversation.tools)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
