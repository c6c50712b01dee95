"""The exported model, loaded as any user would, answers questions that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftstream import ChatEncoder, Refused, read_conversations

BATCH = 64


class Question(NamedTuple):
    """The prompt as the template prints it and what should follow, stop tokens included."""

    prompt: str
    expected: str


class Answer(NamedTuple):
    """A question and what followed, stop tokens included."""

    prompt: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """To the last byte."""
        return self.given == self.expected


class Evaluation(NamedTuple):
    """All answers, in the file's order."""

    answers: list[Answer]

    @property
    def accuracy(self) -> float:
        """Share of exact matches."""
        return sum(answer.right for answer in self.answers) / len(self.answers)

    def describe(self, show: int) -> str:
        """The first `show` answers and the share of right ones, in words."""
        shown = [
            f"\n{answer.prompt}\n  -> {answer.given}" + ("" if answer.right else f"  (expected {answer.expected})")
            for answer in self.answers[:show]
        ]
        return "\n".join([*shown, f"\n{self.accuracy:.1%} of {len(self.answers)} held-out questions answered exactly"])


def read_questions(path: str, encoder: ChatEncoder) -> list[Question]:
    """The conversations in a file, each up to its last trained message; ValueError names one that is none."""
    questions = []
    for number, dialogue in enumerate(read_conversations(path), 1):
        try:
            rendered = encoder.render(dialogue)
        except Refused as error:
            raise ValueError(f"evaluation.path {path!r}, conversation {number}: {error}") from None
        if not rendered.spans:
            raise ValueError(f"evaluation.path {path!r}, conversation {number}: it has no message of data.train_on")
        start, end = rendered.spans[-1]
        questions.append(Question(rendered.text[:start], rendered.text[start:end]))
    return questions


def evaluate(
    export: Path, questions: Sequence[Question], stop_ids: list[int], max_new_tokens: int, device: torch.device
) -> Evaluation:
    """Greedy answers of the model in `export`; written beside it as `answers.jsonl`."""
    given = generate(export, [question.prompt for question in questions], max_new_tokens, stop_ids, device)
    evaluation = Evaluation([Answer(*question, answer) for question, answer in zip(questions, given, strict=True)])
    lines = [msgspec.json.encode(answer._asdict() | {"right": answer.right}) for answer in evaluation.answers]
    (export.parent / "answers.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return evaluation


@torch.no_grad()
def generate(
    directory: Path, prompts: Sequence[str], max_new_tokens: int, stop_ids: list[int], device: torch.device
) -> list[str]:
    """What the model in a Hugging Face directory says after each prompt, up to and with the first stop token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
    answers: dict[int, str] = {}
    for start in range(0, len(prompts), BATCH):
        chosen = by_length[start : start + BATCH]
        inputs = tokenizer(
            [prompts[i] for i in chosen], add_special_tokens=False, padding=True, return_tensors="pt"
        ).to(device)
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=pad
        )
        for i, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in stop_ids), len(row))
            answers[i] = tokenizer.decode(row[:end])
    return [answers[i] for i in range(len(prompts))]
