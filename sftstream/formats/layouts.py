"""The known layouts, and a reader for the rows of each layout.

The row `{"instruction": "hi", "output": "hello"}` matches the layout "instruction" with an answer;
`_alpaca` reads the row and yields Message("user", "hi") and Message("assistant", "hello").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from sftstream.config import RowSettings
from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import MARKS, parse_train
from sftstream.formats.fields import ANSWERS, QUESTIONS, SYSTEM, Row, decoded, is_list, refuse_deep, without_ignored
from sftstream.formats.keys import require_read
from sftstream.formats.messages import (
    ignored_keys,
    parse_texts,
    parse_turns,
    question_and_answer,
    same_words,
    system_message,
)
from sftstream.formats.roles import known_roles
from sftstream.formats.spelled import require_words, turns_in
from sftstream.formats.thoughts import without_thought
from sftstream.records import REASONING_KEYS, Message, Refused

DEFAULT = RowSettings()
CONTEXT = ("input", "context")
"""Names of a column with the text that an instruction is about; the first with a value is read."""

MODES = frozenset(
    {"", "on", "off", "true", "false", "yes", "no", "0", "1", "none", "null", "auto", "default", "enabled", "disabled"}
    | {"minimal", "low", "medium", "high", "thinking", "non-thinking", "think", "no_think", "/think", "/no_think"}
    | {"thinking on", "thinking off", "detailed thinking on", "detailed thinking off"}
)
"""Values of a column of reasoning, in small letters, that are no reasoning: most tell how much to
reason."""

ROUND_KEYS = frozenset({"input", "output", *SYSTEM, *MARKS})
"""Keys of a round that are read."""


class Layout(NamedTuple):
    """A layout: the names of its columns, and the reader of a row.

    Columns are lists of alternative names: `required = (("prompt", "question"), ("answer",))` fits
    a row with the columns "prompt" and "answer", and a row with "question" and "answer".
    """

    required: tuple[tuple[str, ...], ...]
    """Columns that a row must have, each with its alternative names."""
    optional: tuple[tuple[str, ...], ...]
    """Columns that a row may have, each with alternative names; the first with a value is read."""
    read: Callable[[Row, RowSettings], Iterable[Message]]
    """Function that returns the messages of a row."""

    def __str__(self) -> str:
        return " + ".join("/".join(names) for names in self.required)


def find_layout(row: Row) -> Layout:
    """Return the first layout that the columns of a row match; raises Refused without a match."""
    layout = _layout(tuple(key for key, value in row.items() if value is not None))
    if layout is None:
        empty = sorted(str(column) for column, value in row.items() if value is None)
        raise Refused(
            "unknown layout",
            f"columns {sorted(map(str, row))}{f', of which {empty} have no value,' if empty else ''} match none of "
            f"{' | '.join(map(str, LAYOUTS))}{_advice(row)}",
        )
    return layout


def has_layout(row: Row) -> bool:
    """Return True if the columns of a row match a layout."""
    return _layout(tuple(key for key, value in row.items() if value is not None)) is not None


def columns_read(row: Row, layout: Layout) -> set[str]:
    """Return the names of the row's columns that the layout reads."""
    required = {_present(row, names) for names in layout.required}
    optional = {_valued(row, names) for names in (*layout.optional, SYSTEM)}
    return {name for name in required | optional if name is not None}


def parse_layout(row: Row, settings: RowSettings = DEFAULT) -> tuple[Message, ...]:
    """Return the messages of a row; raises Refused if the columns match no layout."""
    refuse_deep(row)
    messages = tuple(find_layout(row).read(row, settings))
    if len(messages) > 1 and messages[0].role == "system" and same_words(*messages[:2]) and _valued(row, SYSTEM):
        return messages[1:]  # a column repeats the system prompt of the turns
    return messages


def is_mode(value: Any) -> bool:
    """Return True for a value in a column of reasoning that is no reasoning, such as "off"."""
    return str(value).strip().lower() in MODES


