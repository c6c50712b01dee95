"""Conversation -> Examples: render, tokenize, and shorten conversations longer than a pack."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import date as Date
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sftstream.config import Policy
from sftstream.door import Door
from sftstream.excerpt import excerpt
from sftstream.formats import parse_row
from sftstream.records import Conversation, Example, Refused, Rendered
from sftstream.regular_files import require_files
from sftstream.rendering.probe import TemplateReport
from sftstream.rendering.renderer import RenderedConversation, Renderer
from sftstream.rendering.template import LONGEST, ChatTemplate
from sftstream.tokenization.overflow import shorten
from sftstream.tokenization.saved_tokenizer import SavedTokenizer
from sftstream.tokenization.tokenizer import Backend, Tokenizer
from sftstream.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = "name:"
"""Prefix of a template given by the name that it has in the tokenizer: "name:tool_use"."""
_LONGEST_PATH = 4096
"""Characters of a template's path in a message: as many as the path of a file has on Linux."""


class ChatEncoder:
    """Encodes conversations to tokens and verified loss masks, or refuses them.

    `tokenizer` is a tokenizer of transformers, its directory, or its hub name.

    `template` is one of: the path of a file with a Jinja chat template; the Jinja text itself;
    `name:` followed by the name of a template in the tokenizer. Default: the tokenizer's own
    template.

    `date` (YYYY-MM-DD) is the date that templates print as today's. Default: today.

    `variables` are further variables of the template: `{"enable_thinking": False}`.

    `backend` names the library that computes the token ids, as in `Tokenizer`.

    `template_setting` returns the setting of a template that an error advises, such as
    "--template chat.jinja". Default: `template = "chat.jinja"`, the key of a config.

    `policy_fields` are fields of `Policy`, which are also keys of the `[data]` table:
    `ChatEncoder("model", overflow="split")`. A complete `policy` replaces `train_on` and
    `policy_fields`.

    Raises ValueError if no conversation can be trained on with the template.
    """

    def __init__(
        self,
        tokenizer: str | PathLike[str] | PreTrainedTokenizerBase,
        template: str | None = None,
        train_on: Sequence[str] = ("assistant",),
        date: str | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        policy: Policy | None = None,
        backend: Backend = "auto",
        template_setting: Callable[[str], str] | None = None,
        **policy_fields: Any,
    ) -> None:
        self.policy = policy or msgspec.convert({"train_on": list(train_on), **policy_fields}, Policy)
        self.tokenizer = Tokenizer(tokenizer, backend)
        vocabulary = self.tokenizer.vocabulary
        remedy = _remedy(vocabulary, template_setting)
        text = _template_text(template, vocabulary, remedy) if template is not None else vocabulary.template
        if text is None:
            raise ValueError(f"tokenizer {self.tokenizer.name!r} has no chat template; {remedy}")
        day = _parse_date(date) if date else None
        try:
            chat_template = ChatTemplate(text, vocabulary.variables, day).with_variables(variables or {})
            self.renderer = Renderer(chat_template, self.policy, vocabulary.special, self.tokenizer.control)
        except ValueError as error:
            raise ValueError(f"{_template_name(template, self.tokenizer.name)}{error}") from error

    @property
    def template(self) -> ChatTemplate:
        """The chat template; its `date` is printed as today's date."""
        return self.renderer.template

    @property
    def report(self) -> TemplateReport:
        """The report on the template: the turn format, and how each probe is printed."""
        return self.renderer.report

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that end an assistant's turn, in ascending order."""
        turn_format = self.report.turn_format
        return sorted({self.tokenizer.ids(stop)[-1] for stop in turn_format.stops + turn_format.call_stops})

    def saved_tokenizer(self) -> SavedTokenizer:
        """Return the tokenizer with the chat template of this encoder, as transformers saves it."""
        return self.tokenizer.saved(self.template.text)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[Example]:
        """Return the examples of messages in any known layout; raises `Refused`.

        `variables` are variables of the template for this conversation alone.

        There is a single example, unless `history` is "per_turn" or `overflow` is "split".
        """
        return self.encode_conversation(
            parse_row({"messages": list(messages), "tools": tools, "chat_template_kwargs": variables})
        )

    def encode_conversation(self, conversation: Conversation) -> list[Example]:
        """Return the examples of a conversation; raises `Refused`."""
        (examples,) = self.tokenize_all([self.renderer.render_conversation(conversation)])
        if isinstance(examples, Refused):
            raise examples
        return examples

    def render(self, conversation: Conversation) -> Rendered:
        """Return the text and the trained spans of a conversation; raises `Refused`."""
        return self.renderer.render(conversation)

    def tokenize_all(self, rendered: Sequence[RenderedConversation]) -> list[list[Example] | Refused]:
        """Return the examples, or the refusal, of each conversation.

        A conversation longer than `policy.capacity` is shortened if `policy.overflow` says so.
        """
        texts = [text for conversation in rendered for text in conversation.texts]
        encoded = self.tokenizer.encode_all(texts, self._stops)
        if len(encoded) == len(rendered):
            # The common case: each conversation has one text.
            examples = [example if isinstance(example, Refused) else [example] for example in encoded]
        else:
            remaining = iter(encoded)
            examples = [_examples_of([next(remaining) for _ in conversation.texts]) for conversation in rendered]
        if self.policy.overflow == "drop":
            return examples
        return [self._shortened(*pair) for pair in zip(rendered, examples, strict=True)]

    def _shortened(self, rendered: RenderedConversation, examples: list[Example] | Refused) -> list[Example] | Refused:
        """Replace an example longer than the capacity by examples that fit.

        If a conversation has several examples, one for each trained message, none is shortened; the
        packer drops examples that are too long.
        """
        if isinstance(examples, Refused) or len(examples) > 1 or len(examples[0].tokens) <= self.policy.capacity:
            return examples
        try:
            borders = self.borders(rendered.conversation)
            return shorten(rendered.conversation, self.policy, self.encode_part, borders)
        except Refused as refused:
            return refused

    def borders(self, conversation: Conversation) -> list[int]:
        """Return for each message the number of tokens up to the end of the last turn so far."""
        rendered, turns = self.renderer.render_whole(conversation)
        ends = {turn.message: turn.span.end for turn in turns}
        at, borders = 0, [0]
        for index in range(len(conversation.messages)):
            end = max(at, ends.get(index, at))
            borders.append(borders[-1] + len(self.tokenizer.ids(rendered.text[at:end])))
            at = end
        return borders[1:]

    def encode_part(self, conversation: Conversation) -> Example:
        """Return the example of a conversation as one text, however long; raises `Refused`."""
        return self.tokenizer.encode(self.render(conversation), self._stops)

    @property
    def _stops(self) -> tuple[str, ...]:
        return self.report.turn_format.stops + self.report.turn_format.call_stops


