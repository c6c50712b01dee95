"""Files of every format with random rows, types and damaged bytes: a row is trained truly or refused by its place.

A whole file may also be one error. What is read by row number and what is read forward must agree, and a file without
damage gives the conversations that were written. `SFTSTREAM_SEED` repeats a failed draw, which prints its seed.
"""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from sftstream import Conversation, Message, SourceConfig
from sftstream.formats import parse_row
from sftstream.records import BrokenRow, Ref, Refused, ToolCall, ToolCalls
from sftstream.sources import Corpus, CorpusReader, FileSet, StreamedReader

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 20)
MORE_DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 1000)

Rows = list[dict[str, Any]]
WORDS = [
    "hi",
    "hello",
    "",
    " ",
    "é 漢字 🙂",
    "[1]",
    '{"a": 1}',
    "a,b\t\"c'",
    "line\nbreak",
    "\u2028",
    "<|im_end|>",
    "x" * 3000,
]
BESIDE: list[tuple[str, list[Any]]] = [
    ("id", [0, -1, 2**63 - 1, None]),
    ("score", [0.5, -1e300, None]),
    ("time", [datetime.datetime(1970, 1, 1), datetime.datetime(9999, 12, 31), None]),
    ("day", [datetime.date(1, 1, 1), datetime.date(2026, 1, 1), None]),
    ("price", [decimal.Decimal("1.50"), None]),
    ("blob", [b"\xff\x00", b"", None]),
    ("nested", [{"a": [{"b": None}]}, {"a": []}, None]),
    ("labels", [["x"], [], None]),
    ("nothing", [None]),
]
WITH_TOOLS = {"calls", "blocks", "items"}
IN_JSON = {"id", "score", "nested", "labels", "nothing"}


def drawn_rows(rng: random.Random, *, tables: bool) -> tuple[Rows, list[Conversation]]:
    """Rows of one layout with any further columns, and the conversations that they hold."""
    count, layout = rng.randint(1, 6), rng.choice([*LAYOUTS])
    tools = [[TOOL], json.dumps([TOOL])][rng.randint(0, 1)] if layout in WITH_TOOLS else None
    beside = [(name, values) for name, values in BESIDE if (tables or name in IN_JSON) and rng.random() < 0.2]
    rows, expected = [], []
    for _ in range(count):
        texts = [rng.choice([word for word in WORDS if word.strip()]) for _ in range(2 * rng.randint(1, 3))]
        row, messages = LAYOUTS[layout](texts)
        rows.append(row | ({"tools": tools} if tools else {}) | {name: rng.choice(values) for name, values in beside})
        expected.append(Conversation(messages, (TOOL,) if tools else ()))
    return rows, expected


def turns(texts: list[str], role: str, content: str, names: tuple[str, str]) -> Rows:
    return [{role: names[number % 2], content: text} for number, text in enumerate(texts)]


def spoken(texts: list[str]) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


