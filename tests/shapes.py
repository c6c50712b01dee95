"""Conversations of every shape that a chat template must be judged on, and what is right in each family of templates.

The oracle knows the families' role markers, written by hand from their documentation; it shares nothing with the
implementation that it judges.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Messages = list[dict[str, Any]]

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.SystemRandom().randrange(10**6))
DRAWN = [8, pytest.param(None, marks=pytest.mark.slow)]
"""Numbers of templates for `drawn`: a quick draw, and all of them in the slow suite."""


def published(realdata: Path) -> list[Path]:
    return sorted((realdata / "templates").glob("*.jinja"))


def drawn(paths: list[Path], count: int | None = None) -> list[Path]:
    """Return `count` of `paths` at random; None for SFTSTREAM_TEMPLATES, by default all."""
    count = min(count or int(os.environ.get("SFTSTREAM_TEMPLATES") or len(paths)), len(paths))
    print(f"SFTSTREAM_SEED={SEED} SFTSTREAM_TEMPLATES={count}")
    return sorted(random.Random(SEED).sample(paths, count)) if count < len(paths) else paths


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(function: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": function, "arguments": arguments}}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": "get_weather", "tool_call_id": "abcdefghi"}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
]
PARIS = call("get_weather", city="Paris")
THOUGHT = "<think>\n3 plus 4\n</think>\n\n"

SHAPES: dict[str, tuple[Messages, list[dict[str, Any]] | None]] = {
    "single": ([user("Hi there"), said("Hello you!")], None),
    "several turns": ([user("Hi there"), said("Hello you!"), user("And now?"), said("Good bye.")], None),
    "system": ([system("Be terse."), user("Hi there"), said("Hello you!")], None),
    "system, several turns": (
        [system("Be terse."), user("Hi there"), said("Hello you!"), user("And now?"), said("Good bye.")],
        None,
    ),
    "white space": ([user("  Hi there\n"), said("\n Hello you!  \n"), user("next"), said(" fin ")], None),
    "reasoning": ([user("3+4?"), said("Seven", reasoning_content="3 plus 4")], None),
    "reasoning, several turns": (
        [
            user("3+4?"),
            said("Seven", reasoning_content="3 plus 4"),
            user("and then"),
            said("Nine", reasoning_content="one more"),
        ],
        None,
    ),
    "inline thought": ([user("3+4?"), said(f"{THOUGHT}Seven")], None),
    "inline thoughts, several turns": (
        [user("3+4?"), said(f"{THOUGHT}Seven"), user("and then"), said(f"{THOUGHT}Eight")],
        None,
    ),
    "tool": ([user("Weather?"), said("", tool_calls=[PARIS]), result("sunny"), said("It is fine.")], TOOLS),
    "tool with text": (
        [user("Weather?"), said("Let me look.", tool_calls=[PARIS]), result("sunny"), said("It is fine.")],
        TOOLS,
    ),
    "tool, system, several turns": (
        [
            system("Be terse."),
            user("Weather?"),
            said("", tool_calls=[PARIS]),
            result("sunny"),
            said("It is fine."),
            user("Thanks"),
            said("Welcome"),
        ],
        TOOLS,
    ),
    "tool with thoughts": (
        [
            user("Weather?"),
            said("", reasoning_content="must look", tool_calls=[PARIS]),
            result("sunny"),
            said("It is fine.", reasoning_content="got it"),
        ],
        TOOLS,
    ),
    "two calls": (
        [
            user("Weather?"),
            said("", tool_calls=[PARIS, call("get_weather", city="Rome")]),
            result("sunny"),
            result("rainy"),
            said("Both."),
        ],
        TOOLS,
    ),
    "ends with a call": ([user("Weather?"), said("", tool_calls=[PARIS])], TOOLS),
    "two answers in a row": ([user("Hi there"), said("Hello you!"), said("More.")], None),
    "assistant first": ([said("Well, well."), user("Hi there"), said("Hello you!")], None),
    "ends with the user": ([user("Hi there"), said("Hello you!"), user("And now?")], None),
    "empty answer": ([user("Hi there"), said(""), user("say"), said("Hello")], None),
    "unicode": ([user("Здравствуй 👋🏽"), said("你好 é e\u0301 \u200b שלום")], None),
    "the same words": ([user("Hello"), said("Hello"), user("Hello"), said("Hello")], None),
    "long": ([turn for i in range(6) for turn in (user(f"q{i}"), said(f"a{i}"))], None),
    "tools unused": ([user("Hi there"), said("Hello you!")], TOOLS),
    "arguments of all kinds": (
        [
            user("Go"),
            said("", tool_calls=[call("get_weather", city='A "b"\nc', n=3, ok=True, many=[1, "x"], deep={"k": "v"})]),
            result('{"t": 3}'),
            said("Done"),
        ],
        TOOLS,
    ),
}


class Family(NamedTuple):
    """How an assistant's turn looks: where it begins, where it ends, and which templates are so."""

    begins: str
    ends: str
    templates: str
    """A regular expression on the file's name."""