def _advice(row: Row) -> str:
    if row.get("text") is None and row.get("input_ids") is None:
        return "; columns = {...} of the source reads columns under these names"
    return "; verified = false of the source trains plain text or token ids, of which nothing can be proved"


@lru_cache(maxsize=4096)
def _layout(columns: tuple[Any, ...]) -> Layout | None:
    def fits(layout: Layout) -> bool:
        return all(any(name in columns for name in names) for names in layout.required)

    return next(filter(fits, LAYOUTS), None)


def _present(row: Row, names: tuple[str, ...]) -> str | None:
    for name in names:
        if row.get(name) is not None:
            return name
    return None


def _valued(row: Row, names: tuple[str, ...]) -> str | None:
    for name in names:
        if row.get(name):
            return name
    return None


def _column_of_turns(column: str) -> Callable[[Row, RowSettings], Iterator[Message]]:
    """Return a reader for a column of turns.

    A turn is an object with role and content (or from and value). A list of texts is read too: the
    texts belong to the user and the assistant in turn.
    """

    def read(row: Row, settings: RowSettings) -> Iterator[Message]:
        turns = decoded(row[column])
        yield from system_message(row, settings)
        yield from parse_texts(turns, column, settings) if _is_texts(turns) else parse_turns(turns, column, settings)

    return read


def _is_texts(turns: Any) -> bool:
    return (
        is_list(turns)
        and bool(turns)
        and isinstance(turns[0], str)
        and all(isinstance(turn, str) for turn in turns)
        and not any(isinstance(decoded(turn), Mapping) for turn in turns)
    )


def _rounds(row: Row, settings: RowSettings) -> Iterator[Message]:
    """Read the column `conversation`: a list of rounds, or a list of turns.

    A round is an input with an output, and perhaps a system prompt:
    `{"system": "Be brief.", "input": "hi", "output": "hello"}`. A mark trains or excludes the
    output.
    """
    rounds = decoded(row["conversation"])
    if not is_rounds(rounds):
        yield from _column_of_turns("conversation")(row, settings)
        return
    yield from system_message(row, settings)
    roles = known_roles(settings)
    for index, given in enumerate(rounds):
        path = f"conversation[{index}]"
        pair = without_ignored(given, ignored_keys(settings.ignore))
        require_read(pair, ROUND_KEYS, path)
        yield from system_message(pair, settings)
        yield Message("user", require_words(pair.get("input"), f"{path}.input", roles))
        answer = require_words(pair.get("output"), f"{path}.output", roles)
        yield Message("assistant", answer, train=parse_train(pair, path))


def is_rounds(value: Any) -> bool:
    """Return True for a list of rounds, each an object with an input."""
    return is_list(value) and all(isinstance(pair, Mapping) and "input" in pair for pair in value)


def _by_turns(row: Row, settings: RowSettings) -> Iterator[Message]:
    """Read the column `data`, as in the first UltraChat: texts of user and assistant in turn."""
    texts = decoded(row["data"])
    if not is_list(texts):
        raise Refused("bad messages", f"data is a {type(texts).__name__}, not a list of texts")
    yield from system_message(row, settings)
    yield from parse_texts(texts, "data", settings)


def _alpaca(row: Row, settings: RowSettings) -> Iterator[Message]:
    """Read `instruction` with an answer; `input` or `context`, `system`, `history` are optional."""
    yield from system_message(row, settings)
    yield from _history(row.get("history"), settings)
    roles = known_roles(settings)
    question = require_words(row["instruction"], "instruction", roles)
    if column := _valued(row, CONTEXT):
        question += "\n\n" + require_words(row[column], column, roles)
    yield Message("user", question)
    answer = _present(row, _ALPACA_ANSWERS)
    assert answer is not None
    yield from _reasoned((Message("assistant", require_words(row[answer], answer, roles)),), row)


