"""A template's certificate as one readable table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sftstream.tokenization.encoder import ChatEncoder


def show_certificate(encoder: ChatEncoder, console: Console | None = None) -> None:
    """Prints how the assistant's turns look and what becomes of each probed shape."""
    certificate = encoder.certificate
    form = certificate.form
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "a turn begins after": repr(form.header) if form.header else "what closes the message before it",
        "it ends with": ", ".join(form.stops) + (", or the text's end" if form.open_end else ""),
        "a tool call ends with": ", ".join(form.call_stops or form.stops),
        "earlier turns": "are printed otherwise once the conversation goes on"
        if certificate.rewrites_history
        else "stay as they are",
        "today's date": f"printed, as {certificate.date}" if certificate.date else "not printed",
        "{% generation %} tags": "yes" if certificate.has_generation_tags else "no",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    table.add_section()
    for shape, verdict in certificate.shapes.items():
        table.add_row(shape, "printed whole" if verdict == "whole" else verdict)
    (console or Console(highlight=False, markup=False)).print(table)
