"""The command that measures the speed of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftstream.cli.output import Json, print_json


def bench(
    config: Annotated[Path, typer.Argument(help="TOML file of a run, of which the [data] table is read.")],
    seconds: Annotated[float, typer.Option(min=0.001, max=3600, help="Duration of each measurement in seconds.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Measure how fast the packs of a run come on this machine, as a whole and stage by stage."""
    from rich.console import Console

    from sftstream.cli.speed import measure, show
    from sftstream.toml_file import read_data_config

    speeds, stages = measure(read_data_config(config, []), seconds)
    if as_json:
        print_json({"loaders": [speed._asdict() for speed in speeds], "stages": stages._asdict()})
    else:
        show(speeds, stages, Console(highlight=False, markup=False))