def _reasoned(answered: tuple[Message, ...], row: Row) -> tuple[Message, ...]:
    """Return the messages of an answer, with the column of reasoning in the assistant's message.

    A thought that begins the answer and is also in the column is read once. Raises Refused
    if the two differ, or if the answer has several messages of the assistant.
    """
    columns = {
        name: row[name]
        for name in REASONING_KEYS
        if row.get(name) and not is_mode(row[name]) and not isinstance(row[name], int | float)  # a number is a score
    }
    if not columns:
        return answered
    thoughts = {name: require_words(value, name) for name, value in columns.items()}
    column, reasoning = next(iter(thoughts.items()))
    answers = [message for message in answered if message.role == "assistant"]
    if len(answers) == 1 and answers[0].reasoning:
        thoughts["the answer's reasoning"] = answers[0].reasoning
    if len(answers) != 1 or len({thought.strip() for thought in thoughts.values()}) > 1:
        raise Refused(
            "two contents",
            f"the reasoning in column {column!r} is not that of one answer: {excerpt(reasoning)}, beside {len(answers)} "
            f"messages of the assistant and thoughts in {[*thoughts][1:]}; leave the column out by ignore = [{column!r}], "
            "or out of columns",
        )
    if answers[0].reasoning:
        return answered
    text = answers[0].content
    if text:
        text = without_thought(text, reasoning, "the answer", repr(column))
    said = msgspec.structs.replace(answers[0], content=text, reasoning=reasoning)
    return tuple(said if message is answers[0] else message for message in answered)


def _history(history: Any, settings: RowSettings) -> Iterator[Message]:
    """Read the column `history`, the conversation before the question.

    `history` is a list of turns, an object of lists, or a list of pairs:
    `[["hi", "hello"], ["and?", "well"]]`.
    """
    history = decoded(history)
    if not history:
        return
    if isinstance(history, Mapping) or (
        is_list(history) and any(isinstance(decoded(turn), Mapping) for turn in history)
    ):
        yield from parse_turns(history, "history", settings)
        return
    for pair in history if is_list(history) else [history]:
        texts = decoded(pair)
        if not is_list(texts) or len(texts) != 2:
            raise Refused(
                "bad history", f"{excerpt(pair)} is not a pair of question and answer; write [question, answer]"
            )
        yield from parse_texts(texts, "history", settings)


def _pair(row: Row, settings: RowSettings) -> Iterator[Message]:
    """Read a question and an answer, each a text or a list of turns, and an optional `history`."""
    question, answer = _present(row, QUESTIONS), _present(row, ANSWERS)
    assert question is not None
    assert answer is not None
    asked = tuple(_side(row[question], question, Message("user", ""), settings))
    answered = tuple(_side(row[answer], answer, Message("assistant", ""), settings))
    yield from system_message(row, settings)
    yield from _history(row.get("history"), settings)
    yield from question_and_answer(asked, _reasoned(answered, row))


def _side(value: Any, column: str, empty: Message, settings: RowSettings) -> Iterator[Message]:
    """Yield the messages of a question or an answer; a text becomes a message of `empty.role`."""
    turns = turns_in(value, column, known_roles(settings)) if isinstance(value, str) else value
    if turns is None:
        yield Message(empty.role, value)
    else:
        yield from parse_turns(turns, column, settings)


_ALPACA_ANSWERS = ("output", "response", "answer", "completion", "chosen")

LAYOUTS: tuple[Layout, ...] = (
    Layout((("messages",),), (), _column_of_turns("messages")),
    Layout((("conversations",),), (), _column_of_turns("conversations")),
    Layout((("conversation",),), (), _rounds),
    Layout((("instruction",), _ALPACA_ANSWERS), (CONTEXT, ("history",), REASONING_KEYS), _alpaca),
    Layout((QUESTIONS, ANSWERS), (("history",), REASONING_KEYS), _pair),
    Layout((("data",),), (), _by_turns),
)
"""The known layouts; a row is read by the first layout that matches."""
