"""Train the demo's tokenizer: a byte-level BPE on the rendered conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SIZE = 1024
"""Largest vocabulary; enough for one token per word of the conversations."""

BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
SPECIAL = (BOS, "<|end_of_text|>", PAD, "<|start_header_id|>", "<|end_header_id|>", EOS, "<|python_tag|>")
"""Special tokens of Llama 3."""

WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*|\s+"
"""Pieces that no token crosses: a word, a digit (for sums by digits), signs with the spaces between
(for cheap JSON), whitespace."""


def train(texts: Iterable[str]) -> Tokenizer:
    """Train a BPE on the rendered conversations `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    tokenizer.train_from_iterator((piece for text in texts for piece in special.split(text)), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, template: str, directory: Path) -> None:
    """Write the files read by `AutoTokenizer.from_pretrained`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
