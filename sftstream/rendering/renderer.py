"""Render conversations as texts with trained spans.

The template renders the first conversation of a shape. Most later conversations of the shape are
printed from a stored plan, with the same result as from the template (`fast/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from sftstream.config import Policy
from sftstream.records import Conversation, Refused, Rendered
from sftstream.rendering.bounds import known_sizes
from sftstream.rendering.certificate import certify
from sftstream.rendering.fast.known_tails import NOT_JSON
from sftstream.rendering.fast.render_cache import RenderCache
from sftstream.rendering.limits import time_limit
from sftstream.rendering.locate import Located, locate
from sftstream.rendering.markers import names, strings
from sftstream.rendering.mask import rendered, require_whole, trained_messages
from sftstream.rendering.probe import probe, reading_content
from sftstream.rendering.shared_renders import representatives, similar
from sftstream.rendering.template import ChatTemplate, TemplateMessage, template_message
from sftstream.rendering.turns import Turn, find_turns

CHECK_INTERVAL = 4096
"""One in this number of renders from plans is compared with a render by the template."""


class RenderedConversation(msgspec.Struct, frozen=True, gc=False):
    """A conversation and its rendered texts.

    There is a single text, unless `policy.history` is "per_turn" and the template prints earlier
    turns differently once further messages follow; then each trained message has a text. Each text
    is tokenized as one example. A text that is too long is split or shortened only if it is the
    single text of the conversation.
    """

    conversation: Conversation
    texts: tuple[Rendered, ...]


class MessageRange(NamedTuple):
    """The characters `[start, end)` of a rendered text that belong to a message."""

    start: int
    end: int
    message: int
    """Index of the message in the conversation."""


class Renderer:
    """Renders conversations with one chat template under one policy.

    `special` are the texts of the tokenizer's special tokens; `control` is a pattern that matches
    any of these texts. Raises ValueError if the template is unfit for training (see `certify` and
    `probe`).
    """

    def __init__(
        self, template: ChatTemplate, policy: Policy, special: Sequence[str], control: re.Pattern[str]
    ) -> None:
        certify(template)
        self.template = template = reading_content(template)
        self.policy = policy
        self._control = control
        self._verbatim_in_json = all(_ENCODER.encode(text) == f'"{text}"'.encode() for text in special)
        self.report = probe(template, control)
        self.render_cache = RenderCache(template, self.report.turn_format, special)
        self.rendered = 0
        """Number of calls of `render`: at least one for each conversation."""
        self.planned = 0
        """Number of calls of `render` that found a plan."""

    def render_conversations(self, conversations: Iterable[Conversation]) -> Iterator[RenderedConversation | Refused]:
        """Yield the texts, or the refusal, of each conversation."""
        for conversation in conversations:
            try:
                yield self.render_conversation(conversation)
            except Refused as refused:
                yield refused

    def render_conversation(self, conversation: Conversation) -> RenderedConversation:
        """Return the texts of a conversation; raises `Refused`.

        Some templates print a turn differently once further messages follow; Qwen3, for example,
        drops the reasoning of earlier turns. `policy.history` decides about such a conversation:

            as_rendered  one text, the whole conversation
            per_turn     one text for each trained message: the messages up to the trained one
            error        the conversation is refused
        """
        whole = self.render(conversation)
        if self.policy.history == "as_rendered":
            return RenderedConversation(conversation, (whole,))
        trained = trained_messages(conversation.messages, self.policy)
        earlier = [index for index in trained if index < len(conversation.messages) - 1]
        messages = [template_message(message) for message in conversation.messages]
        if all(self._is_printed_alike(conversation, index, whole) for index in representatives(messages, earlier)):
            return RenderedConversation(conversation, (whole,))
        if self.policy.history == "error":
            raise Refused(
                "history rewritten",
                "the template prints a trained message, or text before the message, differently once further "
                'messages follow; set history = "per_turn" or "as_rendered"',
            )
        texts = [self.render(up_to(conversation, index)) for index in trained]
        return RenderedConversation(conversation, tuple(text for text in texts if text.bounds))

    def _is_printed_alike(self, conversation: Conversation, index: int, whole: Rendered) -> bool:
        """Return True if the messages after trained message `index` do not change the text before.

        The messages up to `index` are rendered alone, as at inference. The text of this render, up
        to the end of the trained message, must be the beginning of `whole`.
        """
        part = self.render(up_to(conversation, index))
        return whole.text.startswith(part.text[: max(part.bounds, default=0)])

    def render(self, conversation: Conversation) -> Rendered:
        """Return the text and the trained spans of the whole conversation; raises `Refused`.

        Uses a plan if a plan holds for the conversation. One in `CHECK_INTERVAL` conversations
        printed from plans is also rendered by the template; a difference raises RuntimeError.
        """
        self.rendered += 1
        planned = self.render_cache.render(conversation)
        if planned is not None:
            self.planned += 1
            if self.planned % CHECK_INTERVAL:
                return planned
        rendered, turns = self.render_whole(conversation)
        if planned is None:
            self.render_cache.learn(conversation, rendered, turns)
        elif rendered != planned:
            raise RuntimeError(
                f"a plan of this chat template gave {planned}, but the template itself prints {rendered}; "
                "report the template as a bug of sftstream"
            )
        return rendered

    def render_whole(self, conversation: Conversation) -> tuple[Rendered, list[Turn]]:
        """Run the template on the conversation, without a plan.

        Return the text with the trained spans, and the turns. Raises `Refused`.
        """
        try:
            return self._render_whole(conversation, self._with_variables(conversation.variables))[:2]
        except Refused as refused:
            if not refused.reason.startswith(("template drops", "template raises")) or not self._unset_variables:
                raise
            names = ", ".join(self._unset_variables)
            hint = f"the template also reads variables that are not set ({names}); set them in data.tokenizer.variables"
            raise Refused(refused.reason, f"{refused.detail}; {hint}") from None

    def message_ranges(self, conversation: Conversation) -> list[MessageRange]:
        """Return the ranges of the rendered text that belong to messages, in text order.

        A range is an assistant's turn up to its stop token, or a text of another message; the rest
        of the rendered text is the template's. Raises `Refused`.
        """
        whole = self._render_whole(conversation, self._with_variables(conversation.variables))
        _, turns, located = whole
        spoken = {turn.message for turn in turns}
        ranges = [MessageRange(*turn.span, turn.message) for turn in turns]
        ranges += [MessageRange(p.start, p.end, p.message) for p in located.payloads if p.message not in spoken]
        return sorted(ranges)

    def _render_whole(self, conversation: Conversation, template: ChatTemplate) -> tuple[Rendered, list[Turn], Located]:
        with time_limit(), known_sizes():
            return self._find_spans(conversation, template)

    def _find_spans(self, conversation: Conversation, template: ChatTemplate) -> tuple[Rendered, list[Turn], Located]:
        messages, tools = [template_message(message) for message in conversation.messages], conversation.tools
        self._refuse_typed_names(messages, tools, conversation.variables)
        located = locate(template, messages, tools)
        turn_format, own = self.report.turn_format, bool(conversation.variables)
        if located.dropped:
            require_whole(located, self.policy, lambda indices: prints_as_last(template, messages, tools, indices))
        # The turn format was learned with the variables of the config. A conversation with its own
        # variables may have another generation prompt, so each start is proved by a render.
        known = self.render_cache.tails.of(conversation)
        given = template, turn_format, self._control, messages, tools, located
        turns = find_turns(*given, shortcut=not own, known=known)
        text = rendered(conversation.messages, located, turns, turn_format, self.policy, self._control)
        return text, turns, located

    def _with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        try:
            return self.template.with_variables(variables)
        except ValueError as error:
            raise Refused("bad template variables", str(error)) from None

    @cached_property
    def _unset_variables(self) -> tuple[str, ...]:
        return self.template.unset_variables

    def _refuse_typed_names(
        self, messages: list[TemplateMessage], tools: Sequence[Any], variables: Mapping[str, Any]
    ) -> None:
        """Raise `Refused` if a name, id, key, tool definition or variable contains a special token.

        These texts get no markers, so a special token typed in one of them looks like a special
        token of the template.
        """
        with_names = [message for message in messages if len(message) > 2]  # more than role and content
        named_texts = "\0".join(chain.from_iterable(map(names, with_names)))
        if not (self._control.search(named_texts) or self._may_hold_token(tools) or self._may_hold_token(variables)):
            return
        named = [
            *((f"message {index}", names(message)) for index, message in enumerate(messages)),
            ("a tool definition", strings(tools)),
            ("chat_template_kwargs", strings(variables)),
        ]
        for holder, texts in named:
            if found := self._control.search("\0".join(texts)):
                raise Refused(
                    "control token in text", f"{holder} contains {found[0]!r} in a name, key or value; remove the token"
                )

    def _may_hold_token(self, value: Any) -> bool:
        """Return False if no string in a JSON-like value contains the text of a special token.

        The value is searched as JSON text, which is ten times faster than a walk. True may be
        wrong: a token may match the text between two strings. A token with a character that JSON
        escapes is not searched for, so the result is True.
        """
        if not value:
            return False
        if not self._verbatim_in_json:
            return True
        try:
            text = _ENCODER.encode(value).decode()
        except NOT_JSON:
            return True
        return bool(self._control.search(text))


_ENCODER = msgspec.json.Encoder()


def prints_as_last(
    template: ChatTemplate, messages: Sequence[TemplateMessage], tools: Sequence[Any], indices: Sequence[int]
) -> bool:
    """Return True if the template prints all of each message in `indices`, as the last message.

    Similar messages share the render of the first.
    """
    for index, *_ in similar(messages, indices):
        try:
            part = locate(template, messages[: index + 1], tools)
        except Refused:
            return False
        if any(message == index for message, *_ in part.dropped):
            return False
    return True


def up_to(conversation: Conversation, index: int) -> Conversation:
    """Return the conversation up to and with message `index`, with `train=False` before it."""
    earlier = tuple(msgspec.structs.replace(m, train=False) for m in conversation.messages[:index])
    return msgspec.structs.replace(conversation, messages=(*earlier, conversation.messages[index]))
