"""The exported model, loaded as any user would, answers questions that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftstream import ChatEncoder, read_conversations
from trainer.config import EvaluationConfig

BATCH = 64


class Answer(NamedTuple):
    """The prompt as the template prints it, what should follow and what followed, stop tokens included."""

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


def evaluate(export: Path, encoder: ChatEncoder, config: EvaluationConfig, device: torch.device) -> Evaluation:
    """Greedy answers of the model in `export` to the conversations in `config.path`; written beside it as `answers.jsonl`."""
    rendered = [encoder.render(dialogue) for dialogue in read_conversations(config.path)]
    prompts = [text[: spans[-1].start] for text, spans, _ in rendered]
    expected = [text[spans[-1].start : spans[-1].end] for text, spans, _ in rendered]
    given = generate(export, prompts, config.max_new_tokens, encoder.stop_ids, device)
    evaluation = Evaluation([Answer(*row) for row in zip(prompts, expected, given, strict=True)])
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
