"""Promise 5: a token is trained if and only if a role of the policy said the token's text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import shapes
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sftstream import ChatEncoder, Message, PackLoader, Refused
from sftstream.formats import parse_row
from sftstream.rendering.locate import locate
from sftstream.rendering.markers import PREFIXES
from sftstream.rendering.template import template_message
from sftstream.rendering.turns import find_turns

STOP = "<|eot_id|>"

THINKING = """{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- "<|start_header_id|>" + m.role + "<|end_header_id|>" }}
{%- if m.reasoning_content and loop.index0 > last.user %}{{ "<think>" + m.reasoning_content + "</think>" }}{% endif %}
{{- m.content + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>" }}{% endif %}"""
"""A template that forgets the thoughts of turns before the last question."""


def _trained(encoder: ChatEncoder, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    """Decode the trained tokens of each example."""
    examples = encoder.encode(messages, tools)
    return [encoder.tokenizer.hf.decode(example.tokens[example.loss_mask]) for example in examples]


TALK = [
    {"role": "system", "content": "small"},
    {"role": "user", "content": "which river"},
    {"role": "assistant", "content": "north"},
    {"role": "user", "content": "and stone"},
    {"role": "assistant", "content": "seven"},
]


@pytest.mark.parametrize(
    ("policy", "trained"),
    [
        ({}, f"north{STOP}seven{STOP}"),
        ({"train_on": ["user"]}, f"which river{STOP}and stone{STOP}"),
        ({"train_on": ["system", "user"]}, f"small{STOP}which river{STOP}and stone{STOP}"),
        ({"train_on": ["all"]}, f"small{STOP}which river{STOP}north{STOP}and stone{STOP}seven{STOP}"),
        ({"train_turns": "last"}, f"seven{STOP}"),
        ({"train_on": ["user"], "train_turns": "last"}, f"and stone{STOP}"),
    ],
)
def test_the_roles_that_the_policy_names_are_trained(tokenizer: str, policy: dict[str, Any], trained: str) -> None:
    assert _trained(ChatEncoder(tokenizer, **policy), TALK) == [trained]


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_a_message_that_the_data_excludes_is_not_trained(encoder: ChatEncoder, flag: dict[str, Any]) -> None:
    excluded = [message | (flag if message["content"] == "north" else {}) for message in TALK]
    assert _trained(encoder, excluded) == [f"seven{STOP}"]


def test_a_conversation_without_a_trained_message_is_refused(encoder: ChatEncoder) -> None:
    with pytest.raises(Refused, match="nothing to train"):
        encoder.encode([message | {"train": False} for message in TALK])


CALLING = [
    {"role": "user", "content": "which stone"},
    {"role": "assistant", "content": "the answer", "tool_calls": [shapes.call("find", key="copper")]},
    {"role": "tool", "content": "green"},
    {"role": "assistant", "content": "green"},
]
CALL = '{"name": "find", "parameters": {"key": "copper"}}'


def test_tool_calls_and_results_can_be_left_out_or_taken_in(tokenizer: str) -> None:
    assert _trained(ChatEncoder(tokenizer), CALLING) == [f"the answer{CALL}{STOP}green{STOP}"]
    assert _trained(ChatEncoder(tokenizer, train_tool_calls=False), CALLING) == [f"the answergreen{STOP}"]
    assert _trained(ChatEncoder(tokenizer, train_on=["tool"]), CALLING) == [f"green{STOP}"]


def test_reasoning_can_be_left_out(tokenizer: str) -> None:
    talk = [shapes.user("which"), shapes.said("north", reasoning_content="because")]
    assert _trained(ChatEncoder(tokenizer, THINKING), talk) == [f"<think>because</think>north{STOP}"]
    assert _trained(ChatEncoder(tokenizer, THINKING, train_reasoning=False), talk) == [f"north{STOP}"]


FORGETFUL = [
    shapes.user("which"),
    shapes.said("north", reasoning_content="because"),
    shapes.user("again"),
    shapes.said("seven", reasoning_content="therefore"),
]


@pytest.mark.parametrize(
    ("history", "trained"),
    [
        ("as_rendered", [f"north{STOP}<think>therefore</think>seven{STOP}"]),
        ("per_turn", [f"<think>because</think>north{STOP}", f"<think>therefore</think>seven{STOP}"]),
    ],
)
def test_history_that_a_template_rewrites_follows_the_policy(tokenizer: str, history: str, trained: list[str]) -> None:
    assert _trained(ChatEncoder(tokenizer, THINKING, history=history), FORGETFUL) == trained


def test_history_that_a_template_rewrites_can_be_an_error(tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, THINKING, history="error")
    with pytest.raises(Refused, match="history rewritten: message 1: its reasoning 'because' is not printed"):
        encoder.encode(FORGETFUL)
    assert _trained(encoder, FORGETFUL[:2]) == [f"<think>because</think>north{STOP}"]


SECRETIVE = THINKING.replace(
    "m.reasoning_content and", "m.reasoning_content and not m.tool_calls and (loop.previtem or m).role != m.role and"
).replace("m.content +", "m.content + (m.tool_calls[0].function.name if m.tool_calls else '') +")
"""THINKING, but never with the thoughts of a message with calls or of a second answer in a row."""


@pytest.mark.parametrize("history", ["as_rendered", "per_turn"])
@pytest.mark.parametrize(
    "talk",
    [
        [shapes.user("which"), shapes.said("x", reasoning_content="because", tool_calls=[shapes.call("find")])],
        [
            shapes.user("which"),
            shapes.said("x", reasoning_content="because", tool_calls=[shapes.call("find")]),
            *FORGETFUL,
        ],
        [shapes.user("which"), shapes.said("north"), shapes.said("seven", reasoning_content="because")],
    ],
    ids=["beside a call", "beside an earlier call", "second answer"],
)
def test_reasoning_that_the_template_never_prints_is_refused_although_the_template_prints_other_reasoning(
    tokenizer: str, talk: list[dict[str, Any]], history: str
) -> None:
    with pytest.raises(Refused, match=r"template drops reasoning: message \d: 'because' is not printed"):
        ChatEncoder(tokenizer, SECRETIVE, history=history).encode(talk)
    assert _trained(ChatEncoder(tokenizer, SECRETIVE), FORGETFUL) == [f"north{STOP}<think>therefore</think>seven{STOP}"]


BY_ID = """{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or () %}<call>{{ call.id }} {{ call.function.arguments | tojson }}{% endfor %}{{ "<|eot_id|>" }}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_the_name_of_a_called_tool_may_be_printed_inside_the_id(tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, BY_ID)
    for number in range(3):  # the later conversations have the shape of the first
        call = shapes.call("find", key=f"north {number}") | {"id": f"functions.find:{number}"}
        said = f'<call>functions.find:{number} {{"key": "north {number}"}}{STOP}'
        assert _trained(encoder, [shapes.user("which"), shapes.said("", tool_calls=[call])]) == [said]
    nameless = shapes.call("find", key="north") | {"id": "call_7"}
    with pytest.raises(Refused, match="template drops a tool call: message 1: 'find' is not printed"):
        encoder.encode([shapes.user("which"), shapes.said("", tool_calls=[nameless])])


def test_the_id_that_a_result_prints_is_not_the_name_of_a_call(tokenizer: str) -> None:
    mute = BY_ID.replace("<call>{{ call.id }} {{ call.function.arguments | tojson }}", "").replace(
        "{{ m.content }}", "{{ m.tool_call_id }}{{ m.content }}"
    )
    call = shapes.call("find") | {"id": "functions.find:0"}
    talk = [shapes.user("which"), shapes.said("functions.find:0 of find", tool_calls=[call])]
    result = {"role": "tool", "content": "north", "tool_call_id": "functions.find:0"}
    with pytest.raises(Refused, match="template drops a tool call: message 1: 'find' is not printed"):
        ChatEncoder(tokenizer, mute).encode([*talk, result, shapes.said("seven")])


@pytest.mark.parametrize("other", ["call_7", "finding:1", "functions.refind:1"])
def test_each_call_is_named_by_its_own_id(tokenizer: str, other: str) -> None:
    calls = [shapes.call("find", key="north") | {"id": name} for name in ("functions.find:0", other)]
    with pytest.raises(Refused, match="template drops a tool call: message 1: 'find' is not printed"):
        ChatEncoder(tokenizer, BY_ID).encode([shapes.user("which"), shapes.said("", tool_calls=calls)])


SPLITTING = THINKING.replace(
    "{{- m.content",
    """{%- set said = m.content %}
{%- if m.role == "assistant" and "</think>" in said %}
{%- set thought = said.split("</think>")[0].split("<think>")[-1].strip() %}{% set said = said.split("</think>")[-1].strip() %}
{%- if loop.index0 > last.user %}{{ "<think>" + thought + "</think>" }}{% endif %}
{%- endif %}
{{- said""",
)
"""THINKING, which also moves a thought out of the content, with or without an opening tag."""


@pytest.mark.parametrize(
    ("opening", "closing"),
    [("<think>\n", "\n</think>\n\n"), ("<think>", "</think>"), ("", "\n</think>\n\n"), ("", "</think>\n")],
)
def test_a_thought_inside_the_content_may_lack_its_opening_tag(tokenizer: str, opening: str, closing: str) -> None:
    talk = [
        shapes.user("which"),
        shapes.said(f"{opening}because{closing}north"),
        shapes.user("again"),
        shapes.said(f"{opening}therefore{closing}seven"),
    ]
    encoder = ChatEncoder(tokenizer, SPLITTING)
    assert _trained(encoder, talk[:2]) == [f"<think>because</think>north{STOP}"]
    assert _trained(encoder, talk) == [f"north{STOP}<think>therefore</think>seven{STOP}"]
    assert _trained(ChatEncoder(tokenizer, SPLITTING, train_reasoning=False), talk) == [f"north{STOP}seven{STOP}"]


@pytest.mark.parametrize(
    "answer", ["The tag </think> ends it.", "Use re.sub('<think>.*</think>', '') here.", "a\n</think> b\n</think>\nc"]
)
def test_an_answer_about_the_tag_of_a_thought_is_no_thought(tokenizer: str, answer: str) -> None:
    talk = [shapes.user("which"), shapes.said(answer)]
    assert _trained(ChatEncoder(tokenizer, train_reasoning=False), talk) == [f"{answer}{STOP}"]
    with pytest.raises(Refused, match=r"template (alters|drops) text"):
        ChatEncoder(tokenizer, SPLITTING).encode([*talk, *talk])


def test_unchanged_history_makes_one_example_under_every_policy(tokenizer: str) -> None:
    for history in ("as_rendered", "per_turn", "error"):
        assert _trained(ChatEncoder(tokenizer, history=history), TALK) == [f"north{STOP}seven{STOP}"]


def test_an_example_of_a_single_turn_has_the_prompt_of_inference(tokenizer: str) -> None:
    encoder = ChatEncoder(tokenizer, THINKING, history="per_turn")
    hf = encoder.tokenizer.hf
    for example, count in zip(encoder.encode(FORGETFUL), (1, 3), strict=True):
        prompt = hf.apply_chat_template(
            FORGETFUL[:count], chat_template=THINKING, add_generation_prompt=True, tokenize=False
        )
        assert hf.decode(example.tokens).startswith(prompt)
        assert hf.decode(example.tokens[~example.loss_mask]) == prompt


def _length(encoder: ChatEncoder, messages: list[dict[str, Any]]) -> int:
    return len(encoder.encode(messages)[0].tokens)


def test_a_long_conversation_is_cut_after_the_last_answer_that_fits(tokenizer: str, encoder: ChatEncoder) -> None:
    whole, first = _length(encoder, TALK), _length(encoder, TALK[:3])
    for capacity in (first, whole - 1):
        cutting = ChatEncoder(tokenizer, overflow="truncate", capacity=capacity)
        (example,) = cutting.encode(TALK)
        assert example.notes["conversations truncated"] == 1
        assert example.tokens.tolist() == encoder.encode(TALK[:3])[0].tokens.tolist()
    assert ChatEncoder(tokenizer, overflow="truncate", capacity=whole).encode(TALK)[0].notes == {}
    with pytest.raises(
        Refused, match=r"the messages up to its first answer do not fit into \d+ tokens; raise data\.capacity"
    ):
        ChatEncoder(tokenizer, overflow="truncate", capacity=first - 1).encode(TALK)


def test_a_long_conversation_is_split_before_users_with_the_system_prompt_again(
    tokenizer: str, encoder: ChatEncoder
) -> None:
    splitting = ChatEncoder(tokenizer, overflow="split", capacity=_length(encoder, TALK) - 1)
    first, second = splitting.encode(TALK)
    assert first.tokens.tolist() == encoder.encode(TALK[:3])[0].tokens.tolist()
    assert second.tokens.tolist() == encoder.encode([TALK[0], *TALK[3:]])[0].tokens.tolist()
    assert len(splitting.encode([*TALK, shapes.user("window")])) == 2


CALLS_FIRST = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}\n"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
)
"""A template that prints the calls of a message before its content."""


def test_reasoning_is_left_out_only_where_it_is_known_where_the_text_before_it_ends(tokenizer: str) -> None:
    thought = "<think>because</think>north"
    call = {"function": {"name": "look", "arguments": {"a": "river"}}}
    calling = [shapes.user("which"), {"role": "assistant", "content": thought, "tool_calls": [call]}]
    quiet = ChatEncoder(tokenizer, CALLS_FIRST, train_reasoning=False)
    with pytest.raises(Refused, match=r"reasoning after other text: message 1: .*; set train_reasoning = true"):
        quiet.encode(calling)
    assert _trained(quiet, [shapes.user("which"), shapes.said(thought)]) == [f"north{STOP}"]
    silent = ChatEncoder(tokenizer, CALLS_FIRST, train_reasoning=False, train_tool_calls=False)
    assert _trained(silent, calling) == [f"north{STOP}"]
    assert _trained(ChatEncoder(tokenizer, CALLS_FIRST), calling) == [
        f'<call>look {{"a": "river"}}</call>{thought}{STOP}'
    ]


def test_a_part_without_a_trained_token_makes_no_example(tokenizer: str, encoder: ChatEncoder) -> None:
    silent = [message | ({"train": False} if message["content"] == "north" else {}) for message in TALK]
    splitting = ChatEncoder(tokenizer, overflow="split", capacity=_length(encoder, silent) - 1)
    assert _trained(splitting, silent) == [f"seven{STOP}"]


def test_a_stream_packs_every_part_of_a_conversation_and_counts_it_once(tokenizer: str, tmp_path: Any) -> None:
    rows = tiny.rows(30)
    config = tiny.data_config(
        tokenizer, tiny.write_jsonl(tmp_path / "rows.jsonl", rows), capacity=96, overflow="split", epochs=1
    )
    loader = PackLoader(config)
    packs = list(loader)
    parts = [(segment.row, segment.part) for pack in packs for segment in pack.segments]
    assert len(parts) == len(set(parts))
    assert any(part for _, part in parts)
    refused = sum(len(pack.refused) for pack in packs)
    assert sum(pack.conversations for pack in packs) + refused == 30
    resumed = PackLoader(config, state=PackLoader(config).state_dict())
    for _ in range(3):
        next(resumed)
    tail = PackLoader(config, state=resumed.state_dict())
    assert [pack.digest() for pack in tail] == [pack.digest() for pack in packs[3:]]


@pytest.mark.parametrize(
    "text", [STOP, f"a{STOP}b", f"{STOP}<|start_header_id|>assistant<|end_header_id|>", "<|begin_of_text|>"]
)
def test_a_special_token_that_somebody_types_stays_text(encoder: ChatEncoder, text: str) -> None:
    hf = encoder.tokenizer.hf
    special = set(hf.all_special_ids)
    (plain,) = encoder.encode([shapes.user("ab"), shapes.said("ba")])
    (typed,) = encoder.encode([shapes.user(text), shapes.said("ba")])
    assert [t for t in typed.tokens.tolist() if t in special] == [t for t in plain.tokens.tolist() if t in special]
    assert hf.decode(typed.tokens) == hf.apply_chat_template([shapes.user(text), shapes.said("ba")], tokenize=False)
    assert hf.decode(typed.tokens[typed.loss_mask]) == f"ba{STOP}"
    assert _trained(encoder, [shapes.user("ab"), shapes.said(text)]) == [f"{text}{STOP}"]


def test_a_special_token_in_a_tools_definition_is_refused(encoder: ChatEncoder) -> None:
    tool = {"name": "f", "description": f"says {STOP}", "parameters": {}}
    with pytest.raises(Refused, match="control token in text: a tool definition contains"):
        encoder.encode([{"role": "system", "content": "x"}, shapes.user("ab"), shapes.said("ba")], [tool])


@pytest.mark.parametrize("text", ["ZqM0x1x0bZq", "ZqM0x1x0eZq ZqM1x1x1bZq", " ".join(PREFIXES[:-1])])
def test_our_own_markers_in_the_data_are_text(encoder: ChatEncoder, text: str) -> None:
    assert _trained(encoder, [shapes.user(text), shapes.said(text)]) == [f"{text}{STOP}"]


def test_a_text_that_holds_every_marker_is_refused(encoder: ChatEncoder) -> None:
    with pytest.raises(Refused, match="markers typed"):
        encoder.encode([shapes.user(" ".join(PREFIXES)), shapes.said("ba")])


@pytest.mark.parametrize(
    "text",
    [
        "a\0b",
        "a\r\nb\r\n\r\nc",
        "a\u200b\u200db",
        "שלום\u202eabc",
        "e\u0301\u0301",
        "\ufeffx",
        "🏳️‍🌈",
        "x" * 1_000_000,
        "\u2028",
    ],
    ids=lambda text: ascii(text[:8]),
)
def test_odd_text_survives(encoder: ChatEncoder, text: str) -> None:
    encoder = ChatEncoder(encoder.tokenizer.hf, capacity=2**24)
    assert _trained(encoder, [shapes.user(text), shapes.said(text)]) == [f"{text.strip()}{STOP}"]


def test_half_a_surrogate_pair_is_refused_by_name(encoder: ChatEncoder) -> None:
    with pytest.raises(Refused, match=r"not text: character .* is half of a surrogate pair"):
        encoder.encode([shapes.user("\ud800"), shapes.said("ba")])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: text.strip() and "Zq" not in text
)
TYPED = st.lists(st.one_of(TEXT, st.sampled_from(tiny.SPECIAL)), min_size=1, max_size=4).map("".join).filter(str.strip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(TYPED, TYPED), min_size=1, max_size=4), st.one_of(st.none(), TYPED))
def test_exactly_the_bytes_of_the_answers_are_trained(
    encoder: ChatEncoder, turns: list[tuple[str, str]], system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [shapes.user(question), shapes.said(answer)]
    (example,) = encoder.encode(messages)
    hf = encoder.tokenizer.hf
    assert hf.decode(example.tokens) == hf.apply_chat_template(messages, tokenize=False)
    assert hf.decode(example.tokens[example.loss_mask]) == "".join(f"{answer.strip()}{STOP}" for _, answer in turns)


@pytest.mark.realdata
@pytest.mark.parametrize("templates", shapes.DRAWN)
def test_the_shortcut_finds_the_turns_of_the_full_search(realdata: Any, templates: int | None) -> None:
    for path in shapes.drawn(shapes.published(realdata), templates):
        encoder = ChatEncoder(str(realdata / "tokenizers" / "llama3"), path.read_text())
        for messages, tools in shapes.SHAPES.values():
            conversation = parse_row({"messages": messages, "tools": tools})
            given_ = [template_message(message) for message in conversation.messages]
            args = (encoder.template, encoder.report.turn_format, encoder.tokenizer.control, given_, conversation.tools)
            try:
                located = locate(encoder.template, given_, conversation.tools)
                quick = find_turns(*args, located)
            except Refused:
                continue
            slow = [turn._replace(by_prompt=False) for turn in find_turns(*args, located, shortcut=False)]
            assert slow == [turn._replace(by_prompt=False) for turn in quick], path.stem


@pytest.mark.realdata
def test_qwen3_per_turn_trains_thought_and_answer_of_each_turn(realdata: Any) -> None:
    template = (realdata / "templates" / "qwen3.jinja").read_text()
    encoder = ChatEncoder(str(realdata / "tokenizers" / "qwen"), template, history="per_turn")
    messages, _ = shapes.SHAPES["reasoning, several turns"]
    first, second = encoder.encode(messages)
    hf = encoder.tokenizer.hf
    assert hf.decode(first.tokens[first.loss_mask]) == "<think>\n3 plus 4\n</think>\n\nSeven<|im_end|>"
    assert hf.decode(second.tokens[second.loss_mask]) == "<think>\none more\n</think>\n\nNine<|im_end|>"


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["qwen3_training", "llama3_training", "gptoss_training"])
def test_generation_tags_and_the_search_for_turns_agree(realdata: Any, name: str) -> None:
    """A template trains equal text with tags and with the tags removed."""
    tagged = (realdata / "templates" / f"{name}.jinja").read_text()
    untagged = tagged
    for spelling in ("{%- generation -%}", "{%- generation %}", "{% generation -%}", "{% generation %}"):
        untagged = untagged.replace(spelling, spelling.replace("generation", "if true"))
    for spelling in ("{%- endgeneration -%}", "{%- endgeneration %}", "{% endgeneration -%}", "{% endgeneration %}"):
        untagged = untagged.replace(spelling, spelling.replace("endgeneration", "endif"))
    tokenizer = str(realdata / "tokenizers" / "qwen")
    by_tags, by_evidence = ChatEncoder(tokenizer, tagged), ChatEncoder(tokenizer, untagged)
    assert by_tags.report.has_generation_tags
    assert not by_evidence.report.has_generation_tags
    for messages, tools in shapes.SHAPES.values():
        conversation = parse_row({"messages": messages, "tools": tools})
        try:
            expected = by_evidence.render(conversation)
        except Refused:
            continue
        assert by_tags.render(conversation) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in messages %}{{ a.content }}{% endfor", "not valid Jinja"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot print a user's message"),
        ("{{ 'x' * 10 ** 13 }}", "does too much: it makes a value of size 20,000,000,000,002"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "cannot print a user's message"),
        (
            "{% set n = namespace(s='x' * 1000) %}{% for i in range(90) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "the chat template does too much: it makes a value of size 131,072,000, above 67,108,864",
        ),
        (
            "{% set n = namespace(s='x' * 1000) %}{% for i in range(90) %}{% set n.s = (n.s + 'y') + n.s %}{% endfor %}",
            "the chat template does too much: it makes a value of size 131,203,071, above 67,108,864",
        ),
        # Small lists, then a large one where a small one may have been: each size is estimated.
        (
            "{% for i in range(50) %}{{ [messages] | tojson | length }}{% endfor %}{{ ['x' * 9000000] * 9 | tojson }}",
            "cannot print a user's message",
        ),
        ("{{ messages[0].content }}", "template drops text: message 1: .* is not printed; use a template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot print a user's message"),
        (tiny.TEMPLATE + "{{ [1, 2, 3] | random }}", "No filter named 'random'"),
        (tiny.TEMPLATE + "{{ lipsum() }}", "'lipsum' is undefined"),
        (
            tiny.TEMPLATE + "{{ messages[0].items }}",
            r"differently in each process \('<built-in method items of .* at 0x",
        ),
        (tiny.TEMPLATE + "{{ messages | unique }}", r"differently in each process \('<generator object .* at 0x"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_an_error(tokenizer: str, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatEncoder(tokenizer, template)


def test_a_template_that_does_not_end_is_stopped(tokenizer: str) -> None:
    endless = "{% for a in range(90000) %}" * 4 + "{% set b = a %}" + "{% endfor %}" * 4
    with pytest.raises(
        ValueError, match="the chat template does too much: a render needs more than 10,000,000 units of work"
    ):
        ChatEncoder(tokenizer, endless)
    patient = tiny.TEMPLATE.replace(
        "{{- message.content", "{%- if 'loop' in message.content %}" + endless + "{% endif %}{{- message.content"
    )
    encoder = ChatEncoder(tokenizer, patient)
    with pytest.raises(Refused, match="template does too much"):
        encoder.encode([shapes.user("loop"), shapes.said("ba")])
    assert _trained(encoder, [shapes.user("ab"), shapes.said("ba")]) == [f"ba{STOP}"]


def test_a_run_that_refuses_too_much_stops(tokenizer: str, tmp_path: Any) -> None:
    rows = [row for good in tiny.rows(100) for row in (good, {"text": "?"})]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=r"of 1\d\d rows are refused for other reasons than their length, more than data.max_refused = 0.25",
    ):
        list(PackLoader(tiny.data_config(tokenizer, path, max_refused=0.25)))
    assert len(list(PackLoader(tiny.data_config(tokenizer, path, max_refused=0.75)))) > 0


def test_a_template_message_has_a_text_content_and_every_reasoning_key() -> None:
    message = template_message(Message("assistant", None, "why", train=True))
    assert json.loads(json.dumps(message)) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "why",
        "thinking": "why",
        "reasoning": "why",
    }
