"""The parts that the commands of the trainer share: options, exit codes, and the call of typer."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Never

import typer

from sftstream import __version__, one_line, printable
from trainer.process import is_script, prepare_output, program


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


def call_and_exit(app: typer.Typer, arguments: Sequence[str] | None, module: str) -> Never:
    """Run a command without torch on `arguments` (default: the process's) and exit.

    An error is a single line on stderr, with exit code 1. `--debug` or LOGLEVEL=DEBUG shows the
    traceback as well. The line is printed here, since `trainer.process.print_error` imports torch.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("LOGLEVEL") == "DEBUG"
    prepare_output(debug=debug)
    try:
        sys.exit(call(app, words, program(module)))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the only place; a panic of a Rust library is no Exception
        if debug:
            traceback.print_exception(error)
        line = one_line(error)
        if not isinstance(error, ValueError | OSError):
            line = f"{printable(' '.join(words))}: {type(error).__name__}: {line}; --debug shows the traceback"
        sys.exit(f"error: {line}")
