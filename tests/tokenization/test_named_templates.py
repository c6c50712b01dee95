"""A tokenizer may hold several chat templates by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from commands import run

from sftstream import ChatEncoder
from sftstream.cli.main import main


def with_templates(directory: Path, templates: dict[str, str]) -> str:
    tokenizer = Path(tiny.save_tokenizer(directory / "tokenizer", None))
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    return str(tokenizer)


OTHER = tiny.TEMPLATE + "{#- other -#}"


def test_a_template_is_chosen_by_name_and_the_default_otherwise(tmp_path: Path) -> None:
    tokenizer = with_templates(tmp_path, {"tool_use": OTHER, "default": tiny.TEMPLATE})
    for _ in range(2):  # the second time from the cache
        assert ChatEncoder(tokenizer).template.text == tiny.TEMPLATE
        assert ChatEncoder(tokenizer, "name:tool_use").template.text == OTHER
    with pytest.raises(ValueError, match=r"^the tokenizer has no chat template 'name:rag'; give one of template = "):
        ChatEncoder(tokenizer, "name:rag")


def test_without_a_default_the_only_template_is_taken_and_several_are_listed(tmp_path: Path) -> None:
    assert ChatEncoder(with_templates(tmp_path / "a", {"rag": OTHER})).template.text == OTHER
    with pytest.raises(
        ValueError, match=r'give one of template = "name:rag", template = "name:tool_use", in a config under \['
    ):
        ChatEncoder(with_templates(tmp_path / "b", {"rag": OTHER, "tool_use": OTHER}))


def test_a_command_tells_its_own_way_to_give_a_template(tmp_path: Path) -> None:
    several = with_templates(tmp_path / "named {}", {"rag": OTHER, "tool_use": OTHER})
    bare = tiny.save_tokenizer(tmp_path / "bare", template=None)
    refused = run(main, "template", bare)
    assert refused.stderr == (
        f"error: tokenizer '{bare}' has no chat template; give the path of a file: sftstream template {bare} chat.jinja\n"
    )
    (tmp_path / "chat.jinja").write_text(tiny.TEMPLATE)
    assert run(main, "template", bare, tmp_path / "chat.jinja").exit_code == 0
    for wrong in ((), ("name:nothing",)):
        refused = run(main, "template", several, *wrong)
        assert f"sftstream template '{several}' name:rag, " in refused.stderr
    assert run(main, "template", several, "name:rag").exit_code == 0


@pytest.mark.parametrize("content", ['{"model_type": "unheard"}', "{}", "[]", "x"])
def test_a_directory_without_a_known_tokenizer_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^tokenizer '[^\n]*$"):
        ChatEncoder(str(tmp_path))
