"""The parts that the commands of the trainer share: options, exit codes, and the call of typer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer

from sftstream import __version__
from trainer.process import is_script


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sftstream {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)]
"""The option `--version` of a command."""
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback behind an error as well.")]
"""The option `--debug` of a command."""


def epilog(examples: Sequence[str], codes: Mapping[int, str]) -> str:
    r"""Return examples and exit codes as the end of a help text; `\b` keeps lines apart."""
    shown = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExamples:\n{shown}\n\n\b\nExit codes:\n" + "\n".join(
        f"  {code:<3} {meaning}" for code, meaning in codes.items()
    )


def application(function: Callable[..., None], end: str) -> typer.Typer:
    """Return the command of a single function, with the end of its help."""
    app = typer.Typer(
        add_completion=is_script(),  # shells complete no `python -m`
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich takes [data] in a help text for markup and prints nothing
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(epilog=end)(function)
    return app


def call(app: typer.Typer, words: Sequence[str], name: str) -> int:
    """Run a command and return its exit code."""
    try:
        app(list(words), prog_name=name)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
