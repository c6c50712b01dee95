"""Show on a terminal how far a measurement is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sftstream.stats.measure import Advance


@contextmanager
def progress(rows: Sequence[int | None], console: Console) -> Iterator[Advance]:
    """Show a bar for each source on a terminal, nothing elsewhere.

    `rows` is the number of rows to measure of each source, None if unknown. The bars disappear at
    the end.
    """
    columns = (TextColumn("source {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = [bars.add_task(str(number), total=count) for number, count in enumerate(rows)]
        yield lambda source, count: bars.advance(tasks[source], count)
