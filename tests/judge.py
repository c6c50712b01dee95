"""Judge masks by marker words: conversations of many shapes under any chat template, with an independent oracle.

Each text of a conversation is a word that occurs nowhere else, such as `wa03cq` (assistant, message 3, content). The
oracle renders with transformers' `apply_chat_template`, finds the words in the text, and knows role markers and stop
tokens from a list written by hand. A mask is right if every word of a trained message lies in a span, no word of
another message does, no role marker does, each span ends with a stop, and no span begins before the end of the text
that inference would show. Nothing here is shared with the implementation.

`python tests/judge.py DIRECTORY... [--policies]` prints the verdicts by template.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import tiny
from tokenizers import AddedToken

from sftstream import ChatEncoder, Refused
from sftstream.formats import parse_row

Messages = list[dict[str, Any]]

SHAPES = tuple(
    """
    u a | u a u a | u a u a u a u a | s u a | s u a u a | s u a u a u a | u~ a~ | u a~ | u a~ u a~ | u a u a~ | s~ u a
    u al | u an u an | u a u a u a u a u a u a u a u a
    u ar | u ar u ar | u ar u a | u a u ar | u ar u ar u ar | s u ar | u ai | u ai u ai | u ai u ar | u ar u ai | u ai u a
    u ar- | u ar- u a | u ar- u ar- | u ak | u ak u a
    u ac t a | u ac t a u a | s u ac t a | s u ac t a u a | u ac t a u ac t a | u ac t ac t a | u ac t ac t ac t a
    u a u ac t a | u ac t a a | u ac | u a u ac | u ac t | u ac t ac | u ac t u a | u ac u a | u ac a | u ac ac
    u ac u- a | u ac u_ a | u ac t- a | u ac t_ a | u ac t- a u a | u ac t- ac t- a | u ac tj a | u aJ t a | u aj t a
    u acc t t a | u acc t t a u a | u acc t t | u acc | u acc t a | u acc t- t- a | s u acc t t acc t t a
    u atc t a | u atc t a u a | u atc | u atc t | u atc t atc t a
    u arc t a | u arc t ar | u arc t arc t ar | u arc t ar u a | u artc t ar | u arc | u aic t ai | u ac t ai
    u a a | u a a a | u a a u a | a | a u a | a a | a- u a | s a | s a u a | u u a | u a u u a | u | u a u | s | s u
    u a- | u a- u a | u a u a- | u a_ u a | u a- a | u a a- | u- a | u_ a | u- a u a | u a u- a | u- a-
    s- u a | s_ u a | s s u a | u s a | u a s u a | u a s | u a u s a | u ac s t a | u ac t s a | u ac t a s u a
    t a | u t a | u ac t t a | u a+T | s u a u a+T | u ar u ar+T | u a u a u a+T
    u aN | u aN u a | uN a | u ax | ux a | uT a | u aT | u aT u a | u ac tT a
    """.replace("\n", "|").split("|")
)
"""Conversations as messages by role and kind; see `_message`. `+T`: tools are given though none is called."""
SHAPES = tuple(shape.strip() for shape in SHAPES if shape.strip())

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The place."}},
                "required": ["city"],
            },
        },
    }
    for name in ("get_weather", "get_time")
]

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
WORD = re.compile(r"w([suat])(\d\d)([a-z])q")


def conversation(shape: str) -> tuple[Messages, list[dict[str, Any]] | None]:
    """Return messages and tools of a shape such as `u ac t a`."""
    codes = shape.removesuffix("+T").split()
    messages = [_message(code, index) for index, code in enumerate(codes)]
    calls: list[str] = []
    for message in messages:
        if message["role"] == "tool" and calls:
            message["tool_call_id"] = calls.pop(0)
        if message.get("tool_calls"):
            calls = [call["id"] for call in message["tool_calls"]]
    tools = shape.endswith("+T") or any("tool_calls" in m or m["role"] == "tool" for m in messages)
    return messages, copy.deepcopy(TOOLS) if tools else None


def _message(code: str, index: int) -> dict[str, Any]:
    """Return the message of a code: a role, then kinds.

    `r` reasoning, `i` thought in the content, `t` text (beside calls), `c` a call each, `-` empty, `_` blank,
    `~` white space around, `l` many lines, `n` other scripts, `k` a thought amid the text, `N` a name, `j` a result
    or a call without arguments, `J` arguments of all kinds, `x` our own markers, `T` a special token's text.
    """
    role, kinds = code[0], code[1:]
    word = {kind: f"w{role}{index:02d}{kind}q" for kind in "crabde"}
    calls = kinds.count("c") + kinds.count("J") + (role == "a" and "j" in kinds)
    content = "" if "-" in kinds or (calls and "t" not in kinds) else word["c"]
    for kind, text in {
        "_": "  \n",
        "~": f" \n{word['c']}  \n",
        "l": f"# {word['c']}\n\n```python\nprint('a')\n```\n- user: x\n- assistant: y",
        "n": f"你好 {word['c']} é שלום 👋🏽",
        "k": f"{word['c']} <think>{word['d']}</think> {word['e']}",
        "x": f"ZqM0x1x0bZq {word['c']} ZqM0x1x0eZq ZqM",
        "T": f"{word['c']} <|im_end|> [INST] <|eot_id|>",
    }.items():
        content = text if kind in kinds else content
    if role == "t" and "j" in kinds:
        content = f'{{"t": 3, "w": "{word["c"]}"}}'
    if "i" in kinds:
        content = f"<think>\n{word['r']}\n</think>\n\n{content}"
    message: dict[str, Any] = {"role": ROLES[role], "content": content}
    if "r" in kinds:
        message |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), word["r"])
    if calls:
        arguments: dict[str, Any] = {"city": word["a"]}
        if "J" in kinds:
            arguments |= {"n": 3, "ok": True, "many": [1, word["b"]], "deep": {"k": f'"{word["d"]}"\n'}}
        message["tool_calls"] = [
            {
                "id": f"callid{index}a{number}",
                "type": "function",
                "function": {
                    "name": TOOLS[number]["function"]["name"],
                    "arguments": {} if "j" in kinds else arguments if not number else {"city": word["b"]},
                },
            }
            for number in range(calls)
        ]
    if role == "t":
        message |= {"name": "get_weather", "tool_call_id": "callid1a0"}
    return message | ({"name": "zoe"} if "N" in kinds else {})


HEADERS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<\|start\|>|<\|START_OF_TURN_TOKEN\|>|<\|header_start\|>"
    r"|<\|start_of_role\|>|<｜User｜>|<｜Assistant｜>|<\|im_(?:user|assistant|system)\|>|<\|(?:user|assistant|system|observation)\|>"
    r"|\[INST\]|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\]|\[/INST\]|<\|(?:user|system|developer|assistant)_start\|>"
    r"|<\|begin_(?:user|assistant|system|tool_result)\|>|<seed:bos>|(?:assistant|user|system|function result)<\|role_sep\|>"
    r"|<(?:user|assistant|system|tool_response)>\n"
    r"|\[(?:user|assistant|system|tool)\]"
    r"|<sep>|(?:^|\n)(?:assistant|human|User|Assistant): ?|<\|HUMAN\|>|\[\|(?:user|assistant|system)\|\]"
    r"|### (?:Instruction|Response|User|Assistant|System|Input):|(?:GPT4 Correct|Code) (?:User|Assistant|System):"
    r"|Source: (?:user|assistant|system)|<\|from\|>(?:user|assistant|system)|<\|(?:prompt|answer)\|>|USER:|ASSISTANT:"
)
"""Texts that begin a message in some family of templates."""

STOPS = re.compile(
    r"(?:<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<end_of_turn>|<turn\|>|<\|end\|>|<\|return\|>|<\|call\|>|<\|tool_response>"
    r"|<\|END_OF_TURN_TOKEN\|>|<\|end_of_text\|>|<\|endoftext\|>|<\|eom\|>|<｜end▁of▁sentence｜>|<seed:eos>|<sep>|<\|message_sep\|>"
    r"|<\|end_of_msg\|>|<\|eos\|>"
    r"|</assistant>|<\|assistant_end\|>|<\|tools_suffix\|>|<\|eot\|>|</s>|<eos>|<end_of_utterance>|<\|(?:user|observation)\|>"
    r"|<\|assistant\|>|<\|tool_calls\|>|\[\|endofturn\|\]|<\|end_of_turn\|>|<step>|<\|?EOT\|?>|<\|stop\|>)\n?$"
)
"""Texts that end an assistant's turn in some family of templates."""

SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>\s]{1,40}｜>|<[a-z]+_of_[a-z]+>|\[/?[A-Z]+(?:_[A-Z]+)*\]|<\|[a-z_]{1,20}>|<[a-z_]{1,20}\|>"
    r"|<sep>|</?s>|<bos>|<eos>|</?seed:[a-z_]+>|</?(?:tool_call|think|assistant|user|system)>|\[\|[a-z]+\|\]"
)
"""Texts of special tokens inside a template."""


def open_encoder(template: str, *, special: bool = True, **policy: Any) -> ChatEncoder:
    """Return an encoder whose tokenizer has the template's special tokens, unless `special` is false."""
    tokenizer = tiny.fast_tokenizer()
    if special:
        found = dict.fromkeys([*SPECIAL.findall(template), "<|im_end|>", "[INST]"])
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in found], special_tokens=True)
    return ChatEncoder(tokenizer, template, date=str(date.today()), capacity=2**24, **policy)


class Case(NamedTuple):
    template: str
    shape: str
    verdict: str
    """"right", "wrong", "lossless" (refused though printed whole), "refused", "raises" or "crash"."""
    detail: str = ""


def judge(path: Path, shapes: Iterable[str] = SHAPES, **options: Any) -> list[Case]:
    """Return the verdict on each shape under a template."""
    text = path.read_text(encoding="utf-8")
    try:
        encoder = open_encoder(text, **options)
    except ValueError as error:
        return [Case(path.stem, shape, "unopened", str(error)) for shape in shapes]
    return [Case(path.stem, shape, *_judge(encoder, text, shape)) for shape in shapes]


