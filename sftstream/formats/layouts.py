"""The known layouts of rows, and the messages of a row in each layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.formats.fields import Row, decoded, is_list, refuse_deep, require_text
from sftstream.formats.messages import parse_turns, system_message
from sftstream.records import Message, Refused, Role


def parse_layout(row: Row) -> tuple[Message, ...]:
    """Return the messages of a row; raises Refused if the columns match no layout."""
    refuse_deep(row)
    layout = _layout(tuple(key for key, value in row.items() if value is not None))
    if layout is None:
        known = " | ".join("+".join(keys) for keys, _ in LAYOUTS)
        raise Refused("unknown layout", f"columns {sorted(map(str, row))} match none of {known}")
    return tuple(layout(row))


@lru_cache(maxsize=4096)
def _layout(columns: tuple[Any, ...]) -> Callable[[Row], Iterable[Message]] | None:
    return next((layout for keys, layout in LAYOUTS if all(key in columns for key in keys)), None)


def _present(row: Row, key: str) -> bool:
    return row.get(key) is not None


def _openai(row: Row) -> Iterable[Message]:
    """Read `messages`: role/content as in the OpenAI API, or from/value."""
    return parse_turns(row, "messages")


def _sharegpt(row: Row) -> Iterable[Message]:
    """Read `conversations`: from/value, or role/content; the system prompt may have a column."""
    return parse_turns(row, "conversations")


def _rounds(row: Row) -> Iterable[Message]:
    """Read `conversation`: pairs of input and output with optional system prompts, or messages."""
    rounds = decoded(row["conversation"])
    if not is_list(rounds) or not all(isinstance(pair, Mapping) and "input" in pair for pair in rounds):
        yield from parse_turns(row, "conversation")
        return
    yield from system_message(row)
    for index, pair in enumerate(rounds):
        yield from system_message(pair)
        yield Message("user", require_text(pair["input"], f"conversation[{index}].input"))
        yield Message("assistant", require_text(pair.get("output"), f"conversation[{index}].output"))


def _by_turns(row: Row) -> Iterable[Message]:
    """Read `data`: texts of the user and the assistant in turn, as first published by UltraChat."""
    texts = decoded(row["data"])
    if not is_list(texts):
        raise Refused("bad messages", f"data is a {type(texts).__name__}, not a list of texts")
    yield from system_message(row)
    for index, text in enumerate(texts):
        yield Message(("user", "assistant")[index % 2], require_text(text, f"data[{index}]"))


def _alpaca(row: Row) -> Iterable[Message]:
    """Read `instruction` with `output` or `response`, and optional `input`, `system`, `history`.

    `history` holds [question, answer] pairs from before the instruction.
    """
    yield from system_message(row)
    history = row.get("history") or []
    for pair in history if is_list(history) else [history]:
        if not is_list(pair) or len(pair) != 2:
            raise Refused("bad history", f"{excerpt(pair)} is not a pair of question and answer")
        yield Message("user", require_text(pair[0], "history"))
        yield Message("assistant", require_text(pair[1], "history"))
    question = require_text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + require_text(row["input"], "input")
    yield Message("user", question)
    answer = "output" if _present(row, "output") else "response"
    yield Message("assistant", require_text(row[answer], answer))


def _pair(question: str, answer: str) -> Callable[[Row], Iterable[Message]]:
    """Return a layout of two columns, each of text or of messages."""

    columns: tuple[tuple[str, Role], ...] = ((question, "user"), (answer, "assistant"))

    def layout(row: Row) -> Iterable[Message]:
        yield from system_message(row)
        for column, role in columns:
            if isinstance(row[column], str):
                yield Message(role, row[column])
            else:
                yield from parse_turns({column: row[column]}, column)

    return layout


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Row], Iterable[Message]]], ...] = (
    (("messages",), _openai),
    (("conversations",), _sharegpt),
    (("conversation",), _rounds),
    (("instruction", "output"), _alpaca),
    (("instruction", "response"), _alpaca),
    (("prompt", "completion"), _pair("prompt", "completion")),
    (("prompt", "response"), _pair("prompt", "response")),
    (("question", "answer"), _pair("question", "answer")),
    (("data",), _by_turns),
)
"""Required columns -> reader of the row; the first match counts."""
