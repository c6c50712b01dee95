"""The report on a chat template as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sftstream.excerpt import printable
from sftstream.tokenization.encoder import ChatEncoder


def rows_of(encoder: ChatEncoder) -> dict[str, str]:
    """Return the format of the assistant's turns and the template's variables, by heading."""
    report = encoder.report
    turn_format = report.turn_format
    return {
        "a turn begins after": repr(turn_format.prompt) if turn_format.prompt else "the end of the message before",
        "a turn ends with": ", ".join(turn_format.stops) + (", or the text's end" if turn_format.open_end else ""),
        "a tool call ends with": ", ".join(turn_format.call_stops or turn_format.stops),
        "earlier turns": "printed differently once the conversation goes on"
        if report.rewrites_history
        else "printed unchanged",
        "tool definitions": "printed" if report.prints_tools else "not printed",
        "today's date": f"printed, as {report.date}" if report.date else "not printed",
        "variables": ", ".join(f"{name} = {value!r}" for name, value in encoder.template.variables.items()) or "none",
        "variables not set": ", ".join(encoder.template.unset_variables) or "none",
        "{% generation %} tags": "yes" if report.has_generation_tags else "no",
    }


def show_report(encoder: ChatEncoder, console: Console | None = None) -> None:
    """Print the format of the assistant's turns, and the verdict on each probed shape."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows_of(encoder).items():
        table.add_row(name, printable(value))
    table.add_section()
    for shape, verdict in encoder.report.shapes.items():
        table.add_row(shape, printable(f"printed {verdict}" if verdict.startswith("whole") else verdict))
    (console or Console(highlight=False, markup=False)).print(table)
