"""Print the loss masks of TRL, axolotl or NeMo Automodel for conversations on standard input.

`peers.py` runs `python peer_masks.py PEER` with a Python that has the peer installed. An input line
is a JSON object with `tokenizer` (a directory), `template`, `stops` (special tokens that end a
turn), `messages` and `tools`. An output line is `{"text": ..., "spans": [[start, end], ...]}` or
`{"refused": ...}`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerFast

Masked = tuple[Any, Sequence[int], Sequence[Any]]
"""The tokenizer, the token ids, and for each token whether it is trained."""


@cache
def opened(directory: str, template: str) -> Any:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.chat_template = template
    return tokenizer


def trl(case: dict[str, Any]) -> Masked:
    """Train with TRL's own template for training, if TRL has one for the model's template."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = opened(case["tokenizer"], case["template"])
    encoded = tokenizer.apply_chat_template(
        case["messages"],
        tools=case["tools"],
        chat_template=get_training_chat_template(tokenizer) or case["template"],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return tokenizer, encoded["input_ids"], encoded["assistant_masks"]


@cache
def axolotl_strategy(directory: str, template: str, stops: tuple[str, ...]) -> Any:
    from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy

    tokenizer = opened(directory, template)
    prompter = ChatTemplatePrompter(tokenizer, chat_template=template, max_length=2**20)
    return ChatTemplateStrategy(
        prompter,
        tokenizer,
        train_on_inputs=False,
        sequence_len=2**20,
        roles_to_train=["assistant"],
        train_on_eos="turn",
        eot_tokens=list(stops),
    )


def axolotl(case: dict[str, Any]) -> Masked:
    """Train as with `type: chat_template`, and `eot_tokens` written by hand."""
    strategy = axolotl_strategy(case["tokenizer"], case["template"], tuple(case["stops"]))
    row = {name: case[name] for name in ("messages", "tools") if case[name]}
    encoded = strategy.tokenize_prompt(row)
    return strategy.tokenizer, encoded["input_ids"], [label != -100 for label in encoded["labels"]]


def automodel(case: dict[str, Any]) -> Masked:
    """Train as with `ChatDataset`, with `mask_generation_prompt`, which leaves headers out."""
    from nemo_automodel.components.datasets.llm.chat_dataset import _normalize_messages
    from nemo_automodel.components.datasets.llm.formatting_utils import format_chat_template

    tokenizer = opened(case["tokenizer"], case["template"])
    encoded = format_chat_template(
        tokenizer,
        _normalize_messages(case["messages"]),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tools=case["tools"],
        unshifted=True,
        mask_generation_prompt=True,
    )
    return tokenizer, encoded["input_ids"], encoded["loss_mask"]


PEERS: dict[str, Callable[[dict[str, Any]], Masked]] = {"trl": trl, "axolotl": axolotl, "automodel": automodel}


def spans(tokenizer: Any, ids: Sequence[int], mask: Sequence[Any]) -> dict[str, Any]:
    """Return the text of the tokens, and the trained ranges of characters."""
    found, at = [], 0
    for trained, run in groupby(zip(map(bool, mask), ids, strict=True), lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in run])
        if trained:
            found.append([at, at + len(text)])
        at += len(text)
    return {"text": tokenizer.decode(ids), "spans": found} if found else {"refused": "nothing is trained"}


def main() -> None:
    logging.disable(logging.WARNING)
    peer, answers = PEERS[sys.argv[1]], sys.stdout
    sys.stdout = sys.stderr  # what a peer prints is no answer
    for line in sys.stdin:
        try:
            result = spans(*peer(json.loads(line)))
        except Exception as error:  # noqa: BLE001 (a refusal is a result)
            result = {"refused": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
