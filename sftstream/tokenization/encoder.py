"""Conversations -> Examples: template, payloads, turns, mask and tokenizer put together. The stream and its users share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date as Date
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sftstream.config import Policy
from sftstream.formats import parse_row
from sftstream.records import Conversation, Example, Message, Refused, Rendered
from sftstream.rendering.fast.render_cache import RenderCache
from sftstream.rendering.markers import locate, names, strings
from sftstream.rendering.mask import rendered, require_whole
from sftstream.rendering.probe import TemplateReport, probe
from sftstream.rendering.template import ChatTemplate, TemplateMessage, template_message
from sftstream.rendering.turns import Turn, find_turns
from sftstream.tokenization.tokenizer import Backend, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN_CHECKS = 4096
"""Conversations rendered by plan, of which one is rendered by the template as well and compared."""


class RenderedConversation(msgspec.Struct, frozen=True, gc=False):
    """A dialogue and the texts that are to become its examples."""

    conversation: Conversation
    texts: tuple[Rendered, ...]


class ChatEncoder:
    """Conversations -> tokens and loss masks, each verified or refused.

    `tokenizer` is a transformers tokenizer, its directory or a hub name; `template` a Jinja file's path or text, by
    default the tokenizer's own; `date` (YYYY-MM-DD) is what the template prints as today, by default today; `backend` is
    what computes the ids. The other arguments are those of the `[data]` table, or together a `policy`. Raises ValueError
    where the template cannot be trained on.
    """

    def __init__(
        self,
        tokenizer: str | PathLike[str] | PreTrainedTokenizerBase,
        template: str | None = None,
        train_on: Sequence[str] = ("assistant",),
        date: str | None = None,
        *,
        policy: Policy | None = None,
        backend: Backend = "auto",
        **policy_fields: Any,
    ) -> None:
        self.policy = policy or msgspec.convert({"train_on": list(train_on), **policy_fields}, Policy)
        self.tokenizer = Tokenizer(tokenizer, backend)
        vocabulary = self.tokenizer.vocabulary
        text = _template_text(template) if template is not None else vocabulary.template
        if text is None:
            raise ValueError(
                f'tokenizer {self.tokenizer.name!r} has no chat template; name one: template = "chat.jinja"'
            )
        self.template = ChatTemplate(text, vocabulary.variables, _parse_date(date) if date else None)
        self.report: TemplateReport = probe(self.template, self.tokenizer.control)
        self.render_cache = RenderCache(self.template, self.report.turn_format, vocabulary.special)
        self.rendered = self.planned = 0

    @property
    def stop_ids(self) -> list[int]:
        """The tokens with which the assistant ends a turn."""
        turn_format = self.report.turn_format
        return sorted({self.tokenizer.ids(stop)[-1] for stop in turn_format.stops + turn_format.call_stops})

    def encode(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Example]:
        """Examples of one dialogue in any known spelling of messages; raises `Refused`.

        One, unless `history` or `overflow` makes more of it.
        """
        return self.tokenize(self.render_conversation(parse_row({"messages": list(messages), "tools": tools})))

    def render_conversations(self, conversations: Iterable[Conversation]) -> Iterator[RenderedConversation | Refused]:
        """The texts of several dialogues, or why not."""
        for conversation in conversations:
            try:
                yield self.render_conversation(conversation)
            except Refused as refused:
                yield refused

    def render_conversation(self, conversation: Conversation) -> RenderedConversation:
        """The texts of one dialogue, by the policy for rewritten history; raises `Refused`."""
        whole = self.render(conversation)
        if self.policy.history == "as_rendered" or not self.report.rewrites_history:
            return RenderedConversation(conversation, (whole,))
        turns = [self.render(part) for part in self._turn_by_turn(conversation)]
        if all(whole.text.startswith(turn.text[: turn.bounds[-1]]) for turn in turns):
            return RenderedConversation(conversation, (whole,))
        if self.policy.history == "error":
            raise Refused("history rewritten", "an earlier turn is printed otherwise than when it was said")
        return RenderedConversation(conversation, tuple(turns))

    def tokenize(self, rendered: RenderedConversation) -> list[Example]:
        """Examples of its texts, by the policy for those that are too long; raises `Refused`."""
        (examples,) = self.tokenize_all([rendered])
        if isinstance(examples, Refused):
            raise examples
        return examples

    def tokenize_all(self, rendered: Sequence[RenderedConversation]) -> list[list[Example] | Refused]:
        """The same of several drafts at once, or why not."""
        encoded = self.tokenizer.encode_all([text for rendered in rendered for text in rendered.texts])
        if self.policy.overflow == "drop" and len(encoded) == len(rendered):
            # As most often: one of each, and nothing to fit.
            return [example if isinstance(example, Refused) else [example] for example in encoded]
        examples = iter(encoded)
        return [self._fitted(rendered, [next(examples) for _ in rendered.texts]) for rendered in rendered]

    def _fitted(self, rendered: RenderedConversation, encoded: list[Example | Refused]) -> list[Example] | Refused:
        examples = []
        for example in encoded:
            if isinstance(example, Refused):
                return example
            examples.append(example)
        if len(examples) > 1:
            return [_noted(example, "examples of single turns") for example in examples]
        if self.policy.overflow == "drop" or len(examples[0].tokens) <= self.policy.capacity:
            return examples
        try:
            return (
                [self._truncated(rendered.conversation)]
                if self.policy.overflow == "truncate"
                else list(self._split(rendered.conversation))
            )
        except Refused as refused:
            return refused

    def render(self, conversation: Conversation) -> Rendered:
        """Text and trained spans; raises `Refused`."""
        self.rendered += 1
        planned = self.render_cache.render(conversation)
        if planned is not None:
            self.planned += 1
            if self.planned % BETWEEN_CHECKS:
                return planned
        rendered, turns = self.render_whole(conversation)
        if planned is None:
            self.render_cache.learn(conversation, rendered, turns)
        elif rendered != planned:
            raise RuntimeError(f"a plan of this chat template gave {planned} where the template gives {rendered}")
        return rendered

    def render_whole(self, conversation: Conversation) -> tuple[Rendered, list[Turn]]:
        """The same by running the template on this very conversation, and its turns; raises `Refused`."""
        messages = [template_message(message) for message in conversation.messages]
        control, turn_format = self.tokenizer.control, self.report.turn_format
        self._refuse_typed_names(messages, conversation.tools)
        located = locate(self.template, messages, conversation.tools)
        prints_reasoning, prints_thoughts = self.report.prints_reasoning, self.report.prints_thoughts
        require_whole(
            conversation.messages,
            located,
            self.policy,
            prints_reasoning=prints_reasoning,
            prints_thoughts=prints_thoughts,
        )
        turns = find_turns(self.template, turn_format, control, messages, conversation.tools, located)
        return rendered(conversation.messages, located, turns, turn_format, self.policy, control), turns

    def _refuse_typed_names(self, messages: list[TemplateMessage], tools: Sequence[Any]) -> None:
        """Special tokens' text where it cannot be followed: in names, ids, keys and the definitions of tools."""
        places = [
            *((f"message {index}", names(message)) for index, message in enumerate(messages)),
            ("the tools", strings(tools)),
        ]
        for place, texts in places:
            if found := self.tokenizer.control.search("\0".join(texts)):
                raise Refused("control token in text", f"{place} contains {found[0]!r} in a name or key")

    def _turn_by_turn(self, conversation: Conversation) -> Iterator[Conversation]:
        """The dialogue up to each of the assistant's messages, of which the last alone is trained."""
        for index, message in enumerate(conversation.messages):
            if message.role == "assistant" and message.train is not False:
                earlier = tuple(msgspec.structs.replace(m, train=False) for m in conversation.messages[:index])
                yield Conversation((*earlier, message), conversation.tools)

    def _truncated(self, conversation: Conversation) -> Example:
        _, example = self._longest_beginning(conversation, "conversations truncated")
        if example is None:
            raise Refused("nothing to train", "what fits into a pack holds no trained token")
        return example

    def _split(self, conversation: Conversation) -> Iterator[Example]:
        """Examples that fit, each from a user's message on, with the system prompt in front."""
        system = tuple(message for message in conversation.messages if message.role == "system")
        rest = tuple(message for message in conversation.messages if message.role != "system")
        while any(message.role == "assistant" for message in rest):
            part = Conversation((*system, *rest), conversation.tools)
            used, example = self._longest_beginning(part, "parts of split conversations", before_user=True)
            rest = rest[used - len(system) :]
            if example is not None:
                yield example

    def _longest_beginning(
        self, conversation: Conversation, note: str, *, before_user: bool = False
    ) -> tuple[int, Example | None]:
        """The most messages, up to one of the assistant's, that fit into a pack; their example if anything is trained."""
        for count in reversed(list(_ends(conversation.messages, before_user))):
            try:
                part = Conversation(conversation.messages[:count], conversation.tools)
                example = _noted(self.tokenizer.encode(self.render(part)), note)
            except Refused as refused:
                if refused.reason != "nothing to train":
                    raise
                return count, None
            if len(example.tokens) <= self.policy.capacity:
                return count, example
        raise Refused("longer than capacity", f"not even its first answer fits into a pack of {self.policy.capacity}")


def _ends(messages: Sequence[Message], before_user: bool) -> Iterator[int]:
    """Numbers of messages after which a conversation may be cut: behind an answer, and there before a user if so asked."""
    for count, message in enumerate(messages, 1):
        following = messages[count] if count < len(messages) else None
        if message.role == "assistant" and (not before_user or following is None or following.role == "user"):
            yield count


def _noted(example: Example, note: str) -> Example:
    return msgspec.structs.replace(example, notes={**example.notes, note: 1})


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
