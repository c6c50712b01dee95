"""The commands of `sftstream`: help texts, and exit codes for errors.

No module imported here imports torch, transformers or pyarrow, so that help and completion are
fast. Each verb imports its libraries when it runs.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from sftstream import __version__
from sftstream.cli.bench import bench
from sftstream.cli.init import init
from sftstream.cli.inspect import diff, inspect
from sftstream.cli.ledger import audit, find, trace
from sftstream.cli.preview import preview
from sftstream.cli.rebase import rebase
from sftstream.cli.stats import stats
from sftstream.cli.template import template
from sftstream.cli.usage import USAGE
from sftstream.cli.verify import verify_resume
from sftstream.door import is_ours
from sftstream.excerpt import one_line, printable

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes [data] in a help text for markup and prints nothing
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

VERBS = (init, preview, stats, template, inspect, diff, rebase, bench, audit, trace, find, verify_resume)
"""Functions of the verbs, in the order of the help."""

for _verb in VERBS:
    _name = _verb.__name__.replace("_", "-")
    app.command(_name, short_help=USAGE[_name].short, epilog=USAGE[_name].text())(_verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sftstream {__version__}")
        raise typer.Exit


@app.callback(epilog="Every verb has --help with examples and exit codes. --debug shows the traceback of an error.")
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Look at the data of a fine-tuning run, before, while and after it trains."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in `arguments`, by default those of the process.

    An error becomes a single line on stderr and exit code 1. `--debug` or LOGLEVEL=DEBUG shows the
    traceback as well.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("LOGLEVEL") == "DEBUG"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        app([word for word in words if word != "--debug"], prog_name="sftstream")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the only place; a panic of a Rust library is no Exception
        if debug:
            traceback.print_exception(error)
        line = one_line(error)
        if not ((isinstance(error, ValueError) and is_ours(error)) or isinstance(error, OSError)):
            line = f"{printable(' '.join(words))}: {type(error).__name__}: {line}; --debug shows the traceback"
        sys.exit(f"error: {line}")
