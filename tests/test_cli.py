"""The commands, as a person types them."""

from __future__ import annotations

from pathlib import Path

import tiny
from typer.testing import CliRunner

from sftstream.cli.main import app


def test_a_template_is_certified_in_one_table(tokenizer: str) -> None:
    result = CliRunner().invoke(app, ["template", tokenizer])
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "it ends with <|eot_id|>" in lines
    assert "earlier turns stay as they are" in lines
    assert "two tool calls printed whole" in lines
    assert "reasoning drops assistant reasoning" in lines


def test_another_template_and_date_can_be_looked_at(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(tiny.DATED_TEMPLATE)
    result = CliRunner().invoke(app, ["template", tokenizer, str(tmp_path / "dated.jinja"), "--date", "2025-01-31"])
    assert "printed, as 2025-01-31" in " ".join(result.output.split())


def test_what_is_wrong_is_one_line(tokenizer: str) -> None:
    result = CliRunner().invoke(app, ["template", tokenizer, "nowhere.jinja"])
    assert result.exit_code == 1
    assert result.output == (
        "error: chat template 'nowhere.jinja' cannot be read: No such file or directory; give a file or the Jinja text\n"
    )
