"""Check that the documents name existing things, and run their examples."""

from __future__ import annotations

import ast
import doctest
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config_file import parse_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "AGENTS.md")]
PAGES += sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages on the present code; the changelog also names removed files."""
ROOMS = ("", "docs", "tests", "sftstream", "checkpoints", "trainer")
"""Folders that a path on a page may be relative to, besides the page's own folder."""
POINTERS = {"what", "which", "where", "when", "who", "whose", "whatever", "whoever", "those", "their", "theirs", "both"}
POINTERS |= {"neither", "of", "so", "as", "whether", "likewise"}
"""Words that point at something instead of naming it; no docstring opens with one."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(page: Path, language: str) -> list[str]:
    """Return the page's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_of_config_keys_is_what_the_structs_say() -> None:
    generated = runpy.run_path(str(ROOT / "docs" / "generate_config.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == generated, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_every_python_file_and_folder_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    named |= set(
        re.findall(r"\b((?:sftstream|checkpoints|trainer|tests|benchmarks|examples|docs)/[\w/.]+\.\w+)\b", text)
    )
    folders = [page.parent, *(ROOT / room for room in ROOMS)]
    folders += [folder for room in ROOMS[2:] for folder in (ROOT / room).rglob("*/") if folder.is_dir()]
    missing = {path for path in named if not any((folder / path).exists() for folder in folders)}
    assert missing == set()


def test_every_promise_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines() if "**" in line]
    assert len(rows) >= 10
    assert [row for row in rows if "/test_" not in row and "durability.md" not in row] == []


def test_the_first_config_is_read() -> None:
    (block,) = code(ROOT / "README.md", "toml")
    assert parse_config(tomllib.loads(block)).run.name == "first"


@pytest.mark.parametrize("page", ["data.md", "lora.md", "operations.md"])
def test_every_piece_of_a_config_is_read(page: str) -> None:
    blocks = code(ROOT / "docs" / page, "toml")
    assert blocks
    for block in blocks:
        tables = tomllib.loads(block)
        data = {"sources": [{"path": "rows.jsonl"}], "tokenizer": {"path": "model"}} | tables.get("data", {})
        parse_config({"run": {"epochs": 1}, "model": {"init_from": "model"}} | tables | {"data": data})


def test_the_way_of_a_conversation_has_the_values_of_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "architecture.md"), module_relative=False)
    assert tried > 10
    assert not failed


def test_the_library_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    blocks = code(ROOT / "docs" / "data.md", "python")
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "pack 2 is next" in capsys.readouterr().out
    assert not re.search(r"^>>> ", "".join(blocks), re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every docstring of a file, including fields and constants."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            yield from (
                (literal.lineno, literal.value.value)
                for literal in body
                if isinstance(literal, ast.Expr)
                and isinstance(literal.value, ast.Constant)
                and isinstance(literal.value.value, str)
            )


@pytest.mark.parametrize("package", ["sftstream", "checkpoints", "trainer"])
def test_every_docstring_opens_by_naming_its_subject(package: str) -> None:
    found = [
        f"{name_of(path)}:{line} {text[:60]!r}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in docstrings(path)
        if POINTERS.intersection(re.findall(r"[a-z']+", text.lower())[:1])
    ]
    assert found == []
