"""fastokens computes the ids if its ids equal those of `tokenizers`, and never otherwise."""

from __future__ import annotations

import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from sftstream import DataConfig, PackLoader
from sftstream.tokenization import fast_tokenizer
from sftstream.tokenization.fast_tokenizer import LOAD_AFTER, FastTokenizer, probes
from sftstream.tokenization.tokenizer import Tokenizer

pytest.importorskip("fastokens")


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    result: list[int] = tokenizer.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return result


def fast(tokenizer: str, *, required: bool = False, wrong: bool = False) -> FastTokenizer:
    """Return fastokens for the test tokenizer, `wrong` without its first merge."""
    loaded = Tokenizer(tokenizer)
    description = loaded.hf.backend_tokenizer.to_str()
    if wrong:
        table = json.loads(description)
        table["model"]["merges"] = table["model"]["merges"][1:]
        description = json.dumps(table)
    return FastTokenizer(
        description, lambda text: ids(loaded, text), lambda: probes(loaded.vocabulary.special), required=required
    )


@pytest.fixture(scope="module")
def pair(tokenizer: str) -> tuple[Tokenizer, FastTokenizer]:
    made = fast(tokenizer)
    made.load()
    return Tokenizer(tokenizer, "huggingface"), made


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=60) | st.lists(st.sampled_from([*tiny.WORDS, *tiny.SPECIAL, " ", "\n"]), max_size=12).map("".join)
)
def test_fastokens_gives_the_ids_of_tokenizers(pair: tuple[Tokenizer, FastTokenizer], text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    found = pair[1]([text, "north", text])
    assert found is not None
    assert [found.of(number).tolist() for number in range(3)] == [ids(pair[0], text) for text in (text, "north", text)]


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_real_tokenizers_pass_all_probes(realdata: Path, name: str) -> None:
    made = fast(str(realdata / "tokenizers" / name))
    made.load()
    text = f"Hello {name}, 1234567 Здравствуй 你好\n\n"
    found = made([text])
    assert found is not None
    assert found.ids.tolist() == ids(Tokenizer(str(realdata / "tokenizers" / name)), text)


def test_fastokens_is_loaded_once_many_characters_were_encoded(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokenizer, "LOAD_AFTER", 10)
    made = fast(tokenizer)
    assert made(["north"]) is None
    found = made(["river"])
    assert found is not None
    assert found.ids.tolist() == ids(Tokenizer(tokenizer), "river")
    assert fast(tokenizer, required=True)(["river"]) is not None


def test_fastokens_is_loaded_in_the_thread_that_encodes(tokenizer: str) -> None:
    """Another thread would read the environment while a library or a test changes it."""
    threads = threading.active_count()
    assert fast(tokenizer)(["north " * LOAD_AFTER]) is not None
    assert threading.active_count() == threads


def test_no_other_thread_loads_fastokens_unless_it_is_required(tokenizer: str) -> None:
    made, required = fast(tokenizer), fast(tokenizer, required=True)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(made, ["north " * LOAD_AFTER]).result() is None
        assert other.submit(required, ["north"]).result() is not None
    assert made(["north"]) is not None


def test_a_required_fastokens_can_be_loaded_before_the_first_text(tokenizer: str) -> None:
    made, required = fast(tokenizer), fast(tokenizer, required=True)
    for one in (made, required):
        one.load_if_required()
    assert (made._encode is None, required._encode is None) == (True, False)


@pytest.mark.parametrize("loaded", [False, True], ids=["before loading", "after loading"])
def test_a_forked_process_encodes_with_fastokens(tokenizer: str, *, loaded: bool) -> None:
    made = fast(tokenizer)
    if loaded:
        made.load()

    def child(queue: multiprocessing.Queue[list[int]]) -> None:
        if not loaded:
            made.load()
        found = made(["north river"])
        queue.put([] if found is None else found.ids.tolist())

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == ids(Tokenizer(tokenizer), "north river")
    process.join()


def test_a_description_that_cannot_be_loaded_is_an_error_only_if_fastokens_is_required() -> None:
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


def test_fastokens_is_not_used_if_a_probe_differs(tokenizer: str) -> None:
    made = fast(tokenizer, wrong=True)
    made.load()
    assert made(["north"]) is None


def test_a_probe_that_differs_is_an_error_if_fastokens_is_required(tokenizer: str) -> None:
    made = fast(tokenizer, wrong=True, required=True)
    made.load()
    with pytest.raises(
        RuntimeError, match=r"fastokens \S+ gives other ids than tokenizers for .*backend = 'huggingface'"
    ):
        made(["north"])


@pytest.mark.parametrize(
    "number", [fast_tokenizer.COMPARE_FIRST, fast_tokenizer.COMPARE_EVERY, 2 * fast_tokenizer.COMPARE_EVERY]
)
def test_a_text_of_the_run_that_differs_is_an_error(tokenizer: str, number: int) -> None:
    """No probe has the word "north": a tokenizer without its merges passes all probes."""
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
    assert len(seen) == 2 + min(number - 1, fast_tokenizer.COMPARE_FIRST) + (number - 1) // fast_tokenizer.COMPARE_EVERY


def with_backend(tokenizer: str, path: str, backend: str) -> DataConfig:
    return tiny.data_config({"path": tokenizer, "backend": backend}, path)


def test_packs_are_the_same_with_fastokens_and_a_resume_needs_the_same_backend(
    tokenizer: str, corpus_path: str
) -> None:
    plain = PackLoader(with_backend(tokenizer, corpus_path, "huggingface"))
    quick = PackLoader(with_backend(tokenizer, corpus_path, "fastokens"))
    quick.encoder.tokenizer.fast_tokenizer.load()
    assert tiny.digests(quick) == tiny.digests(plain)
    with pytest.raises(ValueError, match=r"data.fast_tokenizer: 'fastokens' -> None"):
        PackLoader(with_backend(tokenizer, corpus_path, "huggingface"), state=quick.state_dict())
