"""A conversation rendered from a plan equals the template's own render."""

from __future__ import annotations

import itertools
from contextlib import suppress
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sftstream import ChatEncoder, Refused
from sftstream.config import Policy
from sftstream.formats import parse_row
from sftstream.records import Conversation, Message, Rendered, ToolCall, ToolCalls
from sftstream.rendering import renderer
from sftstream.rendering.fast import render_cache
from sftstream.rendering.fast.render_cache import RenderCache
from sftstream.rendering.fast.render_plan import Offset, Slot
from sftstream.rendering.fast.symbolic import Recorder, SymbolicStr, TracedTemplate, ValueRef
from sftstream.rendering.template import ChatTemplate
from sftstream.rendering.turn_format import TurnFormat

LOOP = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n%s<|eot_id|>{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"


def template(body: str) -> str:
    return LOOP.replace("%s", body) + PROMPT


def open_encoder(tokenizer: str, body: str, **policy: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer, template(body), policy=Policy(**policy))


def full_path(encoder: ChatEncoder, conversation: Conversation) -> Rendered | str:
    try:
        return encoder.renderer.render_whole(conversation)[0]
    except Refused as refused:
        return refused.reason


def learn(encoder: ChatEncoder, conversation: Conversation) -> None:
    with suppress(Refused):
        encoder.renderer.render_cache.learn(conversation, *encoder.renderer.render_whole(conversation))


def said(*texts: str) -> Conversation:
    return parse_row(tiny.chat(*texts))


def with_other_texts(value: Any, numbers: Any) -> Any:
    """Return a value of equal shape with new texts."""
    if isinstance(value, dict):
        keep = ("role", "type", "id")
        return {key: item if key in keep else with_other_texts(item, numbers) for key, item in value.items()}
    if isinstance(value, list):
        return [with_other_texts(item, numbers) for item in value]
    return (
        f"{value[: len(value) - len(value.lstrip())]}other {next(numbers)}"
        if isinstance(value, str) and value
        else value
    )


@pytest.mark.realdata
@pytest.mark.parametrize("templates", shapes.DRAWN)
def test_published_templates_print_every_shape_as_planned(realdata: Path, templates: int | None) -> None:
    planned, paths = 0, shapes.drawn(shapes.published(realdata), templates)
    for path in paths:
        encoder = ChatEncoder(str(realdata / "tokenizers" / "llama3"), path.read_text(), date="2025-01-31")
        for messages, tools in shapes.SHAPES.values():
            first = parse_row({"messages": messages, "tools": tools})
            second = parse_row({"messages": with_other_texts(messages, itertools.count()), "tools": tools})
            third = parse_row(
                {
                    "messages": with_other_texts(messages, itertools.count()),
                    "tools": with_other_texts(tools, itertools.count()),
                }
            )
            learn(encoder, first)
            for conversation in (first, second, third):
                found = encoder.renderer.render_cache.render(conversation)
                assert found is None or found == full_path(encoder, conversation), path.stem
                planned += found is not None
    if paths != shapes.published(realdata):
        assert planned > 5 * len(paths) or len(paths) < 8  # some templates are never planned
    else:
        assert planned > 1000


@pytest.mark.parametrize("policy", [{}, {"train_on": ("all",)}, {"train_turns": "last"}, {"train_on": ("user",)}])
def test_a_plan_trains_what_the_policy_trains(tokenizer: str, policy: dict[str, Any]) -> None:
    encoder = ChatEncoder(tokenizer, policy=Policy(**policy))
    for row in tiny.rows(60, seed=4):
        conversation = parse_row(row)
        assert encoder.render(conversation) == full_path(encoder, conversation)
    assert encoder.renderer.planned > 50


BODIES = {
    "plain": "{{ message['content'] }}",
    "trimmed": "{{ message['content'] | trim }}",
    "stripped": "{{ message.content.strip() }}",
    "joined": "{{ 'a' ~ message.content ~ 'b' }}",
    "added": "{{ 'a' + message.content + 'b' }}",
    "joined and trimmed": "{{ (message.content ~ '  ') | trim }}",
    "set": "{% set c = message.content %}{{ c }}",
    "set block": "{% set c %}<{{ message.content }}>{% endset %}{{ c }}",
    "macro": "{% macro m(x) %}({{ x }}){% endmacro %}{{ m(message.content) }}",
    "namespace": "{% set n = namespace(c='') %}{% set n.c = message.content %}{{ n.c }}",
    "asked by in": "{{ 'secret' if 'xy' in message.content else message.content }}",
    "asked by equality": "{{ 'none' if message.content == 'xy' else message.content }}",
    "asked by its beginning": "{% if message.content.startswith('xy') %}X{% endif %}{{ message.content }}",
    "asked by its end": "{% if message.content.endswith('y') %}Y{% endif %}{{ message.content }}",
    "asked whether it is": "{% if message.content %}{{ message.content }}{% else %}empty{% endif %}",
    "asked when trimmed": "{% if message.content | trim == '' %}empty{% endif %}{{ message.content }}",
    "length": "{{ message.content | length }}{{ message.content }}",
    "long or short": "{% if message.content | length > 6 %}L{% endif %}{{ message.content }}",
    "some or none": "{% if message.content | length > 0 %}S{% endif %}{% if message.content | length == 0 %}N{% endif %}"
    "{{ message.content }}",
    "macro asked": "{% macro m(x) %}{{ x }}{% endmacro %}{% set c = m(message.content) %}{{ '!' if 'xy' in c }}{{ c | trim }}",
    "joined and stripped of letters": "{{ ('x' ~ message.content ~ 'y').strip('xy') }}",
    "stripped of letters": "{{ message.content.strip('xy') }}",
    "joined and asked": "{{ 'T' if ' ' ~ message.content }}{{ 'U' if message.content ~ '' }}{{ message.content }}",
    "joined and trimmed at its ends": "{{ (message.content ~ '-').strip() }}",
    "joined is a text": "{{ (message.content ~ '!') is string }}{{ (message.content ~ '!') is mapping }}{{ message.content }}",
    "first letter": "{{ message.content[0] }}{{ message.content }}",
    "upper case": "{{ message.content | upper }}{{ message.content }}",
    "a method": "{{ message.content.title() }}{{ message.content }}",
    "as a number": "{{ message.content | int }}{{ message.content }}",
    "as a float": "{{ message.content | float }}{{ message.content }}",
    "formatted": "{{ '%s' | format(message.content) }}",
    "by percent": "{{ '%s' % message.content }}",
    "letters": "{% for c in message.content %}{{ c }}{% endfor %}",
    "split": "{{ message.content.split('xy')[-1] }}",
    "split at spaces": "{{ message.content.split(' ')[0] }}{{ message.content }}",
    "replaced": "{{ message.content.replace('xy', 'z') }}",
    "replaced by filter": "{{ message.content | replace('xy', 'z') }}",
    "as a key": "{{ {'xy': 1}.get(message.content, 2) }}{{ message.content }}",
    "in a list": "{{ message.content in ['xy', 'z'] }}{{ message.content }}",
    "in a text": "{{ message.content in 'xyz' }}{{ message.content }}",
    "compared": "{% if message.content > 'b' %}B{% endif %}{{ message.content }}",
    "tests of kind": "{{ message.content is string }}{{ message.content is mapping }}{{ message.content is iterable }}"
    "{{ message.content is sequence }}{{ message.content is number }}{{ message.content is none }}{{ message.content }}",
    "default": "{{ message.content | default('d', true) }}",
    "as JSON": "{{ message.content | tojson if message.role == 'user' else message.content }}",
    "a message as JSON": "{{ message | tojson if message.role == 'user' else message.content }}",
    "joined by filter": "{{ [message.content, 'q'] | join('-') }}",
    "sorted": "{{ (messages | sort(attribute='content'))[0].content }}{{ message.content }}",
    "other message": "{{ message.content }}{% if messages[0].content == message.content %}!{% endif %}",
    "caught": "{{ message.content | string | wordcount }}{{ message.content }}",
    "twice": "{{ message.content }}|{{ message.content }}",
}
CONTENTS = (
    "ab",
    "xy",
    " ab",
    "ab ",
    "xyz q",
    "q xy",
    "",
    "  ",
    "7",
    "7.5",
    "b" * 9,
    "'\"<",
    "é\n",
    "<think>a</think>b",
)


@pytest.mark.parametrize("body", BODIES)
def test_a_plan_never_prints_what_the_template_would_not(tokenizer: str, body: str) -> None:
    """Learn a plan from each conversation and try the plan on all conversations."""
    encoder = open_encoder(tokenizer, BODIES[body], train_on=("all",))
    conversations = [said(*pair) for pair in itertools.product(CONTENTS, ("ab", "xy", "q"))]
    expected = [full_path(encoder, conversation) for conversation in conversations]
    for learner in conversations:
        learn(encoder, learner)
        for conversation, right in zip(conversations, expected, strict=True):
            assert (encoder.renderer.render_cache.render(conversation) or right) == right


@pytest.mark.parametrize(
    "body",
    [
        *("plain", "trimmed", "added", "joined", "asked by in", "macro", "set block", "namespace", "macro asked"),
        *(
            "some or none",
            "joined and asked",
            "joined and trimmed",
            "joined and trimmed at its ends",
            "joined is a text",
        ),
    ],
)
def test_common_templates_get_plans(tokenizer: str, body: str) -> None:
    encoder = open_encoder(tokenizer, BODIES[body], train_on=("all",))
    learn(encoder, said("one", "two"))
    assert encoder.renderer.render_cache.render(said("three", "four")) == full_path(encoder, said("three", "four"))
    assert encoder.renderer.render_cache.render(said("three", "four")) is not None


def test_a_conversation_with_other_answers_gets_another_plan(tokenizer: str) -> None:
    encoder = open_encoder(tokenizer, "{% if 'xy' in message.content %}X{% endif %}{{ message.content }}")
    learn(encoder, said("a", "b"))
    assert encoder.renderer.render_cache.render(said("axy", "b")) is None
    learn(encoder, said("xy", "b"))
    for conversation in (said("axy", "q"), said("q", "a")):
        found = encoder.renderer.render_cache.render(conversation)
        assert found is not None
        assert found == full_path(encoder, conversation)


pieces = st.sampled_from([*"ab \n<|>", "<|eot_id|>", "<think>", "</think>", "ZqM0x1x0bZq", "é", "\ud800"])
words = st.lists(pieces, max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_text_that_looks_like_the_template_takes_the_full_path(tokenizer: str, turns: list[tuple[str, str]]) -> None:
    encoder = ChatEncoder(tokenizer, policy=Policy(train_on=("all",)))
    learn(encoder, said(*(["a", "b"] * len(turns))))
    conversation = said(*itertools.chain(*turns))
    found = encoder.renderer.render_cache.render(conversation)
    assert found is None or found == full_path(encoder, conversation)


CALLS = {
    "as JSON": "[{{ call.function.name }} {{ call.function.arguments | tojson }}]",
    "arguments first": "[{{ call.function.arguments | tojson }} {{ call.function.name }}]",
    "with its id": "[{{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}]",
    "name alone": "[{{ call.function.name }}]",
    "one argument": "[{{ call.function.name }} {{ call.function.arguments.a }}]",
    "item by item": "[{{ call.function.name }}{% for key, value in call.function.arguments.items() %} {{ key }}="
    "{{ value if value is string else value | tojson }}{% endfor %}]",
    "items first": "[{% for key, value in call.function.arguments | items %}{{ key }}={{ value }};{% endfor %}"
    "{{ call.function.name }}]",
    "asked": "[{{ call.function.name }}{% for key, value in call.function.arguments.items() %}"
    "{% if value is string and value.startswith('x') %}X{% endif %}{{ value }}{% endfor %}]",
    "attributes": "[{{ call.function.name }}{% for key, value in call.function.arguments.items() %}"
    "{{ value.value if value.value is defined else value }}{% endfor %}]",
}
TOOL_FIELDS = "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.description }}\n{% endfor %}"
THOUGHT = (
    "{% if message.reasoning_content is defined %}({{ message.reasoning_content }}){% endif %}{{ message.content }}"
)
ARGUMENTS: list[dict[str, Any]] = [
    {},
    *(
        {"a": text}
        for text in ("x", "y", "", " ", " x", "x\n", "1", "[1]", 'a"b\\', "\ud800", "<|eot_id|>", "ZqM1x1x1bZq")
    ),
    *({"a": value} for value in (1, 2, True, 1.0, None, 10**30, 10**31, ["x"], ["y"], ("x",), {"k": "v"}, [], [""])),
    *({"a": value} for value in (date(2020, 1, 1), ["2020-01-01"], [date(2020, 1, 1)], [Decimal("1.5")], ["1.5"])),
    {"b": "x"},
    {"a": "x", "b": "y"},
    {"b": "y", "a": "x"},
    {"a": "", "b": "x"},
    {"<|eot_id|>": "x"},
    {"value": "x"},
]


def body(call: str) -> str:
    return f"{THOUGHT}{{% for call in message.tool_calls or [] %}}{CALLS[call]}{{% endfor %}}"


def calling(arguments: dict[str, Any], description: Any = "finds", name: str = "f", **fields: Any) -> Conversation:
    call = ToolCall(name, arguments, fields.pop("id", None))
    messages = (Message("user", "north"), Message("assistant", tool_calls=ToolCalls([call]), **fields))
    return Conversation(messages, ({"type": "function", "function": {"name": "f", "description": description}},))


CONVERSATIONS = [
    *map(calling, ARGUMENTS),
    *(
        calling({"a": "x"}, d)
        for d in ("looks", "", "2020-01-01", date(2020, 1, 1), ["finds"], ("finds",), "<|eot_id|>")
    ),
    *(calling({"a": "x"}, reasoning=text) for text in ("", "\n", "t", "u")),
    *(calling(arguments, name=name) for name in ("", " ", "g") for arguments in ({}, {"a": "x"})),
    *(calling({"a": "x"}, id=text) for text in ("", "abcdefghi", "i")),
]


@pytest.mark.parametrize("policy", [{}, {"train_reasoning": False}, {"train_tool_calls": False}])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("offer", ["", TOOL_FIELDS])
def test_a_plan_prints_calls_as_the_template_does(
    tokenizer: str, call: str, offer: str, policy: dict[str, Any]
) -> None:
    encoder = ChatEncoder(tokenizer, offer + template(body(call)), policy=Policy(**policy))
    right = [full_path(encoder, conversation) for conversation in CONVERSATIONS]
    planned = 0
    for first in CONVERSATIONS:
        encoder.renderer.render_cache.plans.clear()
        learn(encoder, first)
        for second, expected in zip(CONVERSATIONS, right, strict=True):
            found = encoder.renderer.render_cache.render(second)
            assert found is None or found == expected, (first, second)
            planned += found is not None and first is not second
    assert planned or (call in ("name alone", "attributes", "one argument"))


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ({"a": "x", "n": 1}, {"a": "other text", "n": 1}, True),
        ({"a": ["x", {"b": None}]}, {"a": ["x", {"b": None}]}, True),
        ({"a": 10**30}, {"a": 10**30}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": "x"}, {"a": ""}, False),
        ({"a": "x"}, {"b": "x"}, False),
    ],
)
def test_arguments_read_field_by_field_belong_to_the_shape_except_their_strings(
    tokenizer: str, first: dict[str, Any], second: dict[str, Any], alike: bool
) -> None:
    encoder = open_encoder(tokenizer, body("item by item"))
    for arguments in (first, first, second):
        encoder.renderer.render_cache.render(calling(arguments)) or learn(encoder, calling(arguments))
    assert sum(map(len, encoder.renderer.render_cache.plans.values())) == 2 - alike


def test_tools_read_field_by_field_belong_to_the_shape(tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, TOOL_FIELDS + template("{{ message.content }}"))
    learn(encoder, asked("finds", "north"))
    assert encoder.renderer.render_cache.render(asked("finds", "south")) == full_path(encoder, asked("finds", "south"))
    assert encoder.renderer.render_cache.render(asked("looks", "south")) is None


def asked(description: str, *texts: str) -> Conversation:
    return Conversation(said(*texts, "river").messages, calling({}, description).tools)


@pytest.mark.parametrize(("bound", "least"), [("SHAPES", 3), ("CHARACTERS", 705)])
def test_the_oldest_plans_are_forgotten(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch, bound: str, least: int
) -> None:
    conversations = [said(*["a", "b"] * turns) for turns in (1, 2, 3)]
    for most, planned in ((least, [True, True, True]), (least - 1, [False, True, True])):
        monkeypatch.setattr(render_cache, bound, most)
        encoder = ChatEncoder(tokenizer)
        for conversation in conversations:
            encoder.render(conversation)
        assert [
            encoder.renderer.render_cache.render(conversation) is not None for conversation in conversations
        ] == planned


def test_a_date_in_a_call_is_refused_as_the_template_refuses_it(tokenizer: str) -> None:
    encoder = open_encoder(tokenizer, body("as JSON"))
    encoder.render(calling({"day": "2020-01-01"}))
    for _ in range(2):
        with pytest.raises(Refused, match="template raises: Object of type date is not JSON serializable"):
            encoder.render(calling({"day": date(2020, 1, 1), "also": "x"}))


def test_a_plan_of_two_messages_renders_another_conversation() -> None:
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    turn_format = TurnFormat("<assistant>", "<assistant>", ("</s>",), (), False)
    cache = RenderCache(ChatTemplate(text, {}), turn_format, ["</s>"])
    cache.learn(said("hi", "seven"), Rendered("<user>hi</s><assistant>seven</s>", (23, 32)), [])
    ((shape, (plan,)),) = cache.plans.items()
    assert shape == (0, "user", None, True, "assistant", None, True)
    assert plan.pieces == ["<user>", "", "</s><assistant>", "", "</s>"]
    assert plan.slots == (Slot(0, str.strip), Slot(1, str.strip))
    assert plan.bounds == (Offset(1, 21), Offset(2, 25))
    assert cache.render(said("where? ", "north")) == Rendered("<user>where?</s><assistant>north</s>", (27, 36))


def test_a_trace_records_pieces_and_guards() -> None:
    text = "{% for m in messages %}[{% if 'x' in m.content %}!{% endif %}{{ m.content | trim }}]{% endfor %}"
    recorder = Recorder()
    messages = [{"role": "user", "content": SymbolicStr(recorder, ValueRef(0), " ax ")}]
    trace = TracedTemplate(ChatTemplate(text, {})).trace(recorder, messages, ())
    assert trace is not None
    assert trace.pieces == ("[!", ValueRef(0, (("strip", (None,)),)), "]")
    assert [(guard.method, guard.arguments, guard.answer) for guard in trace.guards] == [("__contains__", ("x",), True)]


def test_a_wrong_plan_is_an_error(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "CHECK_INTERVAL", 3)
    encoder = ChatEncoder(tokenizer)
    encoder.render(said("one", "two"))
    (plans,) = encoder.renderer.render_cache.plans.values()
    plans[0] = plans[0]._replace(pieces=[plans[0].pieces[0] + "!", *plans[0].pieces[1:]])
    encoder.render(said("a", "b"))
    encoder.render(said("a", "b"))
    with pytest.raises(RuntimeError, match="a plan of this chat template gave"):
        encoder.render(said("a", "b"))