def _judge(encoder: ChatEncoder, template: str, shape: str) -> tuple[str, str]:
    messages, tools = conversation(shape)
    oracle = Oracle(encoder, template, messages, tools)
    try:
        row = parse_row({"messages": copy.deepcopy(messages), "tools": copy.deepcopy(tools)})
        rendered = encoder.renderer.render_conversation(row)
        (examples,) = encoder.tokenize_all([rendered])
        if isinstance(examples, Refused):
            raise examples
    except Refused as refused:
        if oracle.text is None:
            return "raises", str(refused)
        return ("lossless" if oracle.lossless() else "refused"), str(refused)
    except Exception as error:  # noqa: BLE001 (a crash is a verdict)
        return "crash", f"{type(error).__name__}: {error}"
    for text, example in zip(rendered.texts, examples, strict=True):
        spans = [(span.start, span.end) for span in text.spans]
        trained = encoder.tokenizer.hf.decode(example.tokens[example.loss_mask])
        if trained != "".join(text.text[start:end] for start, end in spans):
            return "wrong", f"tokens {trained!r} of {[text.text[a:b] for a, b in spans]}"
        fault = oracle.fault(text.text, spans) if len(examples) == 1 else "one of several"
        if fault and encoder.policy.history == "per_turn":
            fault = oracle.part_fault(text.text, spans)
        if fault:
            return "wrong", f"{fault}: {[text.text[a:b] for a, b in spans]} of ...{text.text[-500:]!r}"
    return "right", ""


