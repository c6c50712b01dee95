"""Let an exported model, loaded by transformers, answer questions, and compare with the expected
answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from sftstream import ChatEncoder, Refused, read_conversations
from trainer.training.scorer import Scorer

BATCH = 64
"""Number of questions per call of generate."""


class Question(NamedTuple):
    """A prompt and the expected answer."""

    prompt: str
    """The rendered conversation up to its last trained span."""
    expected: str
    """The last trained span, stop token included."""


class Answer(NamedTuple):
    """A question and the model's answer."""

    prompt: str
    expected: str
    given: str
    """The generated text, stop token included."""

    score: float | None = None
    """Score by `evaluation.scorer`; None without a scorer."""

    @property
    def right(self) -> bool:
        """True if the generated text equals the expected text."""
        return self.given == self.expected


class Evaluation(NamedTuple):
    """All answers, in the order of the questions."""

    answers: list[Answer]

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]."""
        return sum(answer.right for answer in self.answers) / len(self.answers)

    @property
    def score(self) -> float | None:
        """Mean score; None without a scorer."""
        scores = [answer.score for answer in self.answers if answer.score is not None]
        return sum(scores) / len(scores) if scores else None

    def describe(self, show: int) -> str:
        """Return the first `show` answers and the accuracy in words."""
        shown = [
            f"\n{answer.prompt}\n  -> {answer.given}" + ("" if answer.right else f"  (expected {answer.expected})")
            for answer in self.answers[:show]
        ]
        scored = "" if self.score is None else f", mean score {self.score:.4f}"
        exact = f"{self.accuracy:.1%} of {len(self.answers)} held-out questions answered exactly"
        return "\n".join([*shown, f"\n{exact}{scored}"])


def read_questions(path: str, encoder: ChatEncoder) -> list[Question]:
    """Read the conversations of a file as questions for their last trained message.

    Raises ValueError, with the number of the conversation, if it cannot be rendered or has no
    trained message.
    """
    questions = []
    for number, conversation in enumerate(read_conversations(path), 1):
        try:
            rendered = encoder.render(conversation)
        except Refused as error:
            raise ValueError(f"evaluation.path {path!r}, conversation {number}: {error}; correct the row") from None
        if not rendered.spans:
            raise ValueError(
                f"evaluation.path {path!r}, conversation {number}: no message has a role of data.train_on; remove the row"
            )
        start, end = rendered.spans[-1]
        questions.append(Question(rendered.text[:start], rendered.text[start:end]))
    return questions


def judge(questions: Sequence[Question], given: Sequence[str], scorer: Scorer | None) -> Evaluation:
    """Return the answers `given` to questions, with scores by `scorer`."""
    answers = []
    for question, answer in zip(questions, given, strict=True):
        score = None if scorer is None else scorer(question.prompt, question.expected, answer)
        answers.append(Answer(*question, answer, score))
    return Evaluation(answers)


def write_answers(path: Path, evaluation: Evaluation) -> None:
    """Write a line of JSON for each answer."""
    lines = []
    for answer in evaluation.answers:
        line = answer._asdict() | {"right": answer.right}
        lines.append(msgspec.json.encode({key: value for key, value in line.items() if value is not None}))
    path.write_bytes(b"\n".join(lines) + b"\n")


def evaluate(
    export: Path,
    questions: Sequence[Question],
    stop_ids: list[int],
    max_new_tokens: int,
    device: torch.device,
    scorer: Scorer | None = None,
) -> Evaluation:
    """Generate the greedy answers of the model in `export`.

    The answers are also written to `answers.jsonl`, beside `export`.
    """
    given = generate(export, [question.prompt for question in questions], max_new_tokens, stop_ids, device)
    evaluation = judge(questions, given, scorer)
    write_answers(export.parent / "answers.jsonl", evaluation)
    return evaluation


@torch.no_grad()
def generate(
    directory: Path, prompts: Sequence[str], max_new_tokens: int, stop_ids: list[int], device: torch.device
) -> list[str]:
    """Return the greedy continuation of each prompt by the model in a Hugging Face directory.

    A continuation ends with its first stop token, or after `max_new_tokens` tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # for the end of a run, not its start
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # bars of loaded weights fill a log
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # for less padding
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