def _examples_of(encoded: Sequence[Example | Refused]) -> list[Example] | Refused:
    """Return the examples of a conversation's texts, or the first refusal among the texts.

    Several examples get the note "examples of single turns".
    """
    examples = []
    for example in encoded:
        if isinstance(example, Refused):
            return example
        examples.append(example)
    if len(examples) == 1:
        return examples
    return [msgspec.structs.replace(e, notes={**e.notes, "examples of single turns": 1}) for e in examples]


def _template_text(template: str, vocabulary: Vocabulary, remedy: str) -> str:
    """Return the Jinja text of a template.

    `template` is the text itself, a name in the tokenizer ("name:tool_use"), or the path of a file.
    Raises ValueError, with `remedy`, if the tokenizer has no template of the name; also if the file
    cannot be read.
    """
    if _is_jinja(template):
        return template
    if template.startswith(_NAMED):
        text = vocabulary.templates.get(template.removeprefix(_NAMED))
        if text is None:
            raise ValueError(f"the tokenizer has no chat template {template!r}; {remedy}")
        return text
    try:
        name = excerpt(template, _LONGEST_PATH)
        with Door(f"chat template {name} cannot be read"):
            path = Path(os.path.expanduser(template))
            require_files([path])
            with path.open(encoding="utf-8") as file:
                return file.read(LONGEST + 1)  # of a longer template, ChatTemplate refuses the beginning
    except ValueError as error:
        raise ValueError(f"{error}; give a file or the Jinja text") from error


def _template_name(template: str | None, tokenizer: str) -> str:
    """Return the file of a template as the beginning of a message; "" for a Jinja text."""
    if template is None or template.startswith(_NAMED):
        return f"tokenizer {tokenizer!r}: "
    return "" if _is_jinja(template) else f"chat template {template!r}: "


def _is_jinja(template: str) -> bool:
    return "{%" in template or "{{" in template


def _remedy(vocabulary: Vocabulary, setting: Callable[[str], str] | None) -> str:
    form = setting or 'template = "{}"'.format
    names = ", ".join(form(f"{_NAMED}{name}") for name in vocabulary.templates)
    given = f"one of {names}" if names else f"the path of a file: {form('chat.jinja')}"
    return f"give {given}" + ("" if setting else ", in a config under [data.tokenizer]")


def _parse_date(date: str) -> Date:
    try:
        return Date.fromisoformat(date)
    except ValueError:
        raise ValueError(f"date = {date!r} is not a date; write a date as YYYY-MM-DD, such as 2025-01-31") from None
