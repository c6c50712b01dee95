"""Small real inputs: a byte-level tokenizer, a chat template, conversations in every kind of file, configs of all that."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from http.server import SimpleHTTPRequestHandler
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from sftstream import DataConfig, DataState, Pack, PackLoader

Row = dict[str, Any]
Started = Callable[[], list[BaseProcess]]

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|pad|>",
)

TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{%- set header = "ipython" if message.role == "tool" else message.role %}
{{- "<|start_header_id|>" + header + "<|end_header_id|>\\n\\n" }}
{%- if message.role == "system" and tools %}
{%- for tool in tools %}{{ (tool | tojson) + "\\n" }}{% endfor %}
{%- endif %}
{{- message.content | trim }}
{%- for call in message.tool_calls or [] %}
{{- '{"name": "' + call.function.name + '", "parameters": ' + (call.function.arguments | tojson) + "}" }}
{%- endfor %}
{{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""
"""Llama 3's turns: a header, the trimmed text, a stop token. Tools are told in the system prompt."""

DATED_TEMPLATE = TEMPLATE.replace("{{- bos_token }}", '{{- bos_token + strftime_now("%d %b %Y") }}')

WORDS = (
    *("the", "sum", "of", "and", "is", "what", "which", "under", "over", "between", "again", "never", "because"),
    *("river", "stone", "seven", "eleven", "copper", "lantern", "north", "window", "answer", "question"),
    *("slowly", "carries", "small", "large", "green", "therefore"),
)


def fast_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of some 400 tokens, the same on every machine; `changes` go to its constructor."""
    arguments = {"bos_token": SPECIAL[0], "eos_token": "<|eot_id|>", "pad_token": "<|pad|>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(), **arguments)


def save_tokenizer(directory: Path, template: str | None = TEMPLATE, **changes: Any) -> str:
    """The same as a Hugging Face directory with a chat template."""
    fast = fast_tokenizer(**changes)
    fast.chat_template = template
    fast.save_pretrained(str(directory))
    return str(directory)


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
        merges["Ġ", word] = None  # how the byte-level alphabet writes a space
    vocabulary = {token: i for i, token in enumerate([*alphabet, *dict.fromkeys("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def chat(*texts: str, system: str | None = None) -> Row:
    """An OpenAI row: user and assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def rows(count: int, seed: int = 0) -> list[Row]:
    """Dialogues of one to three turns and a few to some sixty words; each begins with its own number."""
    draw = random.Random(seed)
    result = []
    for number in range(count):
        turns = [" ".join(draw.choices(WORDS, k=draw.randint(1, 10))) for _ in range(2 * draw.randint(1, 3))]
        result.append(chat(f"{number}: {turns[0]}", *turns[1:]))
    return result


def json_lines(content: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()


def write_jsonl(path: Path, content: Iterable[Any]) -> str:
    path.write_bytes(json_lines(content))
    return str(path)


def write_json(path: Path, content: Iterable[Any]) -> str:
    path.write_text(json.dumps(list(content), ensure_ascii=False, indent=1), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, content: Sequence[Row]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(content)), path, compression="none")
    return str(path)


class WebFiles(SimpleHTTPRequestHandler):
    """Files of a directory, each whole or not at all: this server cannot give a part of one."""

    def log_message(self, *_: Any) -> None:
        """Tests say nothing."""


def data_config(tokenizer: str | dict[str, str], *paths: str, **changes: Any) -> DataConfig:
    """Four streams of packs of 256 tokens, in windows of 8 conversations; `changes` replace keys of the `[data]` table."""
    table = {
        "sources": [{"path": path} for path in paths],
        "tokenizer": {"path": tokenizer} if isinstance(tokenizer, str) else tokenizer,
        "streams": 4,
        "capacity": 256,
        "global_batch": 4,
        "window": 8,
        "workers": 0,
        "epochs": 2,
    }
    return msgspec.convert(table | changes, DataConfig)


def digests(packs: Iterable[Pack]) -> list[str]:
    return [pack.digest() for pack in packs]


def resealed(state: dict[str, Any]) -> dict[str, Any]:
    """An edited state with the checksum of its content, as whoever can write states would give it."""
    content = {key: value for key, value in state.items() if key != "checksum"}
    sealed = hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()
    return {**content, "checksum": sealed}


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with plain values for each stream, to look at and to edit."""
    return DataState.parse(state).builtins()


def take(loader: PackLoader, count: int) -> list[Pack]:
    """Exactly `count` packs."""
    return [next(loader) for _ in range(count)]
