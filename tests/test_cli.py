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


def test_a_config_is_measured_stage_by_stage(tokenizer: str, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.rows(40), {"messages": []}])
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
[data]
streams = 2
global_batch = 2
capacity = 128
workers = 1
[data.tokenizer]
path = {tokenizer!r}
[[data.sources]]
path = "{tmp_path}/rows.jsonl"
"""
    )
    result = CliRunner().invoke(app, ["bench", str(config), "--seconds", "0.2"])
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    speeds = [line for line in lines if line[:1] == ["│"] and line[1] in ("0", "1")]
    assert [line[1] for line in speeds] == ["0", "1"]
    stages = [line[1] for line in lines if line[:1] == ["│"] and len(line) > 5 and line[5].endswith("%")]
    assert stages == ["draw", "load", "template", "tokenize", "pack"]
    shares = [
        int(line[5].rstrip("%")) for line in lines if line[:1] == ["│"] and len(line) > 5 and line[5].endswith("%")
    ]
    assert 95 <= sum(shares) <= 105
    assert any(" ".join(line).startswith("refused, empty conversation:") for line in lines)
