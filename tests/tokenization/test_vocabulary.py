"""The vocabulary of a tokenizer is computed once a machine, and anew after a change of a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import PreTokenizer

from sftstream import ChatEncoder
from sftstream.tokenization import vocabulary
from sftstream.tokenization.tokenizer import Tokenizer
from sftstream.tokenization.tokenizer_files import MAX_BYTES
from sftstream.tokenization.vocabulary import describe, load, open_vocabulary, with_short_merges

READS = """
import sys
from sftstream import ChatEncoder
(example,) = ChatEncoder(sys.argv[1]).encode([{"role": "user", "content": "north"}, {"role": "assistant", "content": "river"}])
print(example.tokens.tolist(), "transformers.models.auto.tokenization_auto" in sys.modules)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.vocabulary"))


def read(directory: str) -> str:
    return printed(READS, directory)


def printed(code: str, directory: str) -> str:
    command = [sys.executable, "-c", code, directory]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_a_second_start_does_not_load_the_tokenizer_of_transformers(tokenizer: str) -> None:
    tokens, opened = read(tokenizer).rsplit(" ", 1)
    assert opened == "True"
    assert read(tokenizer) == f"{tokens} False"


COUNTS = """
import sys
from sftstream import count_token_ids
print(count_token_ids(sys.argv[1]), "transformers.models.auto.tokenization_auto" in sys.modules)
"""


def test_token_ids_are_counted_from_the_files_and_from_the_cache(tokenizer: str) -> None:
    ids = max(load(tokenizer).backend_tokenizer.get_vocab().values()) + 1
    assert ids == len(Tokenizer(load(tokenizer)))
    assert [printed(COUNTS, tokenizer) for _ in range(2)] == [f"{ids} True", f"{ids} False"]


def test_a_cached_vocabulary_equals_that_of_the_files(tokenizer: str, cache: Path) -> None:
    made = open_vocabulary(tokenizer).vocabulary
    found, backend, *_ = open_vocabulary(tokenizer)
    assert len(kept(cache)) == 1
    assert made == found == describe(load(tokenizer))
    assert backend.to_str() == load(tokenizer).backend_tokenizer.to_str()
    assert ChatEncoder(tokenizer).stop_ids == ChatEncoder(load(tokenizer)).stop_ids


def merging(*merges: tuple[str, str]) -> str:
    """A tokenizer.json."""
    texts = dict.fromkeys(text for left, right in merges for text in (left, right, left + right))
    return Backend(BPE({text: index for index, text in enumerate(texts)}, list(merges))).to_str()


def test_merges_are_cached_in_the_notation_that_loads_faster(tokenizer: str) -> None:
    kept = json.loads(open_vocabulary(tokenizer).vocabulary.description)["model"]["merges"]
    assert kept
    assert all(isinstance(merge, str) for merge in kept)
    assert Backend.from_str(with_short_merges(merging(("#", "v"), ("#v", "x")))).encode("#vx").tokens == ["#vx"]


ODD = (
    '"',
    "\\",
    ",",
    '",',
    '","',
    '"],["',
    '\\"',
    '\\",',
    "\\\\",
    "[[",
    "]]",
    "\n",
    "\x00",
    "\x01",
    "\x02",
    "\t#",
    "é",
    "😀",
)
"""Tokens that JSON escapes, or that look like the borders of a list."""


def test_any_tokens_are_equal_in_the_notation_that_loads_faster() -> None:
    description = merging(*((left, right) for left in ODD for right in ODD))
    short = with_short_merges(description)
    assert json.loads(short)["model"]["merges"] == [f"{left} {right}" for left in ODD for right in ODD]
    assert Backend.from_str(short).to_str() == description


@pytest.mark.parametrize("merge", [("a b", "c"), ("a", " "), ("#versio", "n"), ("#version", "s")])
def test_merges_that_the_faster_notation_cannot_hold_stay_as_they_are(merge: tuple[str, str]) -> None:
    description = merging(("x", "y"), merge)
    assert Backend.from_str(with_short_merges(description)).to_str() == description


