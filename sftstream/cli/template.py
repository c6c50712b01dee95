"""The command that reports on a chat template."""

from __future__ import annotations

from typing import Annotated

import typer

from sftstream.cli.output import Json, print_json


def template(
    tokenizer: Annotated[str, typer.Argument(help="Directory or hub name of a Hugging Face tokenizer.")],
    path: Annotated[
        str | None,
        typer.Argument(
            help="Jinja file of a chat template. Default: the tokenizer's own template.", show_default=False
        ),
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(help="Day that the template prints as today, as YYYY-MM-DD. Default: today.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print how an assistant's turns begin and end in a chat template, and the shapes of
    conversation that are printed whole or not."""
    import shlex

    from sftstream.cli.template_report import rows_of, show_report
    from sftstream.tokenization.encoder import ChatEncoder

    def typed(template: str) -> str:
        return shlex.join(["sftstream", "template", tokenizer, template])

    encoder = ChatEncoder(tokenizer, path, date=date, template_setting=typed)
    if as_json:
        print_json({**rows_of(encoder), "shapes": encoder.report.shapes})
    else:
        show_report(encoder)
