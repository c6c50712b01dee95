"""The faster tokenizer is used where it gives the same ids, and never where it does not."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sftstream import DataConfig, PackLoader
from sftstream.tokenization import fast_tokenizer
from sftstream.tokenization.fast_tokenizer import FastTokenizer, probes
from sftstream.tokenization.tokenizer import Tokenizer

pytest.importorskip("fastokens")


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    result: list[int] = tokenizer.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return result


def fast(tokenizer: str, *, required: bool = False, wrong: bool = False) -> FastTokenizer:
    """Of the test tokenizer, or of one that lacks a merge."""
    loaded = Tokenizer(tokenizer)
    description = loaded.hf.backend_tokenizer.to_str()
    if wrong:
        table = json.loads(description)
        table["model"]["merges"] = table["model"]["merges"][1:]
        description = json.dumps(table)
    return FastTokenizer(
        description, lambda text: ids(loaded, text), lambda: probes(loaded.vocabulary.special), required=required
    )


def waited(tokenizer: FastTokenizer, text: str) -> list[int]:
    """The ids that it gives once it is loaded."""
    while (found := tokenizer([text])) is None:
        time.sleep(0.01)
    return found.ids.tolist()


@pytest.fixture(scope="module")
def pair(tokenizer: str) -> tuple[Tokenizer, FastTokenizer]:
    made = fast(tokenizer)
    made.load()
    return Tokenizer(tokenizer, "huggingface"), made


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=60) | st.lists(st.sampled_from([*tiny.WORDS, *tiny.SPECIAL, " ", "\n"]), max_size=12).map("".join)
)
def test_it_gives_the_same_ids(pair: tuple[Tokenizer, FastTokenizer], text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    found = pair[1]([text, "north", text])
    assert found is not None
    assert [found.of(number).tolist() for number in range(3)] == [ids(pair[0], text) for text in (text, "north", text)]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_it_passes_for_real_tokenizers(realdata: Path, name: str) -> None:
    made = fast(str(realdata / "tokenizers" / name))
    made.load()
    text = f"Hello {name}, 1234567 Здравствуй 你好\n\n"
    assert waited(made, text) == ids(Tokenizer(str(realdata / "tokenizers" / name)), text)


def test_until_it_is_loaded_it_gives_nothing(tokenizer: str) -> None:
    made = fast(tokenizer)
    assert made(["north"]) is None
    assert waited(made, "north") == ids(Tokenizer(tokenizer), "north")


def test_after_a_fork_it_is_loaded_again(tokenizer: str) -> None:
    made = fast(tokenizer)
    made(["begin to load here"])

    def child(queue: multiprocessing.Queue[list[int]]) -> None:
        queue.put(waited(made, "north river"))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == ids(Tokenizer(tokenizer), "north river")
    process.join()


def test_a_process_may_end_while_it_is_compared(tokenizer: str) -> None:
    program = f"""
import itertools, threading
from sftstream.tokenization.fast_tokenizer import FastTokenizer
from sftstream.tokenization.tokenizer import Tokenizer
backend = Tokenizer({tokenizer!r}).hf.backend_tokenizer
comparing = threading.Event()
def reference(text):
    comparing.set()
    return backend.encode(text, add_special_tokens=False).ids
made = FastTokenizer(backend.to_str(), reference, lambda: itertools.repeat("north " * 500), required=False)
while not comparing.is_set():
    made(["begin"])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_it_cannot_load_is_left_to_the_reference_or_an_error_where_it_is_asked_for() -> None:
    for required in (False, True):
        made = FastTokenizer("{}", lambda text: [0], lambda: [""], required=required)
        made.load()
        if required:
            with pytest.raises(
                RuntimeError, match=r"fastokens \S+ cannot load this tokenizer: .*backend = 'huggingface'"
            ):
                made(["north"])
        else:
            assert made(["north"]) is None


def test_one_that_differs_on_a_probe_is_not_used(tokenizer: str) -> None:
    made = fast(tokenizer, wrong=True)
    made.load()
    assert made(["north"]) is None


def test_one_that_differs_on_a_probe_is_an_error_where_it_is_asked_for(tokenizer: str) -> None:
    made = fast(tokenizer, wrong=True, required=True)
    made.load()
    with pytest.raises(
        RuntimeError, match=r"fastokens \S+ gives other ids than tokenizers for .*backend = 'huggingface'"
    ):
        made(["north"])


@pytest.mark.parametrize("number", [fast_tokenizer.FIRST, fast_tokenizer.BETWEEN, 2 * fast_tokenizer.BETWEEN])
def test_texts_of_the_run_are_compared_too(tokenizer: str, number: int) -> None:
    """The probes know nothing of "north": a tokenizer that lacks its merges would pass without them."""
    loaded = Tokenizer(tokenizer)
    seen: list[str] = []

    def reference(text: str) -> list[int]:
        seen.append(text)
        return [0] if text == "odd" else ids(loaded, text)

    made = FastTokenizer(loaded.hf.backend_tokenizer.to_str(), reference, lambda: [""], required=False)
    made.load()
    made(["north"] * (number // 2))
    made(["north"] * (number - 1 - number // 2))
    with pytest.raises(RuntimeError, match="gives other ids than tokenizers for 'odd'"):
        made(["odd"])
    assert len(seen) == 2 + min(number - 1, fast_tokenizer.FIRST) + (number - 1) // fast_tokenizer.BETWEEN


def with_backend(tokenizer: str, path: str, backend: str) -> DataConfig:
    return tiny.data_config({"path": tokenizer, "backend": backend}, path)


def test_the_packs_are_the_same_and_a_resume_wants_the_same_again(tokenizer: str, corpus_path: str) -> None:
    plain = PackLoader(with_backend(tokenizer, corpus_path, "huggingface"))
    quick = PackLoader(with_backend(tokenizer, corpus_path, "fastokens"))
    quick.encoder.tokenizer.fast_tokenizer.load()
    assert tiny.digests(quick) == tiny.digests(plain)
    with pytest.raises(ValueError, match=r"data.fast_tokenizer: 'fastokens \S+' -> None"):
        PackLoader(with_backend(tokenizer, corpus_path, "huggingface"), state=quick.state_dict())