def test_a_tokenizer_without_merges_stays_as_it_is() -> None:
    description = Backend(WordLevel({"a": 0}, unk_token="a")).to_str()
    assert with_short_merges(description) == description


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_change_of_any_file_is_seen(tmp_path: Path, cache: Path, name: str) -> None:
    directory = Path(tiny.save_tokenizer(tmp_path / "one"))
    before, *_ = open_vocabulary(directory)
    text = (directory / name).read_text()
    (directory / name).write_text(
        text.replace("<|eom_id|>", "<|eon_id|>").replace("<|pad|>", "<|eot_id|>").replace("ipython", "tool")
    )
    after, *_ = open_vocabulary(directory)
    assert after == describe(load(str(directory)))
    assert after != before
    assert len(kept(cache)) == 2


def test_a_copy_of_the_directory_uses_the_same_cached_vocabulary(tokenizer: str, tmp_path: Path, cache: Path) -> None:
    open_vocabulary(tokenizer)
    copy = Path(tiny.save_tokenizer(tmp_path / "copy"))
    open_vocabulary(copy)
    assert len(kept(cache)) == 1
    assert Tokenizer(copy).name == str(copy)


def test_a_damaged_cached_vocabulary_is_computed_again(tokenizer: str, cache: Path) -> None:
    made = open_vocabulary(tokenizer).vocabulary
    (path,) = kept(cache)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"lantern", b"lentern"))
    assert path.read_bytes() != content
    assert open_vocabulary(tokenizer)[0] == made
    assert path.read_bytes() == content


def test_a_run_starts_without_a_cache_that_can_be_written(tokenizer: str, cache: Path) -> None:
    cache.write_text("a file")
    made = open_vocabulary(tokenizer).vocabulary
    assert made == describe(load(tokenizer))


def test_a_directory_with_too_large_files_is_not_cached(tmp_path: Path, cache: Path) -> None:
    directory = Path(tiny.save_tokenizer(tmp_path / "one"))
    open_vocabulary(directory)
    (directory / "model.safetensors").write_bytes(b"weights")
    open_vocabulary(directory)
    assert len(kept(cache)) == 1
    with (directory / "rows.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    open_vocabulary(directory)
    assert len(kept(cache)) == 1


def test_a_tokenizer_that_changes_while_it_is_read_is_not_cached(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(tiny.save_tokenizer(tmp_path / "one"))

    def changing(source: str) -> Any:
        (directory / "chat_template.jinja").write_text("{{ bos_token }}")
        return load(source)

    monkeypatch.setattr(vocabulary, "load", changing)
    assert open_vocabulary(directory)[0].template == "{{ bos_token }}"
    assert not kept(cache)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    directory = Path(tiny.save_tokenizer(tmp_path / "one"))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"one' has no tokenizer\.json; name the directory of a tokenizer, or save one"
    ):
        open_vocabulary(directory)


def test_a_tokenizer_with_parts_of_python_code_is_an_error() -> None:
    class Splitter:
        def pre_tokenize(self, text: Any) -> None:
            """Leaves it whole."""

    hf = tiny.fast_tokenizer()
    hf.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Splitter())
    with pytest.raises(ValueError, match=r"has a PreTokenizer written in Python, which a tokenizer\.json cannot store"):
        open_vocabulary(hf)


def test_truncation_and_padding_stored_in_a_tokenizer_json_are_not_applied(tmp_path: Path) -> None:
    directory = Path(tiny.save_tokenizer(tmp_path / "cut"))
    file = directory / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": truncation}))
    for _ in ("first start", "second start"):
        opened = Tokenizer(directory)
        assert len(opened.ids("north river stone")) > 2
        assert len(opened.hf("north river stone")["input_ids"]) > 2


def test_a_directory_given_relative_to_the_home_directory_is_cached(
    tokenizer: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.save_tokenizer(tmp_path / "own")
    open_vocabulary("~/own")
    assert len(kept(cache)) == 1
