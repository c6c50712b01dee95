"""The page on data lists every layout, every name that is read, and an example of each reader."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from sftstream import Conversation, Message, Refused, ToolCall
from sftstream.config import RowSettings
from sftstream.formats import LAYOUTS, ROLES, Unverified, exclusions, keys, parse_row, parse_unverified, parts, tools
from sftstream.formats import layouts as layouts_file
from sftstream.formats.fields import SYSTEM, TOOLS
from sftstream.formats.harmony import CHANNELS, HARMONY
from sftstream.formats.items import ITEMS
from sftstream.formats.unread import VARIABLES
from sftstream.records import REASONING_KEYS, ToolCalls

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("\n## Layouts\n") : PAGE.index("\n## Order and mixing\n")]
SAID = Conversation((Message("user", "hi"), Message("assistant", "hello")))
NO_READERS = {
    "spelling",
    "_is_unclear",
    "_seems_mark",
    "__str__",
    "_column_of_turns",
    "_layout",
    "fits",
    "_advice",
    "columns_read",
    "unread_keys",
    "ignored_keys",
}
"""Functions that choose a reader, or name the columns that are not read."""
READERS = ("layouts", "messages", "items", "harmony", "thoughts", "parts", "tools", "keys", "exclusions", "unverified")


class Written(msgspec.Struct, forbid_unknown_fields=True):
    """The second line of an example: a conversation, or a row without turns, in the names of the records."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    variables: dict[str, Any] = {}
    text: str | None = None
    ids: tuple[int, ...] = ()
    trained: tuple[bool, ...] = ()

    def expected(self) -> Conversation | Unverified:
        if self.messages:
            return Conversation(self.messages, self.tools, self.variables)
        return Unverified(self.text) if self.text else Unverified(None, list(self.ids), list(self.trained))


def calls(_type: type, value: Any) -> ToolCalls:
    return ToolCalls(msgspec.convert(value, list[ToolCall]))


def rows_of_the_table() -> list[bytes]:
    return [row.encode() for row in re.findall(r"^\| [^|]+ \| `(\{.*\})` \|$", SECTION, re.MULTILINE)]


def pairs() -> list[tuple[bytes, Conversation | Unverified]]:
    """Return each example of the page with the conversation that is written below it."""
    found: list[tuple[bytes, Conversation | Unverified]] = []
    for block in re.findall(r"```json\n(.*?)```", SECTION, re.DOTALL):
        for pair in block.strip().split("\n\n"):
            row, written = pair.split("\n")
            found.append((row.encode(), msgspec.json.decode(written, type=Written, dec_hook=calls).expected()))
    return found


def parsed(row: bytes | dict[str, Any], settings: RowSettings) -> Conversation | Unverified:
    return (None if settings.verified else parse_unverified(row, settings)) or parse_row(row, settings)


def settings_of(expected: Conversation | Unverified) -> RowSettings:
    return RowSettings(verified=isinstance(expected, Conversation))


EXAMPLES = [*((row, SAID) for row in rows_of_the_table()), *pairs()]


@pytest.mark.parametrize(("row", "expected"), EXAMPLES, ids=[row.decode()[:40] for row, _ in EXAMPLES])
def test_an_example_of_the_page_gives_the_conversation_below_it(
    row: bytes, expected: Conversation | Unverified
) -> None:
    settings = settings_of(expected)
    assert parsed(row, settings) == expected
    assert parsed(msgspec.json.decode(row), settings) == expected  # as from a table


def test_rows_without_turns_are_refused_unless_the_source_says_so() -> None:
    rows = [row for row, expected in EXAMPLES if isinstance(expected, Unverified)]
    assert len(rows) == 3
    for row in rows:
        with pytest.raises(Refused, match="verified = false of the source"):
            parse_row(row)


def test_every_layout_has_an_example() -> None:
    columns = [set(msgspec.json.decode(row)) for row, _ in EXAMPLES]
    without = [
        str(layout)
        for number, layout in enumerate(LAYOUTS)
        if not any(next(filter(fits(own), range(len(LAYOUTS))), None) == number for own in columns)
    ]
    assert without == []


def fits(columns: set[str]) -> Any:
    return lambda number: all(columns.intersection(names) for names in LAYOUTS[number].required)


def test_every_name_that_is_read_is_on_the_page() -> None:
    columns = [name for layout in LAYOUTS for names in (*layout.required, *layout.optional) for name in names]
    names = {*columns, *SYSTEM, *TOOLS, VARIABLES, *ROLES, *REASONING_KEYS, *ITEMS, *exclusions.MARKS}
    names |= {*layouts_file.CONTEXT, *keys.CONTENT, *parts._TEXT, *parts._REASONING, *keys.ARGUMENTS, *tools.PARAMETERS}
    names |= {*HARMONY, *CHANNELS}
    quoted = set(re.findall(r"`(\w+)`", SECTION)) | set(re.findall(r'"(\w+)":', SECTION))
    assert names - quoted == set()


def functions_defined() -> set[tuple[str, str]]:
    """Return (file, name) of each function that reads a part of a row."""
    return {
        (name, node.name)
        for name in READERS
        for node in ast.walk(ast.parse((ROOT / "sftstream" / "formats" / f"{name}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name not in NO_READERS
    }


def test_every_reader_reads_an_example_of_the_page() -> None:
    """A new layout, a new kind of part or a new spelling has a function, and so needs an example on the page."""
    called: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent.name == "formats":
            called.add((path.stem, frame.f_code.co_name))

    sys.setprofile(note)
    try:
        for row, expected in EXAMPLES:
            for stored in (row, msgspec.json.decode(row)):
                parsed(stored, settings_of(expected))
    finally:
        sys.setprofile(None)
    assert functions_defined() - called == set()