class Oracle:
    """The text of a conversation by transformers, and the judgement of spans in it."""

    def __init__(self, encoder: ChatEncoder, template: str, messages: Messages, tools: Any) -> None:
        self.encoder, self.template, self.messages, self.tools = encoder, template, messages, tools
        self.policy = encoder.policy
        self.only: int | None = None
        """Index of the only trained message; None: all of the policy's roles."""
        self.parts = False
        asked = conversation("u a")[0]
        if not WORD.search(self._render(asked) or ""):
            self.parts = True
            self.parts = bool(WORD.search(self._render(asked) or ""))
        self.text = self._render(messages)

    def _render(self, messages: Messages, *, prompt: bool = False) -> str | None:
        messages = copy.deepcopy(messages)
        if self.parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text: str = self.encoder.tokenizer.hf.apply_chat_template(
                messages,
                tools=copy.deepcopy(self.tools),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                date_string=date.today().strftime("%d %b %Y"),
            )
        except Exception:  # noqa: BLE001 (a template may raise anything)
            return None
        return text

    def lossless(self) -> bool:
        """Return True if each word stands in the text once, in the order of messages, and a turn can be trained."""
        assert self.text is not None
        printed = [m[0] for m in WORD.finditer(self.text)]
        order = [int(m[2]) for m in WORD.finditer(self.text)]
        wanted = [word for message in self.messages for word in words(message)]
        names = sum(len(message.get("tool_calls", ())) for message in self.messages)
        silent = self._render([{k: v for k, v in m.items() if k != "tool_calls"} for m in self.messages])
        if names and silent is not None and self.text.count("get_") < silent.count("get_") + names:
            return False
        trained = any(self._is_trained(message) and words(message) for message in self.messages)
        return sorted(printed) == sorted(wanted) and order == sorted(order) and trained

    def _is_trained(self, message: dict[str, Any]) -> bool:
        if self.only is not None and message is not self.messages[self.only]:
            return False
        return "all" in self.policy.train_on or message["role"] in self.policy.train_on

    def fault(self, text: str, spans: Sequence[tuple[int, int]]) -> str | None:
        """Return what is wrong with the spans of a text."""
        if text != self.text:
            return "another text"
        inside: set[int] = set()
        owners: list[set[int]] = [set() for _ in spans]
        for match in WORD.finditer(text):
            index, kind = int(match[2]), match[3]
            holders = [n for n, (start, end) in enumerate(spans) if start < match.end() and match.start() < end]
            whole = any(spans[n][0] <= match.start() and match.end() <= spans[n][1] for n in holders)
            message = self.messages[index]
            wanted = self._is_trained(message) and not self._left_out(message, kind)
            if holders and not wanted:
                return f"{match[0]} is trained"
            if wanted and not whole and text.count(match[0]) == 1:
                return f"{match[0]} is not trained"
            for holder in holders:
                owners[holder].add(index)
                inside.add(holder)
        missing = {w for m in self.messages if self._is_trained(m) for w in words(m) if w[4] != "r" and w not in text}
        if missing and self.policy.train_on == ("assistant",):
            return f"{sorted(missing)} is not printed"
        for number, (start, end) in enumerate(spans):
            if len(owners[number]) > 1:
                return "a span over messages"
            owner = next(iter(owners[number]), None)
            if fault := self._span_fault(text, start, end, owner):
                return fault
        return None

    def part_fault(self, text: str, spans: Sequence[tuple[int, int]]) -> str | None:
        """Return what is wrong with the text of a single trained message and the messages before."""
        for count in range(1, len(self.messages) + 1):
            if self._render(self.messages[:count]) == text and self._is_trained(self.messages[count - 1]):
                part = copy.copy(self)
                part.messages, part.text, part.only = self.messages[:count], text, count - 1
                return part.fault(text, spans)
        return "another text"

    def _left_out(self, message: dict[str, Any], kind: str) -> bool:
        is_call = kind in "abde" and bool(message.get("tool_calls"))
        return (kind == "r" and not self.policy.train_reasoning) or (is_call and not self.policy.train_tool_calls)

    def _span_fault(self, text: str, start: int, end: int, owner: int | None) -> str | None:
        span = text[start:end]
        own = [m for m in WORD.finditer(span)]
        lead, trail = (span[: own[0].start()], span[own[-1].end() :]) if own else ("", span)
        blank = self._blank_place(owner)
        if blank is not None and own and start + own[-1].end() <= blank <= end:
            trail = text[blank:end]
        stop = STOPS.search(trail)
        before_stop = trail[: stop.start()] if stop else trail
        typed = owner is not None and any(mark in self.messages[owner]["content"] for mark in ("<|im_end|>", "user: x"))
        if not typed and (HEADERS.search(lead) or HEADERS.search(before_stop)):
            return "a role marker is trained"
        role = self.messages[owner]["role"] if owner is not None else "assistant"
        calls_left_out = owner is not None and not self.policy.train_tool_calls and "tool_calls" in self.messages[owner]
        if stop is None and end < len(text.rstrip()) and role == "assistant" and not calls_left_out:
            return "no stop is trained"
        if stop is None and end != len(text) and role == "assistant" and owner is not None and not calls_left_out:
            content = self.messages[owner]["content"]
            if content.endswith(text[end:]) and "tool_calls" not in self.messages[owner]:
                return "white space is not trained"
        if not typed and before_stop and STOPS.search(before_stop.rstrip()):
            return "two stops are trained"
        return self._start_fault(text, start, owner) if role == "assistant" and owner is not None else None

    def _blank_place(self, owner: int | None) -> int | None:
        """Return where the blank content of a message with reasoning is printed, found with a word in its place."""
        if owner is None or self.messages[owner]["content"].strip() or "reasoning_content" not in self.messages[owner]:
            return None
        filled = copy.deepcopy(self.messages)
        filled[owner]["content"] = word = f"wa{owner:02d}zq"
        text = self._render(filled) or ""
        same = text.count(word) == 1 and text.replace(word, self.messages[owner]["content"]) == self.text
        return text.index(word) + len(self.messages[owner]["content"]) if same else None

    def _start_fault(self, text: str, start: int, owner: int) -> str | None:
        prompt = self._render(self.messages[:owner], prompt=True) if owner else None
        if prompt is None or (not self.policy.train_reasoning and "think" in text):
            return None
        shared = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), None)
        if shared is None and len(prompt) <= len(text):
            if start < len(prompt):
                return f"{text[start : len(prompt)]!r} of the generation prompt is trained"
            if start > len(prompt) and self.policy.train_reasoning and text[len(prompt) : start].strip():
                lost = text[len(prompt) : start]
                said = any(self._left_out(self.messages[int(m[2])], m[3]) for m in WORD.finditer(lost))
                return None if said or HEADERS.search(lost) else f"{lost!r} is not trained"
            return None
        shared = min(len(prompt), len(text)) if shared is None else shared
        borders = [m.end() for m in SPECIAL.finditer(text) if m.end() <= shared]
        if borders and start < borders[-1]:
            return f"{text[start:shared]!r} before the turn is trained"
        return None


