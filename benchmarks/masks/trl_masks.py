"""Print TRL's loss mask of each conversation on standard input.

`peers.py` runs this file with TRL's Python. An input line is a JSON object with `tokenizer` (a
directory), `template`, `messages` and `tools`. An output line is
`{"text": ..., "spans": [[start, end], ...]}` or `{"refused": ...}`.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template


@cache
def opened(directory: str, template: str) -> tuple[Any, str]:
    """Return the tokenizer, and the template that TRL trains with."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = template
    return tokenizer, get_training_chat_template(tokenizer) or template


def masked(case: dict[str, Any]) -> dict[str, Any]:
    tokenizer, template = opened(case["tokenizer"], case["template"])
    encoded = tokenizer.apply_chat_template(
        case["messages"],
        tools=case["tools"],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    spans, at = [], 0
    for trained, run in groupby(
        zip(encoded["assistant_masks"], encoded["input_ids"], strict=True), lambda pair: pair[0]
    ):
        text = tokenizer.decode([token for _, token in run])
        if trained:
            spans.append([at, at + len(text)])
        at += len(text)
    return {"text": tokenizer.decode(encoded["input_ids"]), "spans": spans}


def main() -> None:
    for line in sys.stdin:
        try:
            result = masked(json.loads(line))
            if not result["spans"]:
                result = {"refused": "nothing is trained"}
        except Exception as error:  # noqa: BLE001 (a refusal is a result)
            result = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
