"""The commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from sftstream.cli.bench import bench, show
from sftstream.cli.state import read_data_config, read_state, rebased
from sftstream.cli.template import show_report
from sftstream.state import describe
from sftstream.state import diff as differing
from sftstream.tokenization.encoder import ChatEncoder

app = typer.Typer(add_completion=False, help="Looks at what a stream of fine-tuning data does, without training.")


@app.command()
def template(
    tokenizer: Annotated[str, typer.Argument(help="A Hugging Face tokenizer's directory or hub name.")],
    path: Annotated[str | None, typer.Argument(help="A Jinja file in place of the tokenizer's own template.")] = None,
    date: Annotated[str | None, typer.Option(help="What it prints as today, YYYY-MM-DD.")] = None,
) -> None:
    """Certify a chat template: how turns begin and end in it, and what it does to each shape of conversation."""
    with _one_line_errors():
        show_report(ChatEncoder(tokenizer, path, date=date))


@app.command()
def inspect(state: Annotated[Path, typer.Argument(help="A state dict in a JSON file.")]) -> None:
    """Say how far a state is, what it is made of, and what was refused."""
    with _one_line_errors():
        typer.echo(describe(read_state(state)))


@app.command()
def diff(before: Path, after: Path) -> None:
    """Show each field in which two states differ; the exit code is 1 where there is any."""
    with _one_line_errors():
        differences = differing(read_state(before), read_state(after))
    for line in differences:
        typer.echo(line)
    raise typer.Exit(bool(differences))


@app.command()
def rebase(
    state: Annotated[Path, typer.Argument(help="The state dict of all streams, in a JSON file.")],
    config: Annotated[Path, typer.Argument(help="The run's TOML with the new settings.")],
    out: Annotated[Path, typer.Argument(help="Where the new state dict goes.")],
    accept: Annotated[list[str], typer.Option(help="A setting that may differ, by name: data.capacity.")] = [],  # noqa: B006
) -> None:
    """Carry a state over to other settings: nothing is lost or repeated, and the state records what changed."""
    with _one_line_errors():
        new = rebased(read_state(state), read_data_config(config, accept))
        out.write_bytes(msgspec.json.encode(new.builtins()))
        typer.echo(describe(new))


@app.command(name="bench")
def measure(
    config: Annotated[Path, typer.Argument(help="A run's TOML: its [data] table is read.")],
    seconds: Annotated[float, typer.Option(help="How long each measurement lasts.")] = 5.0,
) -> None:
    """Say how fast a run's data comes on this machine, stage by stage."""
    with _one_line_errors():
        show(*bench(read_data_config(config, []), seconds), Console(highlight=False))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """The `sftstream` command."""
    app()
