"""The command that measures the data of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftstream.cli.output import Json, show_result


def stats(
    config: Annotated[Path, typer.Argument(help="TOML file of a run, of which the [data] table is read.")],
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Rows to measure of each source. Default: every row.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that read the data. Default: one for each CPU.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="File to write a self-contained HTML page to.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the data of a run: lengths, trained share, turns, fill at several capacities,
    mixture, refusals by reason, duplicates, overlap with held-out data, steps to expect."""
    import os
    import time

    from rich.console import Console

    from sftstream.cli.state import read_held_out
    from sftstream.stats.measure import Meter
    from sftstream.stats.page import page
    from sftstream.stats.progress import progress
    from sftstream.stats.summary import summarize
    from sftstream.stats.terminal import show
    from sftstream.toml_file import read_data_config

    began = time.perf_counter()
    data, held_out = read_data_config(config, []), read_held_out(config)
    meter = Meter(data, (*data.sources, *held_out))
    with progress(meter.rows_to_read(sample), Console(stderr=True)) as advance:
        measured = meter.measure(sample, workers or len(os.sched_getaffinity(0)), advance)
    count = len(data.sources)
    found = summarize(data, meter.corpus, measured[:count], measured[count:], time.perf_counter() - began)
    text = None if html else lambda: show(found, Console(highlight=False, markup=False))
    show_result(found, lambda: page(found, f"Data of {config}"), html, text, as_json=as_json)
