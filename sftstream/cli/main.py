"""The commands."""

from __future__ import annotations

from typing import Annotated

import typer

from sftstream.cli.template import show_certificate
from sftstream.encoder import ChatEncoder

app = typer.Typer(add_completion=False, help="Looks at what a stream of fine-tuning data does, without training.")


@app.callback()
def _commands() -> None:
    """Keeps `template` a word of its own while it is the only command."""


@app.command()
def template(
    tokenizer: Annotated[str, typer.Argument(help="A Hugging Face tokenizer's directory or hub name.")],
    path: Annotated[str | None, typer.Argument(help="A Jinja file in place of the tokenizer's own template.")] = None,
    date: Annotated[str | None, typer.Option(help="What it prints as today, YYYY-MM-DD.")] = None,
) -> None:
    """Certify a chat template: how turns begin and end in it, and what it does to each shape of conversation."""
    try:
        show_certificate(ChatEncoder(tokenizer, path, date=date))
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """The `sftstream` command."""
    app()