def words(message: dict[str, Any]) -> list[str]:
    """Return the marker words of a message."""
    strings = [message["content"], message.get("reasoning_content", ""), str(message.get("tool_calls", ""))]
    return [match[0] for text in strings for match in WORD.finditer(text)]


POLICIES: tuple[dict[str, Any], ...] = (
    {"train_on": ("user",)},
    {"train_on": ("tool",)},
    {"train_on": ("system",)},
    {"train_on": ("all",)},
    {"train_reasoning": False},
    {"train_tool_calls": False},
    {"train_reasoning": False, "train_tool_calls": False},
    {"history": "per_turn"},
    {"history": "error"},
    {"history": "per_turn", "train_on": ("user",)},
    {"history": "per_turn", "train_on": ("tool",)},
    {"history": "error", "train_on": ("system",)},
    {"history": "per_turn", "train_reasoning": False, "train_tool_calls": False},
    {"history": "per_turn", "train_on": ("all",)},
)

VERDICTS = ("right", "wrong", "crash", "lossless", "refused", "raises", "unopened")


def table(cases: Iterable[Case]) -> str:
    """Return the verdicts by template as a table."""
    lines = [f"{'template':<48}" + "".join(f"{verdict:>9}" for verdict in VERDICTS)]
    for template, group in groupby(cases, lambda case: case.template):
        counts = Counter(case.verdict for case in group)
        lines.append(f"{template:<48}" + "".join(f"{counts[verdict] or '':>9}" for verdict in VERDICTS))
    return "\n".join(lines)


def accepted_share(cases: Iterable[Case]) -> float:
    """Return the accepted share of the conversations that a template prints whole."""
    counts = Counter(case.verdict for case in cases)
    return counts["right"] / max(1, counts["right"] + counts["lossless"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="templates, or directories of *.jinja")
    parser.add_argument("--policies", action="store_true", help="judge every policy too")
    parser.add_argument("--plain", action="store_true", help="a tokenizer without the templates' special tokens")
    parser.add_argument("--show", default="wrong,crash,unopened", help="verdicts to list")
    parser.add_argument("--width", type=int, default=300, help="characters of each listed verdict")
    arguments = parser.parse_args()
    paths = [p for path in arguments.paths for p in (sorted(path.glob("*.jinja")) if path.is_dir() else [path])]
    everything: list[Case] = []
    for policy in ({}, *POLICIES) if arguments.policies else ({},):
        cases = [case for path in paths for case in judge(path, special=not arguments.plain, **policy)]
        print(f"\n{policy or 'default policy'}: {dict(Counter(case.verdict for case in cases))}")
        if not policy:
            print(table(cases))
            print(f"accepted {accepted_share(cases):.2%} of the conversations printed whole")
        for case in cases:
            if case.verdict in arguments.show.split(","):
                print(f"{case.verdict}: {case.template} [{case.shape}] {case.detail[: arguments.width]}")
        everything += cases
    sys.exit(any(case.verdict in ("wrong", "crash") for case in everything))


if __name__ == "__main__":
    main()
