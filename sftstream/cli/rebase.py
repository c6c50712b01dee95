"""The command that carries a state over to new settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftstream.cli.inspect import StatePath, require_place
from sftstream.cli.output import Json, print_json
from sftstream.door import Door
from sftstream.excerpt import printable


def rebase(
    state: StatePath,
    config: Annotated[Path, typer.Argument(help="TOML file of the run with the new settings in [data].")],
    out: Annotated[
        Path, typer.Argument(help="JSON file to write the new state dict to. An existing file is replaced.")
    ],
    accept: Annotated[
        list[str],
        typer.Option(
            help="Setting that may differ from the state's, such as data.capacity, beside those in data.accept_changed. "
            "Repeat it for several."
        ),
    ] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Carry a state over to new settings. No row is lost or repeated, and the new state records
    each accepted change."""
    import msgspec

    from sftstream.cli.state import accepting, rebased
    from sftstream.inspection.stored import read_state
    from sftstream.inspection.summary import summarize
    from sftstream.inspection.text import describe
    from sftstream.toml_file import read_data_config

    saved = read_state(require_place(state))
    new = rebased(saved, accepting(read_data_config(config), accept))
    with Door(f"{out} cannot be written"):
        out.write_bytes(msgspec.json.encode(new.state_dict()))
    if as_json:
        print_json(summarize(new))
    else:
        typer.echo(printable(describe(new)))
