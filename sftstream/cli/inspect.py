"""The commands on data states: inspect and diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftstream.cli.output import Json, print_json
from sftstream.excerpt import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sftstream.inspection.summary import SourceSummary, StateSummary

AMOUNTS = ("conversations", "tokens", "trained_tokens")
"""Fields of the amount that was read from a source."""

StatePath = Annotated[
    str,
    typer.Argument(help="JSON file with a state dict, a checkpoint, or the directory of a run; also a URL."),
]
"""The argument of a verb that reads a state, as `sftstream.read_state` does."""


def require_place(state: str) -> str:
    """Return a path as a user typed it. Raises ValueError if nothing is there; a URL is not looked
    up."""
    from sftstream.inspection.stored import REMEDY

    if "://" not in state and not Path(state).exists():
        raise ValueError(f"{state!r} does not exist; {REMEDY}")
    return state


def inspect(state: StatePath, as_json: Json = False) -> None:
    """Print the progress of a state: where each source and each stream is, the mixture reached,
    waiting and refused rows, the identity of the data, and accepted changes."""
    from sftstream.inspection.stored import find_state
    from sftstream.inspection.summary import summarize

    found = find_state(require_place(state))
    summary = summarize(found.state)
    if as_json:
        print_json({"place": found.place, **_fields(summary)})
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(printable(found.place), soft_wrap=True)
    for part in _tables(summary):
        console.print(part)


def diff(
    before: StatePath,
    after: StatePath,
    as_json: Json = False,
) -> None:
    """Print each field in which two states differ. The exit code is 0 if the states are equal,
    else 1."""
    from sftstream.inspection.stored import read_state
    from sftstream.inspection.text import diff as differing

    differences = differing(*(read_state(require_place(state)) for state in (before, after)))
    if as_json:
        print_json({"equal": not differences, "differences": differences})
    else:
        for line in differences:
            typer.echo(printable(line))
    raise typer.Exit(bool(differences))


def _fields(summary: StateSummary) -> dict[str, object]:
    import msgspec

    return msgspec.structs.asdict(summary)


def _amount(source: SourceSummary, name: str, *, several: bool) -> str:
    """Return an amount of a source, with its share of the mixture if there are several sources."""
    share = f" ({getattr(source.share, name):.1%})" if several else ""
    return f"{getattr(source.accepted, name):,}{share}"


def _tables(summary: StateSummary) -> list[RenderableType]:
    """Return the parts of the text for people: sources, streams, and the lines below."""
    from rich.table import Table
    from rich.text import Text

    fill = "" if summary.fill is None else f", {summary.fill:.2%} full"
    lines = [
        f"pack {summary.packs:,} is next, after {summary.steps:,} steps of {summary.global_batch} packs; "
        f"streams here: {len(summary.streams)} of {summary.stream_count}",
        f"returned: {summary.returned_packs:,} packs, {summary.conversations:,} conversations, "
        f"{summary.tokens:,} tokens{fill}",
        f"read and waiting: {summary.waiting:,} conversations",
    ]
    sources = Table("source", "files", box=None, pad_edge=False)
    for heading in ("rows", "drawn", "epochs", "conversations", "tokens", "trained", "refused"):
        sources.add_column(heading, justify="right", no_wrap=True)
    for number, source in enumerate(summary.sources):
        more = ", ..." if len(source.files) > 2 else ""
        sources.add_row(
            str(number),
            Text(printable(", ".join(source.files[:2]) + more)),
            "streamed" if source.rows is None else f"{source.rows:,}",
            f"{source.drawn:,}",
            "" if source.epochs is None else f"{source.epochs:.3f}",
            *(_amount(source, name, several=len(summary.sources) > 1) for name in AMOUNTS),
            f"{sum(source.refused.values()):,}",
        )
    streams = Table("stream", box=None, pad_edge=False)
    for heading in ("packs", "windows", "conversations", "tokens", "waiting", "refused", "drawn of each source"):
        streams.add_column(heading, justify="right")
    for stream in summary.streams:
        streams.add_row(
            f"{stream.number}{', exhausted' if stream.exhausted else ''}",
            *(f"{value:,}" for value in (stream.packs, stream.windows, stream.conversations, stream.tokens)),
            *(f"{value:,}" for value in (stream.waiting, stream.refused)),
            ", ".join(f"{drawn:,}" for drawn in stream.drawn),
        )
    notes = [
        *(f"source {n}: nothing reads {', '.join(names)}" for n, names in summary.unread_columns.items()),
        *(f"refused, {reason}: {count:,}" for reason, count in summary.refused.items()),
        *(f"{note}: {count:,}" for note, count in summary.notes.items()),
        *(f"accepted at pack {change.packs:,}: {'; '.join(change.differences)}" for change in summary.accepted),
    ]
    identity = [f"{name}: {value}" for name, value in summary.identity.items()]
    text = [Text(printable("\n".join(part))) for part in (lines, notes, identity) if part]
    return [text[0], Text(), sources, Text(), streams, Text(), *text[1:]]
