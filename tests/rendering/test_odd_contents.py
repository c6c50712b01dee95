"""Odd texts in place of a word: the template's own text results, and exactly the same turns are trained.

A conversation is rendered with a plain word, then with an odd text in the word's place. If transformers prints the odd
text where it printed the word, the trained texts must be those of the plain conversation with the word replaced. Nothing
of the implementation decides this. SFTSTREAM_SEED and SFTSTREAM_DRAWS set the quick draw,
SFTSTREAM_TEMPLATES the number of templates drawn for the slow test (default: all).
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import judge
import pytest
import shapes

from sftstream import ChatEncoder, Refused
from sftstream.formats import parse_row
from sftstream.records import REASONING_KEYS

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.SystemRandom().randrange(10**6))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 12)
SHAPES = ("u a", "u a u a", "s u a", "u ac t a", "s u ac t a u a", "u ar", "u a a", "a u a")

ODD = (
    *("", " ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x85", "\u2028"),
    *(" x", "x ", " x ", "\nx", "x\n", "x\n\n", "\r\nx\r\n", "x\r\ny", "x\ty", "x  y", "  \n x", "x\u00a0", "\u2003x"),
    *("\x00", "x\x00y", "\x1b[2J", "x\x07", "\x7f", "\ufffd", "\ufffe", "\x1c\x1d", "\u202eabc\u202c", "\u2066x\u2069"),
    *(
        "é",
        "e\u0301",
        "你好。",
        "日本語",
        "한국어",
        "שלום",
        "مرحبا بالعالم",
        "ไทย",
        "हिन्दी",
        "👋🏽",
        "👨‍👩‍👧‍👦",
        "🇩🇪",
        "𝔘𝔫𝔦",
        "ﷺ",
        "ẞß",
    ),
    *("ZqM", "Zq", "ZqM0x1x0bZq", "ZqM1x1x1eZq", "ZqM0x1x0bZqxZqM0x1x0eZq", "Zq ZqNB ZqM", "bZq", "wa01cq"),
    *(
        "x <think>y</think> z",
        "<think>",
        "</think>",
        "x</think>",
        "<think>x",
        "<thinking>x</thinking>",
        "[THINK]x[/THINK]",
    ),
    *(
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "[INST]",
        "x [/INST] y",
        "</s>",
        "<s>",
        "<|eot_id|>x",
        "<|end|>",
        "<|user|>",
    ),
    *("<tool_call>", "</tool_call>", '{"name": "f"}', "assistant", "assistant\n", "user: x", "\nassistant: y", "###"),
    *(
        "{{ x }}",
        "{% if a %}",
        "{# c #}",
        "%s %d",
        "{0} {}",
        "\\n \\u0041",
        '"',
        "'",
        "\\",
        "`x`",
        "<b>&amp;</b>",
        "$x^2$",
    ),
    *("x" * 3000, "ab " * 700, "9" * 400, "\n" * 60 + "x", "None", "null", "0", "False", "[]", "-"),
)
"""Texts that take the place of a word."""


def odd_texts(encoder: ChatEncoder) -> list[str]:
    """Return the odd texts, and those made of the template's own texts."""
    form = encoder.report.turn_format
    own = [*form.stops, *form.call_stops, form.prompt, form.role_marker]
    own += [f"x{text}y" for text in own] + [text[:-1] for text in own] + [text.strip() for text in own]
    return list(dict.fromkeys([*ODD, *own]))


def printed(odd: str) -> list[str]:
    """Return the forms in which a template may print a text as it is."""
    forms = [odd, odd.strip(), odd.lstrip(), odd.rstrip()]
    return list(dict.fromkeys([*forms, *(json.dumps(odd, ensure_ascii=a)[1:-1] for a in (False, True))]))


def trained(encoder: ChatEncoder, messages: Any, tools: Any) -> tuple[str, list[str]]:
    """Return the text, and the decoded trained tokens of each span; raises Refused."""
    row = parse_row(json.loads(json.dumps({"messages": messages, "tools": tools})))
    rendered = encoder.renderer.render_conversation(row)
    (examples,) = encoder.tokenize_all([rendered])
    if isinstance(examples, Refused):
        raise examples
    (text,), (example,) = rendered.texts, examples
    spans = [text.text[span.start : span.end] for span in text.spans]
    decoded = encoder.tokenizer.hf.decode(example.tokens[example.loss_mask])
    assert decoded == "".join(spans)
    return text.text, spans


class Case(NamedTuple):
    """A conversation, one of its words, and the trained spans; no spans if it is refused."""

    shape: str
    word: str
    messages: Any
    tools: Any
    text: str
    spans: list[str]


