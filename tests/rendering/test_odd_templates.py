"""Templates that alter, move or repeat what is said are refused, and lists of parts are read exactly."""

from __future__ import annotations

from typing import Any

import judge
import pytest

from sftstream import ChatEncoder, Refused
from sftstream.formats import parse_row

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
END = "<|im_end|>"


def template(content: str, messages: str = "messages") -> str:
    """Return a ChatML template that prints `content` for each of `messages`."""
    return f"{{% for m in {messages} %}}<|im_start|>{{{{ m.role }}}}\n{content}<|im_end|>\n{{% endfor %}}" + PROMPT


def printing(expression: str) -> str:
    return template(f"{{{{ {expression} }}}}")


def chat(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def trained(encoder: ChatEncoder, messages: list[dict[str, Any]]) -> str:
    (example,) = encoder.encode(messages)
    return str(encoder.tokenizer.hf.decode(example.tokens[example.loss_mask]))


def refusal(encoder: ChatEncoder, messages: list[dict[str, Any]]) -> str:
    with pytest.raises(Refused) as error:
        encoder.encode(messages)
    return str(error.value)


def error_of(text: str) -> str:
    with pytest.raises(ValueError, match="the chat template") as error:
        judge.open_encoder(text)
    return str(error.value)


ALTERING = (
    *("m.content[:6]", "m.content[1:]", "m.content[:-1]", "m.content[::-1]", "m.content[:400]", "m.content | first"),
    *("(m.content if m.content | length < 5 else m.content[0:5])", "m.content | list | join(' ')", "m.content | last"),
    *("m.content | lower", "m.content | upper", "m.content | title", "m.content | capitalize", "m.content.swapcase()"),
    *("m.content | truncate(8)", "m.content | truncate(255)", "m.content | wordwrap(40)", "m.content | indent(2)"),
    *(
        "m.content | e",
        "m.content | tojson",
        "m.content | pprint",
        "m.content | urlencode",
        "m | tojson",
        "[m.content]",
    ),
    *(
        "m.content | replace('n', 'm')",
        "m.content.split('x')[-1]",
        "m.content.split('\n')[0]",
        "m.content.split(' ')[-1]",
    ),
    *(
        "m.content | length",
        "m.content | striptags",
        "m.content | sort | join",
        "'%.5s' % m.content",
    ),
)


@pytest.mark.parametrize("expression", ALTERING)
def test_a_template_that_alters_texts_is_refused_at_start(expression: str) -> None:
    error = error_of(printing(expression))
    assert error.startswith("the chat template fails on the probe 'long texts': template alters text: message ")
    assert error.endswith("; use a template that prints texts unchanged")
    assert len(error) < 400


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize(
    "expression", ["m.content[1:]", "m.content | upper", "m.content.split('x')[-1]", "m.content | e"]
)
def test_a_template_that_alters_the_texts_of_one_role_is_refused_at_start(expression: str, role: str) -> None:
    error = error_of(printing(f"({expression}) if m.role == '{role}' else m.content"))
    index = ("user", "assistant").index(role)
    assert error.startswith(
        f"the chat template fails on the probe 'long texts': template alters text: message {index}: "
    )


def test_what_an_assistant_says_is_never_escaped_as_json() -> None:
    as_json = "m.content | tojson if m.role == '%s' and messages | length == 3 else m.content"
    question, answer = chat("hi", "seven")
    system = {"role": "system", "content": "s"}
    encoder = judge.open_encoder(printing(as_json % "assistant"))
    assert trained(encoder, [system, question, answer]) == f'"seven"{END}'
    assert refusal(encoder, [system, question, {**answer, "content": 'a "b"'}]) == (
        "template alters text: message 2: 'a \"b\"' is printed as 'a \\\\\"b\\\\\"'; use a template that prints texts unchanged"
    )
    encoder = judge.open_encoder(printing(as_json % "user"))
    assert trained(encoder, [system, {**question, "content": 'a "b"'}, answer]) == f"seven{END}"


def test_white_space_may_be_removed_and_thoughts_may_be_cut() -> None:
    assert trained(judge.open_encoder(printing("m.content | trim")), chat(" hi", " seven\n")) == f"seven{END}"
    cutting = judge.open_encoder(printing("m.content.split('</think>')[-1].lstrip() if not loop.last else m.content"))
    thinking = chat("hi", "<think>hm</think>seven", "why?", "<think>so</think>it is")
    assert trained(cutting, thinking) == f"seven{END}<think>so</think>it is{END}"


def test_a_list_of_parts_is_passed_only_to_a_template_that_prints_its_texts_exactly() -> None:
    parts = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    either = "{% if m.content is string %}{{ m.content }}{% else %}" + parts + "{% endif %}"
    for content, reads_parts in ((parts, True), ("{{ m.content[0].text }}", True), (either, False)):
        encoder = judge.open_encoder(template(content))
        assert encoder.renderer.template.content_as_parts is reads_parts
        assert trained(encoder, chat("it's", 'a "b"\n\\c', "", "")) == f'a "b"\n\\c{END}{END}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{% for p in m.content %}[{{ p.type }}]{{ p.text }}{% endfor %}", "template alters text: message 0: "),
        ("{% for p in m.content %}{{ p.text | tojson if p.text }}{% endfor %}", "template drops text: message 1: "),
        ("{% for p in m.content %}{{ p.text | upper }}{% endfor %}", "template drops text: message 1: "),
        (
            "{% if m.content is string %}{{ m.content[:6] }}{% else %}{{ m.content[0].text }}{% endif %}",
            "template alters text: message 0: ",
        ),
        (
            "{% if m.content is string %}{{ m.content | length }}{% else %}{{ m.content }}{% endif %}",
            "template alters text: message 0: ",
        ),
    ],
)
def test_a_template_that_prints_neither_texts_nor_parts_exactly_is_refused_at_start(content: str, reason: str) -> None:
    assert f" fails on the probe 'long texts': {reason}" in error_of(template(content))