def parts(texts: list[str]) -> Rows:
    """Turns whose contents are lists of one or two parts."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    return [
        {
            "role": ("user", "assistant")[number % 2],
            "content": [{"type": "text", "text": half} for half in pair if half],
        }
        for number, pair in enumerate(halves)
    ]


TOOL = {"type": "function", "function": {"name": "say", "description": "says"}}
CALL = ToolCall("say", {"word": "a", "times": 2}, "c1")


def called(texts: list[str]) -> tuple[Message, ...]:
    """A question, a call, its result, and an answer."""
    said = spoken(texts[:2])
    return (
        said[0],
        Message("assistant", None, "Hm.", ToolCalls([CALL])),
        Message("tool", "a", tool_call_id="c1"),
        said[1],
    )


def calls(texts: list[str]) -> dict[str, Any]:
    function = {"name": CALL.name, "arguments": json.dumps(CALL.arguments)}
    asks = {"role": "assistant", "reasoning": "Hm.", "tool_calls": [{"id": "c1", "function": function}]}
    question, answer = turns(texts[:2], "role", "content", ("User", "ASSISTANT"))
    return {"messages": [question, asks, {"role": "tool", "tool_call_id": "c1", "content": "a"}, answer]}


def blocks(texts: list[str]) -> dict[str, Any]:
    use = {"type": "tool_use", "id": "c1", "name": CALL.name, "input": CALL.arguments}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "a"}]}
    question, answer = parts(texts[:2])
    asks = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, use]}
    return {"messages": [question, asks, {"role": "user", "content": [result]}, answer]}


def items(texts: list[str]) -> dict[str, Any]:
    asks = {"type": "function_call", "call_id": "c1", "name": CALL.name, "arguments": json.dumps(CALL.arguments)}
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    result = {"type": "function_call_output", "call_id": "c1", "output": "a"}
    question, answer = turns(texts[:2], "role", "content", ("user", "assistant"))
    return {"messages": [question, reasoning, asks, result, {"type": "message", **answer}]}


def with_history(texts: list[str]) -> dict[str, Any]:
    *before, question, answer = texts
    pairs = [list(pair) for pair in zip(before[::2], before[1::2], strict=True)]
    return {"query": question, "response": answer, "history": pairs}


LAYOUTS: dict[str, Callable[[list[str]], tuple[dict[str, Any], tuple[Message, ...]]]] = {
    "messages": lambda texts: ({"messages": turns(texts, "role", "content", ("user", "assistant"))}, spoken(texts)),
    "conversations": lambda texts: ({"conversations": turns(texts, "from", "value", ("human", "gpt"))}, spoken(texts)),
    "instruction": lambda texts: ({"instruction": texts[0], "output": texts[1]}, spoken(texts[:2])),
    "prompt": lambda texts: ({"prompt": texts[0], "completion": texts[1]}, spoken(texts[:2])),
    "turns as text": lambda texts: (
        {"messages": json.dumps(turns(texts, "role", "content", ("user", "assistant")))},
        spoken(texts),
    ),
    "object of lists": lambda texts: (
        {"messages": {"from": [("human", "gpt")[number % 2] for number in range(len(texts))], "value": texts}},
        spoken(texts),
    ),
    "rounds": lambda texts: (
        {"conversation": [{"input": ask, "output": say} for ask, say in zip(texts[::2], texts[1::2], strict=True)]},
        spoken(texts),
    ),
    "texts": lambda texts: ({"data": texts}, spoken(texts)),
    "history": lambda texts: (with_history(texts), spoken(texts)),
    "parts": lambda texts: ({"messages": parts(texts)}, spoken(texts)),
    "calls": lambda texts: (calls(texts), called(texts)),
    "blocks": lambda texts: (blocks(texts), called(texts)),
    "items": lambda texts: (items(texts), called(texts)),
}


def json_lines(rows: Rows, _rng: random.Random) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_array(rows: Rows, rng: random.Random) -> bytes:
    return json.dumps(rows, indent=rng.choice([None, 1])).encode()


def delimited(delimiter: str) -> Callable[[Rows, random.Random], bytes]:
    def write(rows: Rows, _rng: random.Random) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter)
        writer.writerow(rows[0])
        writer.writerows(
            [v if isinstance(v, str) or v is None else json.dumps(v) for v in row.values()] for row in rows
        )
        return text.getvalue().encode()

    return write


def table(rows: Rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def parquet(rows: Rows, rng: random.Random) -> bytes:
    file = io.BytesIO()
    table(rows).to_parquet(file, batch_size=rng.randint(1, 9))
    return file.getvalue()


def arrow(rows: Rows, rng: random.Random) -> bytes:
    file, made = io.BytesIO(), table(rows).data.table
    writer = rng.choice([pa.ipc.new_file, pa.ipc.new_stream])
    options = pa.ipc.IpcWriteOptions(compression=rng.choice([None, None, "zstd", "lz4"]))
    with writer(file, made.schema, options=options) as opened:
        opened.write_table(made, max_chunksize=rng.randint(1, 9))
    return file.getvalue()


FORMATS: dict[str, tuple[Callable[[Rows, random.Random], bytes], bool]] = {
    ".jsonl": (json_lines, False),
    ".json": (json_array, False),
    ".csv": (delimited(","), False),
    ".tsv": (delimited("\t"), False),
    ".parquet": (parquet, True),
    ".arrow": (arrow, True),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, removed, repeated or inserted."""
    edited = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(edited) + 1)
        kind = rng.choice(["change", "cut", "remove", "repeat", "insert"])
        if kind == "change" and at < len(edited):
            edited[at] = rng.choice([rng.randrange(256), 0, 255, ord('"'), ord("\n")])
        elif kind == "cut":
            del edited[at:]
        elif kind == "remove":
            del edited[at : at + rng.randint(1, 20)]
        elif kind == "repeat":
            edited[at:at] = edited[at : at + rng.randint(1, 40)]
        else:
            edited[at:at] = rng.choice([rng.randbytes(5), b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"NaN", b"[[[["])
    return bytes(edited)


