"""The page of errors shows the messages in the code, and each message says how to go on."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

GENERATOR = runpy.run_path(str(Path(__file__).resolve().parents[1] / "docs/generate_errors.py"))


def test_the_page_of_errors_is_generated_from_the_messages_in_the_code() -> None:
    assert GENERATOR["TARGET"].read_text(encoding="utf-8") == GENERATOR["page"](), "run `make docs`"


def test_every_message_names_a_remedy_or_a_limit() -> None:
    messages = GENERATOR["messages"]()
    assert len(messages) > 400
    assert [message for message in messages if not message.has_remedy] == []


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("the file is gone; restore the file", "restore the file"),
        ("source <path> is remote: to read it twice, leave out streaming", "to read it twice, leave out streaming"),
        ("the data changed. Restore them, or start a new run", "Restore them, or start a new run"),
        ("no such step; <remedy>", "<remedy>"),
        ("the file cannot be read: <error>", ""),
        ("the file is used by others; nothing was written", ""),
        ("restore is not the name of a verb", ""),
    ],
)
def test_a_remedy_begins_with_an_instruction(text: str, remedy: str) -> None:
    message = GENERATOR["Message"]("ValueError", text, "a.py")
    assert message.parts[1] == remedy
    assert message.has_remedy == bool(remedy)