ROLE = "(messages | selectattr('role', 'eq', '%s') | list)"


@pytest.mark.parametrize(
    "messages",
    [
        *("messages | reverse", "messages[::-1]", "messages[1:] + messages[:1]", "messages | sort(attribute='role')"),
        *(f"{ROLE % 'user'} + {ROLE % 'assistant'}", f"{ROLE % 'assistant'} + {ROLE % 'user'}"),
        "(messages | reverse if messages | length > 2 else messages)",
    ],
)
def test_a_template_that_prints_an_answer_before_its_question_is_refused_at_start(messages: str) -> None:
    error = error_of(template("{{ m.content }}", messages))
    assert ": messages out of order: message " in error
    assert error.endswith("; use a template that prints messages in order")


def test_an_answer_that_is_printed_before_its_question_is_refused() -> None:
    backwards = "(messages | reverse if messages[0].content == 'back' else messages)"
    encoder = judge.open_encoder(template("{{ m.content }}", backwards))
    assert trained(encoder, chat("hi", "seven")) == f"seven{END}"
    late = [{"role": "user", "content": "back"}, *chat("hi", "seven")]
    backwards = "(messages | reverse if messages | length == 3 else messages)"
    encoder = judge.open_encoder(template("{{ m.content }}", backwards))
    for answer in ("seven", ""):
        late[2]["content"] = answer
        assert refusal(encoder, late) == (
            f"messages out of order: message {1 if answer else 0} is printed after message {2 if answer else 1}; "
            "use a template that prints messages in order"
        )


def test_a_system_prompt_and_the_results_of_tools_may_be_moved() -> None:
    system_first = (
        "messages | selectattr('role', 'eq', 'system') | list + messages | rejectattr('role', 'eq', 'system') | list"
    )
    encoder = judge.open_encoder(template("{{ m.content }}", system_first))
    messages = [*chat("hi", "seven"), {"role": "system", "content": "be"}, *chat("why?", "so")]
    assert trained(encoder, messages) == f"seven{END}so{END}"
    sorted_results = "(messages[:2] + messages[2:4] | reverse | list + messages[4:])"
    called = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    encoder = judge.open_encoder(template(called, f"({sorted_results} if messages | length == 5 else messages)"))
    calls = [{"id": i, "type": "function", "function": {"name": f"f{i}", "arguments": {}}} for i in "ab"]
    results = [{"role": "tool", "tool_call_id": i, "content": f"r{i}"} for i in "ab"]
    question, answer = chat("hi", "seven")
    asked = [question, {"role": "assistant", "content": "", "tool_calls": calls}, *results, answer]
    rendered = encoder.render(parse_row({"messages": asked}))
    assert [rendered.text[span.start : span.end] for span in rendered.spans] == [f"fafb{END}", f"seven{END}"]
    assert rendered.text.index("rb") < rendered.text.index("ra")


def test_a_question_printed_again_before_the_end_of_the_answer_is_refused_at_start() -> None:
    again = "{{ m.content }}{% if m.role == 'assistant' %} ({{ messages[loop.index0 - 1].content }}){% endif %}"
    assert error_of(template(again)) == (
        "the chat template fails on the probe 'long texts': messages out of order: message 0 is printed again after "
        "message 1; use a template that prints messages in order"
    )


@pytest.mark.parametrize("content", ["{{ m.content ~ m.content }}", "{{ m.content }} | {{ m.content }}"])
def test_an_answer_printed_twice_in_its_turn_is_refused(content: str) -> None:
    encoder = judge.open_encoder(template(content))
    assert refusal(encoder, chat("hi", "seven")) == (
        "text printed twice: message 1 is printed twice in the same turn; use a template that prints each answer once"
    )
    assert encoder.report.shapes["question, answer"].startswith("whole, but text printed twice")
    questions = judge.open_encoder(template("{{ m.content }}{{ m.content if m.role == 'user' }}"))
    assert trained(questions, chat("hi", "seven")) == f"seven{END}"


@pytest.mark.parametrize("messages", ["messages[:1]", "messages[:-1]", "messages[::2]"])
def test_a_template_without_the_answer_is_refused_at_start(messages: str) -> None:
    error = error_of(template("{{ m.content }}", messages))
    assert error.startswith("the chat template fails on the probe 'long texts': template drops text: message 1: ")
    assert error.endswith(" is not printed; use a template that prints what an assistant says")