def read(reader: CorpusReader, ref: Ref) -> Conversation | str:
    """A row's conversation, or the reason for its refusal without the place."""
    try:
        return parse_row(reader.read(ref))
    except (Refused, BrokenRow) as refused:
        is_located = "\n" not in str(refused) and bool(reader.locate_broken(ref))
        assert is_located, str(refused)  # noqa: PT017
        return str(refused)


def outcomes(path: Path, **fields: Any) -> list[Conversation | str]:
    """What each row gives, and last the error that ends the file, if any."""
    found: list[Conversation | str] = []
    try:
        found.extend(_each(path, fields))
    except ValueError as error:
        found.append(f"error: {error}")
        is_one_line = "\n" not in found[-1] and path.name in found[-1]
        assert is_one_line, found[-1]
    return found


def _each(path: Path, fields: dict[str, Any]) -> Iterator[Conversation | str]:
    reader = CorpusReader(Corpus((SourceConfig(path=str(path), **fields),)))
    (opened,) = reader.sources
    for row in range(len(opened)) if isinstance(opened, FileSet) else range(10**9):
        ref = Ref(0, row, 0)
        if isinstance(opened, StreamedReader) and not opened.reaches(ref):
            return
        yield read(reader, ref)


def ended(found: list[Conversation | str]) -> bool:
    return str(found[-1:][0] if found else "").startswith("error: ")


def draw(seed: int, suffix: str, directory: Path) -> None:
    rng = random.Random(seed)
    write, tables = FORMATS[suffix]
    rows, expected = drawn_rows(rng, tables=tables)
    content, packed = write(rows, rng), rng.choice(["", "", *PACKED])
    is_damaged, inside = rng.random() < 0.6, rng.random() < 0.5
    if is_damaged and inside:
        content = damaged(content, rng)
    content = PACKED[packed](content)
    if is_damaged and not inside:
        content = damaged(content, rng)
    path = directory / f"{seed}{suffix}{packed}"
    path.write_bytes(content)
    by_number = outcomes(path)
    forward = outcomes(path, streaming=True, shuffle=False)
    if not is_damaged:
        assert by_number == expected
    if ended(by_number):
        assert is_damaged
        return  # by number the file is judged as a whole
    if ended(forward):
        assert is_damaged
        forward.pop()
    else:
        assert len(forward) == len(by_number)
    assert forward == by_number[: len(forward)]


def draws(suffix: str, directory: Path, count: int) -> None:
    for number in range(count):
        seed = SEED + number
        try:
            draw(seed, suffix, directory)
        except BaseException:
            print(f"SFTSTREAM_SEED={seed} SFTSTREAM_DRAWS=1 repeats this draw")
            raise


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_row_of_a_random_file_is_trained_truly_or_refused_by_its_place(suffix: str, tmp_path: Path) -> None:
    draws(suffix, tmp_path, DRAWS)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_each_row_of_many_random_files_is_trained_truly_or_refused_by_its_place(suffix: str, tmp_path: Path) -> None:
    draws(suffix, tmp_path, MORE_DRAWS)


def test_a_saved_dataset_with_random_rows_is_trained_truly(tmp_path: Path) -> None:
    for number in range(DRAWS):
        rng = random.Random(SEED + number)
        rows, expected = drawn_rows(rng, tables=True)
        path = tmp_path / str(number)
        table(rows).save_to_disk(str(path), num_shards=rng.randint(1, len(rows)))
        assert outcomes(path) == expected, f"SFTSTREAM_SEED={SEED + number} SFTSTREAM_DRAWS=1"