FAMILIES = (
    Family(r"<\|im_start\|>assistant\n?", r"<\|im_end\|>", "smollm|lfm2|hermes|qwen|nemotron"),
    Family(r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|eot_id\|>", "llama3|llama-3"),
    Family(r"<start_of_turn>model\n", r"<end_of_turn>", "gemma"),
    Family(r"<\|assistant\|>\n", r"<\|end\|>", "phi"),
    Family(r"(?:\[/INST\]|\[/TOOL_RESULTS\])(?!\[TOOL_RESULTS\])", r"<\|eot_id\|>", "mistral"),
    Family(r"<\|assistant\|>", r"(?=<\|assistant\|>)|<\|(?:user|observation)\|>|$", "glm"),
    Family(r"<\|im_assistant\|>assistant<\|im_middle\|>", r"<\|im_end\|>", "kimi"),
    Family(r"<\|start_of_role\|>assistant<\|end_of_role\|>", r"<\|end_of_text\|>", "granite"),
    Family(r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>", "cohere"),
)

OPENED = ("", "<think>", "<think>\n", "<think></think>", "<think>\n</think>")
"""What a generation prompt may say already, so that the model does not."""

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|observation|>", "[gMASK]", "<sop>"),
    *(
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
    ),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[CALL_ID]", "[TOOL_CONTENT]"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜tool▁calls▁begin｜>"),
    *("<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>"),
    *("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|tool_calls_section_begin|>"),
    *("<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>"),
)
"""The families' special tokens, which a tokenizer of another family does not have."""


def turns(text: str, template: str) -> list[str]:
    """The assistant's turns in a text, header left out and stop token left in."""
    if "gpt" in template:
        return _harmony_turns(text)
    if "deepseek" in template:
        return _deepseek_turns(text)
    begins, ends, _ = next(family for family in FAMILIES if re.search(family.templates, template.lower()))
    found, at = [], 0
    while opened := re.compile(begins).search(text, at):
        closed = re.compile(ends).search(text, opened.end())
        if closed is None:
            break
        found.append(text[opened.end() : closed.end()])
        at = max(closed.start(), opened.end())
    return found


def _harmony_turns(text: str) -> list[str]:
    """A thought and what follows it are one turn."""
    found: list[str] = []
    thinking = False
    for piece in text.split("<|start|>"):
        if not piece.startswith("assistant"):
            continue
        if thinking:
            found[-1] += "<|start|>" + piece
        else:
            found.append(piece.removeprefix("assistant"))
        thinking = "<|channel|>analysis" in piece
    return found


def _deepseek_turns(text: str) -> list[str]:
    """What is neither a user's nor a tool's; after a tool there is no header."""
    others = (
        r"<｜User｜>.*?(?=<｜Assistant｜>|$)|<｜tool▁output▁begin｜>.*?<｜tool▁output▁end｜>|"
        r"<｜tool▁outputs▁(?:begin|end)｜>"
    )
    rest = re.sub(others, "", text.removeprefix("<|begin_of_text|>").removeprefix("Be terse."), flags=re.DOTALL)
    return re.findall(r".*?<｜end▁of▁sentence｜>", rest.replace("<｜Assistant｜>", ""), flags=re.DOTALL)


def words(message: dict[str, Any], *, thoughts: bool = False) -> list[str]:
    """What a message says, white space around it apart."""
    strings = [text.strip() for text in message["content"].replace("<think>", "").split("</think>")]
    for one in message.get("tool_calls", ()):
        strings += [one["function"]["name"], *_strings(one["function"]["arguments"])]
    if thoughts:
        strings.append(message.get("reasoning_content", ""))
    return [text for text in strings if text]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def count(text: str, word: str) -> int:
    """How often words stand in a text, as they are or as JSON has them."""
    return max(text.count(word), text.count(json.dumps(word, ensure_ascii=False)[1:-1]))
