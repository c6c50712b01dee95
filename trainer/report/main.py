"""The command `python -m trainer.report`. Reports are made without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trainer.usage import Debug, Version, application, call_and_exit, epilog

MODULE = "trainer.report"
EXAMPLES = (
    "python -m trainer.report runs/first                 # figures, and the page runs/first/report.html",
    "python -m trainer.report runs/first runs/second     # side by side, and the page comparison.html",
    "python -m trainer.report runs/first --json",
)
END = epilog(
    EXAMPLES,
    {
        0: "success",
        1: "an error; one line on stderr says what is wrong and how to go on",
        2: "an unknown option or argument",
    },
)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs, under way or ended.")],
    html: Annotated[
        Path | None,
        typer.Option(
            help="File to write the page to. Default: report.html in the directory of a single run, comparison.html here "
            "for several runs, and no page with --json.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document for programs, instead of text.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001 - `main` reads the option
    version: Version = False,  # noqa: ARG001 - typer calls its callback
) -> None:
    """Report on a training run, or compare several: curves, speed, interruptions, refused rows,
    checkpoints, settings, in the terminal and as a page."""
    from rich.console import Console

    from sftstream import show_result
    from trainer.report.compare import compare
    from trainer.report.compare_page import compare_page
    from trainer.report.page import page
    from trainer.report.read import RunReader
    from trainer.report.terminal import show_comparison, show_run
    from trainer.report.writer import NAME

    summaries = [RunReader(run).summary() for run in runs]
    console = Console(highlight=False, markup=False)
    if len(summaries) == 1:
        (summary,) = summaries
        out = html or (None if as_json else runs[0] / NAME)
        show_result(summary, lambda: page(summary), out, lambda: show_run(summary, console), as_json=as_json)
        return
    found = compare(summaries)
    out = html or (None if as_json else Path("comparison.html"))
    show_result(found, lambda: compare_page(found), out, lambda: show_comparison(found, console), as_json=as_json)


app = application(report, END)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit. An error is a single line on stderr, with exit code 1."""
    call_and_exit(app, arguments, MODULE)
