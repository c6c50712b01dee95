"""The commands of `sftstream`: help texts, and exit codes for errors."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from sftstream.cli.bench import measure, show
from sftstream.cli.ledger import audit, find, trace
from sftstream.cli.state import read_data_config, read_state, rebased
from sftstream.cli.template import show_report
from sftstream.cli.verify import verify_resume
from sftstream.excerpt import one_line, printable
from sftstream.state import describe
from sftstream.state import diff as differing
from sftstream.tokenization.encoder import ChatEncoder

app = typer.Typer(
    add_completion=False,
    help="Inspect the data stream of a fine-tuning run without training.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes [data] in a help text for markup and prints nothing
)


@app.command()
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
) -> None:
    """Print how an assistant's turns begin and end in a chat template, and the shapes of
    conversation that are printed whole or not."""
    show_report(ChatEncoder(tokenizer, path, date=date))


@app.command()
def inspect(state: Annotated[Path, typer.Argument(help="JSON file with the state dict of all streams.")]) -> None:
    """Print the progress of a state, its data and settings, and the reasons of refused rows."""
    typer.echo(printable(describe(read_state(state))))


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="JSON file with the state dict of all streams.")],
    after: Annotated[Path, typer.Argument(help="JSON file with the state dict to compare it with.")],
) -> None:
    """Print each field in which two states differ. The exit code is 0 if the states are equal,
    else 1."""
    differences = differing(read_state(before), read_state(after))
    for line in differences:
        typer.echo(printable(line))
    raise typer.Exit(bool(differences))


@app.command()
def rebase(
    state: Annotated[Path, typer.Argument(help="JSON file with the state dict of all streams.")],
    config: Annotated[Path, typer.Argument(help="TOML file of the run with the new settings in [data].")],
    out: Annotated[
        Path, typer.Argument(help="JSON file to write the new state dict to. An existing file is replaced.")
    ],
    accept: Annotated[
        list[str],
        typer.Option(help="Setting that may differ from the state's, such as data.capacity. Repeat it for several."),
    ] = [],  # noqa: B006
) -> None:
    """Carry a state over to new settings. No row is lost or repeated, and the new state records
    each accepted change."""
    new = rebased(read_state(state), read_data_config(config, accept))
    out.write_bytes(msgspec.json.encode(new.state_dict()))
    typer.echo(printable(describe(new)))


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="TOML file of a run, of which the [data] table is read.")],
    seconds: Annotated[float, typer.Option(help="Duration of each measurement in seconds.")] = 5.0,
) -> None:
    """Measure how fast the packs of a run come on this machine, as a whole and stage by stage."""
    show(*measure(read_data_config(config, []), seconds), Console(highlight=False, markup=False))


for _command in (audit, trace, find, verify_resume):
    app.command()(_command)


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
        if not isinstance(error, ValueError | OSError):
            line = f"{printable(' '.join(words))}: {type(error).__name__}: {line}; --debug shows the traceback"
        sys.exit(f"error: {line}")
