"""Published chat templates on every shape of conversation: right or refused, never wrong."""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import shapes
from transformers import AutoTokenizer

from sftstream import ChatEncoder, Refused, SourceConfig
from sftstream.formats import parse_row
from sftstream.sources.corpus import FileSet

pytestmark = pytest.mark.realdata


REAL_TEMPLATES = ("llama3_1", "qwen2_5", "qwen3", "gptoss", "GLM-4.6", "gemma3", "phi3")


class Case(NamedTuple):
    template: str
    shape: str
    verdict: str
    """Any of "right", "loss" (a payload not printed), "raises", "refused: ...", "WRONG: ..."."""


@pytest.fixture(scope="module")
def all_special(realdata: Path) -> Any:
    """Llama's tokenizer with the special tokens of all families."""
    tokenizer = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "llama3")
    tokenizer.add_special_tokens({"additional_special_tokens": list(shapes.SPECIAL)})
    return tokenizer


@pytest.fixture(scope="module", params=shapes.DRAWN)
def cases(realdata: Path, all_special: Any, request: pytest.FixtureRequest) -> list[Case]:
    return [
        case for path in shapes.drawn(shapes.published(realdata), request.param) for case in _judge(path, all_special)
    ]


def _judge(path: Path, tokenizer: Any) -> list[Case]:
    encoder = ChatEncoder(tokenizer, path.read_text(), date="2025-01-31")
    return [Case(path.stem, name, _verdict(encoder, path.stem, *shape)) for name, shape in shapes.SHAPES.items()]


def _verdict(encoder: ChatEncoder, template: str, messages: shapes.Messages, tools: Any) -> str:
    conversation = parse_row({"messages": copy.deepcopy(messages), "tools": copy.deepcopy(tools)})
    try:
        rendered = encoder.renderer.render_conversation(conversation)
        example = encoder.tokenizer.encode(rendered.texts[0])
    except Refused as refused:
        if refused.reason == "template raises":
            return "raises"
        return "loss" if refused.reason.startswith("template drops") else f"refused: {refused}"
    text, spans = rendered.texts[0].text, rendered.texts[0].spans
    if tuple(text[span.start : span.end] for span in spans) != tuple(_as_prompted(text, spans, template)):
        return f"WRONG: {[text[span.start : span.end] for span in spans]} of {text!r}"
    return _payloads_verdict(messages, encoder.tokenizer.hf.decode(example.tokens[example.loss_mask]))


def _as_prompted(text: str, spans: Any, template: str) -> list[str]:
    """Return the oracle's turns, without a thought tag that the generation prompt opens."""
    expected = shapes.turns(text, template)
    if len(expected) != len(spans):
        return expected
    ours = [text[span.start : span.end] for span in spans]
    return [
        mine if any(opened + mine == right for opened in shapes.OPENED) else right
        for mine, right in zip(ours, expected, strict=True)
    ]


def _payloads_verdict(messages: shapes.Messages, trained: str) -> str:
    own = [word for message in messages if message["role"] == "assistant" for word in shapes.words(message)]
    foreign = {word for m in messages if m["role"] != "assistant" for word in shapes.words(m)} - set(own)
    if wrong := [word for word in foreign if len(word) > 2 and shapes.count(trained, word)]:
        return f"WRONG: {wrong} is trained"
    return "right"


def _accepted(counts: Counter[str]) -> float:
    print(dict(counts))
    return counts["right"] / (counts["right"] + counts["refused"])


def _are_all(cases: list[Case], realdata: Path) -> bool:
    return {case.template for case in cases} == {path.stem for path in shapes.published(realdata)}


def test_no_template_is_ever_wrong(cases: list[Case]) -> None:
    wrong = [case for case in cases if case.verdict.startswith("WRONG")]
    assert not wrong, "\n".join(map(str, wrong))


def test_conversations_printed_whole_are_nearly_all_accepted(cases: list[Case], realdata: Path) -> None:
    counts = Counter(case.verdict.split(":")[0] for case in cases)
    for case in cases:
        if case.verdict.startswith("refused"):
            print(case.template, "|", case.shape, "|", case.verdict)
    assert _accepted(counts) >= (0.99 if _are_all(cases, realdata) else 0.95)


def test_a_payload_reported_as_lost_is_not_printed(cases: list[Case], realdata: Path, all_special: Any) -> None:
    for case in cases:
        if case.verdict == "loss":
            messages, tools = shapes.SHAPES[case.shape]
            template = (realdata / "templates" / f"{case.template}.jinja").read_text()
            told = all_special.apply_chat_template(
                [shapes.user("?")], tools=tools, chat_template=template, tokenize=False
            )
            text = all_special.apply_chat_template(
                copy.deepcopy(messages), tools=copy.deepcopy(tools), chat_template=template, tokenize=False
            )
            wanted = Counter(word for message in messages for word in shapes.words(message, thoughts=True))
            lost = [
                word for word, count in wanted.items() if shapes.count(text, word) - shapes.count(told, word) < count
            ]
            assert lost, case


@pytest.mark.parametrize("templates", shapes.DRAWN)
def test_stops_unknown_to_the_tokenizer_are_found(templates: int | None, realdata: Path) -> None:
    plain = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "llama3")
    judged = [case for path in shapes.drawn(shapes.published(realdata), templates) for case in _judge(path, plain)]
    assert [case for case in judged if case.verdict.startswith("WRONG")] == []
    counts = Counter(case.verdict.split(":")[0] for case in judged)
    assert _accepted(counts) >= (0.95 if _are_all(judged, realdata) else 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("template", REAL_TEMPLATES)
def test_every_real_conversation_is_trained_on_what_the_assistant_said(
    template: str, realdata: Path, all_special: Any
) -> None:
    """Compare spans with role markers, and trained tokens with spans byte for byte."""
    rows_of_a_file = int(os.environ.get("SFTSTREAM_ROWS") or 10**9)
    tokenizer = all_special
    if template == "qwen2_5":
        tokenizer = AutoTokenizer.from_pretrained(realdata / "tokenizers" / "qwen")
    encoder = ChatEncoder(tokenizer, (realdata / "templates" / f"{template}.jinja").read_text(), capacity=2**24)
    accepted = 0
    for path in sorted((realdata / "conversations").glob("*/*.json*")):
        rows = FileSet(SourceConfig(path=str(path)))
        for row in range(0, len(rows), max(1, len(rows) // rows_of_a_file)):
            try:
                rendered = encoder.renderer.render_conversation(parse_row(rows.read(row)))
            except Refused:
                continue
            text, spans = rendered.texts[0].text, rendered.texts[0].spans
            said = [text[span.start : span.end] for span in spans]
            assert said == _as_prompted(text, spans, template), rows.locate_row(row)
            example = encoder.tokenizer.encode(rendered.texts[0])
            trained = encoder.tokenizer.hf.decode(example.tokens[example.loss_mask])
            normalizer = encoder.tokenizer.hf.backend_tokenizer.normalizer
            whole = "".join(normalizer.normalize_str(part) if normalizer else part for part in said)
            assert trained == whole, rows.locate_row(row)
            accepted += 1
    print(f"{template}: {accepted:,} conversations")
    assert accepted
