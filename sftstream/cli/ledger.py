"""The commands on the ledger of a run: audit, trace and find."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftstream.cli.output import Json, print_json
from sftstream.excerpt import printable

if TYPE_CHECKING:
    from sftstream.ledger.reader import Ledger

RunDirectory = Annotated[Path, typer.Argument(help="Directory of a run, such as runs/my-run.")]


def _ledger(run: Path) -> Ledger:
    """Return the ledger of a run. Raises ValueError if the directory is not there, or has none."""
    from sftstream.ledger.reader import Ledger

    if not run.is_dir():
        there = "is not a directory" if run.exists() else "does not exist"
        raise ValueError(f"{str(run)!r} {there}; name the directory of a run, such as runs/my-run")
    return Ledger(run)


def audit(
    run: RunDirectory,
    other: Annotated[
        Path | None,
        typer.Argument(help="Directory of a second run, to find the first step in which both differ."),
    ] = None,
    rebuild: Annotated[
        int | None,
        typer.Option(min=0, help="Number of steps, evenly spread, whose packs are built again. Default: all steps."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that a run trained each conversation once an epoch, in the packs of its metrics. The
    exit code is 1 if a difference is found."""
    from sftstream.ledger.audit import audit as audited
    from sftstream.ledger.audit import sessions

    ledger = _ledger(run)
    if other is not None:
        _compare(ledger, _ledger(other), as_json=as_json)
        return
    if as_json:
        report = audited(ledger, rebuild)
        print_json({"sessions": list(sessions(ledger)), **report._asdict()})
        raise typer.Exit(bool(report.differences))
    for line in sessions(ledger):
        typer.echo(printable(line))
    report = audited(ledger, rebuild)
    for title, lines in zip(("proved", "not shown", "difference"), (report[0], report[2], report[1]), strict=True):
        for line in lines:
            typer.echo(printable(f"{title}: {line}"))
    raise typer.Exit(bool(report.differences))


def trace(
    run: RunDirectory,
    step: Annotated[int, typer.Option(help="Number of the step, counted from 1.")],
    pack: Annotated[int | None, typer.Option(help="Pack of the step, counted from 0. Default: all packs.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Model or checkpoint; conversations are sorted by their loss under it, the largest first."),
    ] = None,
    width: Annotated[int, typer.Option(min=8, help="Most characters of a text that are shown.")] = 160,
    as_json: Json = False,
) -> None:
    """Show the conversations of a step: location, roles, trained tokens, and borders in the
    pack."""
    from sftstream.ledger.losses import model_of
    from sftstream.ledger.trace import describe, left_out
    from sftstream.ledger.trace import trace as traced

    ledger = _ledger(run)
    if model is None:
        found = traced(ledger, step, pack)
    else:
        with model_of(model) as opened:
            found = traced(ledger, step, pack, opened.losses)
    if as_json:
        conversations = [conversation._asdict() for conversation in found]
        print_json({"conversations": conversations, "skipped": left_out(ledger, step, pack)})
        return
    for conversation in found:
        for line in describe(conversation, width):
            typer.echo(line)
    for line in left_out(ledger, step, pack):
        typer.echo(line)


def find(
    run: RunDirectory,
    source: Annotated[int, typer.Option(help="Number of the source, counted from 0.")],
    row: Annotated[int, typer.Option(help="Number of the row in the source, counted from 0.")],
    as_json: Json = False,
) -> None:
    """List the steps that trained a row, and its refusals. The exit code is 1 if there are none."""
    from sftstream.ledger.segments import SKIPPED

    ledger = _ledger(run)
    uses, refusals = ledger.uses(source, row), ledger.refusals(source, row)
    if as_json:
        fields = [{**use._asdict(), "skipped": use.trained_tokens == SKIPPED} for use in uses]
        print_json({"uses": fields, "refusals": refusals})
        raise typer.Exit(not uses and not refusals)
    for use in uses:
        part = f", part {use.part}" if use.part else ""
        trained = "skipped" if use.trained_tokens == SKIPPED else f"{use.trained_tokens} trained"
        typer.echo(f"step {use.step}, pack {use.pack}: epoch {use.epoch}{part}, {use.tokens} tokens, {trained}")
    for line in refusals:
        typer.echo(
            printable(f"step {line.step}: refused in epoch {line.epoch}, {line.reason}: {line.detail} ({line.place})")
        )
    if not uses and not refusals:
        typer.echo(f"row {row} of source {source} is in no step of {printable(str(run))}")
        raise typer.Exit(1)


def _compare(a: Ledger, b: Ledger, *, as_json: bool) -> None:
    from sftstream.ledger.compare import compare

    difference, count = compare(a, b)
    if as_json:
        print_json({"equal_steps": count, "steps": [len(a.steps), len(b.steps)], "difference": difference})
        raise typer.Exit(difference is not None)
    if difference is None:
        typer.echo(f"the runs have {count:,} equal steps; A has {len(a.steps):,} steps, B has {len(b.steps):,}")
        return
    typer.echo(printable(f"the runs part after {count:,} equal steps: {difference}"))
    raise typer.Exit(1)