def cases(encoder: ChatEncoder, template: str, shapes: Sequence[str] = SHAPES) -> list[Case]:
    """Return a case for each word that is printed once, of each shape that is accepted."""
    found = []
    for shape in shapes:
        messages, tools = judge.conversation(shape)
        text = judge.Oracle(encoder, template, messages, tools).text
        with suppress(Refused):
            _, spans = trained(encoder, messages, tools)
            words = dict.fromkeys(word for message in messages for word in judge.words(message))
            found += [
                Case(shape, word, messages, tools, str(text), spans) for word in words if str(text).count(word) == 1
            ]
    return found


def verdict(encoder: ChatEncoder, template: str, case: Case, odd: str) -> str:
    """Return "exact", "refused", "rewritten" (not printed as the word was), or what is wrong."""
    replaced = json.loads(json.dumps(case.messages).replace(case.word, json.dumps(odd)[1:-1]))
    try:
        found, spans = trained(encoder, replaced, case.tools)
    except Refused:
        return "refused"
    # An empty reasoning is no reasoning.
    empty = [{k: v for k, v in m.items() if v or k not in REASONING_KEYS} for m in replaced]
    text = judge.Oracle(encoder, template, empty, case.tools).text
    if found != text:
        return f"another text: {found!r} is not {text!r}"
    forms = [form for form in printed(odd) if case.text.replace(case.word, form) == text]
    # A message without any text has no turn if its start is not proved, so a stop alone may be untrained.
    silent = {"", *encoder.report.turn_format.stops}
    # A `<think>` that the generation prompt holds is not trained.
    opened = ("", "<think>") if "<think>" in encoder.report.turn_format.prompt else ("",)
    expected = [
        [t for span in case.spans if (t := span.replace(case.word, form).removeprefix(tag)).strip() not in silent]
        for form in forms
        for tag in opened
    ]
    spans = [span for span in spans if span.strip() not in silent]
    return "rewritten" if not forms else "exact" if spans in expected else f"{spans} is not {expected[0]}"


def wrong(path: Path, encoder: ChatEncoder, chosen: Iterable[tuple[Case, str]], counts: Counter[str]) -> list[str]:
    """Count the verdicts, and return what is wrong."""
    template, found = path.read_text(encoding="utf-8"), []
    for case, odd in chosen:
        kind = verdict(encoder, template, case, odd)
        counts[kind if kind in ("exact", "refused", "rewritten") else "wrong"] += 1
        if kind not in ("exact", "refused", "rewritten"):
            found.append(f"{path.stem} [{case.shape}] {case.word} -> {odd[:60]!r}: {kind[:600]}")
    return found


def templates(realdata: Path) -> list[Path]:
    return [path for folder in ("templates", "templates_more") for path in sorted((realdata / folder).glob("*.jinja"))]


def test_odd_texts_change_no_turn_of_a_plain_template(tmp_path: Path) -> None:
    path, counts = tmp_path / "chatml.jinja", Counter[str]()
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = judge.open_encoder(path.read_text())
    known = cases(encoder, path.read_text(), ("u a",))
    chosen = [(case, odd) for case in known for odd in odd_texts(encoder)]
    assert wrong(path, encoder, chosen, counts) == []
    assert counts["exact"] > 0.95 * len(chosen), counts


@pytest.mark.realdata
def test_a_draw_of_odd_texts_changes_no_turn(realdata: Path) -> None:
    print(f"SFTSTREAM_SEED={SEED}")
    draw, counts, found = random.Random(SEED), Counter[str](), []
    for path in draw.sample(templates(realdata), 8):
        template = path.read_text(encoding="utf-8")
        encoder = judge.open_encoder(template)
        known, odd = cases(encoder, template, draw.sample(SHAPES, 2)), odd_texts(encoder)
        chosen = [(draw.choice(known), draw.choice(odd)) for _ in range(DRAWS) if known]
        found += wrong(path, encoder, chosen, counts)
    assert found == [], f"SFTSTREAM_SEED={SEED}"


@pytest.mark.slow
@pytest.mark.realdata
def test_no_odd_text_changes_a_turn(realdata: Path) -> None:
    counts, found = Counter[str](), []
    for path in shapes.drawn(templates(realdata)):
        template = path.read_text(encoding="utf-8")
        encoder = judge.open_encoder(template)
        known = cases(encoder, template)
        found += wrong(path, encoder, [(case, odd) for case in known for odd in odd_texts(encoder)], counts)
    print(dict(counts))
    assert found == []
    assert counts["exact"] > sum(counts.values()) / 2
