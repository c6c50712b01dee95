"""The tables of docs/moving_in.md name keys that exist, here and in the other trainers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trainer.config import TrainConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "moving_in.md"
PACKAGES = {
    "TRL": ("trl", "transformers", "datasets"),
    "axolotl": ("axolotl",),
    "LLaMA-Factory": ("llamafactory", "transformers"),
    "torchtune": ("torchtune", "recipes"),
    "torchtitan": ("torchtitan",),
}
"""Trainer -> the packages in which its keys are defined."""


def cells() -> Iterator[tuple[str, str]]:
    """Every cell of the tables of keys, with the trainers of its column."""
    head: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not row:
            head = []
        elif not head:
            head = row
        elif head[0] == "here" and not row[0].startswith("-"):
            yield from zip(head, row, strict=True)


def spelled(column: str) -> set[str]:
    """The names in backticks in the columns with a head."""
    return {name for head, cell in cells() if head == column for name in re.findall(r"`([^`]+)`", cell)}


def fields(kind: Any) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.inspect.type_info(kind).fields}


def test_every_key_of_the_column_here_is_a_key_of_the_config() -> None:
    sections: dict[str, Any] = {}
    for name, found in fields(TrainConfig).items():
        kinds = found.types if isinstance(found, msgspec.inspect.UnionType) else [found]
        sections |= dict((name, kind.cls) for kind in kinds if isinstance(kind, msgspec.inspect.StructType))
    keys = {f"{name}.{key}" for name, section in sections.items() for key in fields(section)}
    keys |= {f"data.tokenizer.{key}" for key in fields(fields(sections["data"])["tokenizer"].cls)}
    source = fields(fields(sections["data"])["sources"].item_type.cls)
    keys |= {f"data.sources[].{key}" for key in source} | set(source) | {"model.init_from"}
    assert len(spelled("here")) > 40
    assert spelled("here") - keys == set()


@pytest.mark.parametrize("column", [*PACKAGES, "TRL, LLaMA-Factory"])
def test_every_key_of_another_trainer_is_in_its_source(column: str) -> None:
    packages = [PACKAGES[trainer] for trainer in column.split(", ")]
    if missing := [first for first, *_ in packages if importlib.util.find_spec(first) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    found = [importlib.util.find_spec(name) for names in packages for name in names]
    folders = [Path(place) for spec in found if spec for place in spec.submodule_search_locations or ()]
    words = {word for folder in folders for word in _words(folder)}
    named = {word for name in spelled(column) for word in re.findall(r"[A-Za-z_]\w+", name)}
    assert len(named) > 20
    assert named - words == set()


def _words(folder: Path) -> set[str]:
    files = [path for path in folder.rglob("*.*") if path.suffix in (".py", ".yaml")]
    return {
        word
        for path in files
        for word in re.findall(r"[A-Za-z_]\w+", path.read_text(encoding="utf-8", errors="ignore"))
    }
