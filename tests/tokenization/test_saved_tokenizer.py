"""The tokenizer of an export is the tokenizer that transformers saves, also from the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer

from sftstream import ChatEncoder, SavedTokenizer
from sftstream.tokenization.tokenizer import Tokenizer

SAVES = """
import sys
from sftstream import ChatEncoder
saved = ChatEncoder(sys.argv[1]).saved_tokenizer()
print(sorted(saved.files), saved.eos_token_id, "transformers.models.auto.tokenization_auto" in sys.modules)
"""
OTHER = tiny.TEMPLATE.replace("ipython", "tool")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved_by_transformers(directory: str | Path, template: str, out: Path) -> dict[str, bytes]:
    hf = AutoTokenizer.from_pretrained(directory)
    hf.chat_template = template
    hf.save_pretrained(out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_second_start_does_not_load_the_tokenizer_of_transformers(tokenizer: str) -> None:
    results = [
        subprocess.run([sys.executable, "-c", SAVES, tokenizer], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert results[0].endswith("True\n")
    assert results[1] == results[0].replace("True\n", "False\n")


@pytest.mark.parametrize("template", [tiny.TEMPLATE, OTHER], ids=["own", "other"])
def test_files_and_ids_are_those_of_transformers(tokenizer: str, tmp_path: Path, template: str) -> None:
    expected = saved_by_transformers(tokenizer, template, tmp_path / "theirs")
    hf = AutoTokenizer.from_pretrained(tokenizer)
    for _ in ("made", "kept"):
        saved = ChatEncoder(tokenizer, template).saved_tokenizer()
        assert saved.files == expected
        assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (
            hf.bos_token_id,
            hf.eos_token_id,
            hf.pad_token_id,
        )


def test_a_template_replaces_all_templates_of_a_tokenizer_and_leaves_the_object_as_it_was(tmp_path: Path) -> None:
    hf = tiny.fast_tokenizer()
    hf.chat_template = named = {"default": tiny.TEMPLATE, "tool_use": OTHER}
    assert ChatEncoder(hf, "name:tool_use").saved_tokenizer().files["chat_template.jinja"] == OTHER.encode()
    assert hf.chat_template == named
    hf.save_pretrained(tmp_path / "named")
    for _ in ("made", "kept"):
        files = ChatEncoder(tmp_path / "named", "name:tool_use").saved_tokenizer().files
        assert [name for name in files if name.endswith(".jinja")] == ["chat_template.jinja"]
        assert files["chat_template.jinja"] == OTHER.encode()


def test_a_kept_tokenizer_belongs_to_the_files_that_the_run_has_read(tmp_path: Path, cache: Path) -> None:
    directory = Path(tiny.save_tokenizer(tmp_path / "one"))
    opened = Tokenizer(directory)
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|pad|>", "<|eot_id|>"))
    opened.saved(tiny.TEMPLATE)
    assert not list(cache.rglob("*.savedtokenizer"))
    changed = Tokenizer(directory).saved(tiny.TEMPLATE)
    assert changed == SavedTokenizer.of(AutoTokenizer.from_pretrained(directory), tiny.TEMPLATE)
    assert len(list(cache.rglob("*.savedtokenizer"))) == 1
