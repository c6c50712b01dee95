"""One conversation through template and tokenizer: the door that the stream and its users share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date as Date
from pathlib import Path
from typing import Any

from sftstream.formats import conversation
from sftstream.records import Conversation, Example, Rendered
from sftstream.template import ChatTemplate
from sftstream.tokenizer import Tokenizer


class ChatEncoder:
    """Conversations -> tokens and loss masks, each verified or refused.

    `tokenizer` is a Hugging Face directory or hub name; `template` a Jinja file's path or text, by default the
    tokenizer's own; `date` (YYYY-MM-DD) is what the template prints as today.
    """

    def __init__(self, tokenizer: str, template: str | None = None, date: str | None = None) -> None:
        self.tokenizer = Tokenizer(tokenizer)
        text = _template_text(template) if template is not None else self.tokenizer.hf.chat_template
        if not isinstance(text, str):
            raise ValueError(
                f'tokenizer {tokenizer!r} has no chat template; name one: template = "chat_template.jinja"'
            )
        self.template = ChatTemplate(
            text, self.tokenizer.special_tokens, self.tokenizer.control_tokens, _parse_date(date) if date else None
        )

    @property
    def stop_ids(self) -> list[int]:
        """The tokens with which the assistant ends a turn."""
        return sorted(self.tokenizer.hf.convert_tokens_to_ids(sorted(self.template.stop_tokens)))

    def encode(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Example]:
        """Examples of one dialogue in any known spelling of messages; raises `Refused`."""
        return [self.tokenize(self.render(conversation({"messages": list(messages), "tools": tools})))]

    def render(self, dialogue: Conversation) -> Rendered:
        """Text and trained spans; raises `Refused`."""
        return self.template.rendered(dialogue)

    def tokenize(self, rendered: Rendered) -> Example:
        """Tokens and loss mask; raises `Refused`."""
        return self.tokenizer.encode(rendered)


def _template_text(template: str) -> str:
    if "{%" in template or "{{" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"chat template {template!r} cannot be read: {error.strerror}; give a file or the Jinja text"
        ) from None


def _parse_date(date: str) -> Date:
    try:
        return Date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"date = {date!r} is no day; write it as YYYY-MM-DD") from None
