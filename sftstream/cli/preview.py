"""The command that shows packs as the model will see them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftstream.cli.output import Json, show_result

MOST_PACKS, MOST_SHOWN = 1_000_000, 10_000
"""Limits of --pack and --count: each pack before the first is made as well."""


def preview(
    config: Annotated[Path, typer.Argument(help="TOML file of a run, of which the [data] table is read.")],
    pack: Annotated[int, typer.Option(min=0, max=MOST_PACKS, help="Number of the first pack, counted from 0.")] = 0,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_SHOWN, help="Number of packs. Default: 1, and 4 for a page.", show_default=False),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="State, checkpoint or run to continue from; packs then count from its next pack.", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="File to write a self-contained HTML page to.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show packs as the model will see them: roles in colour, trained tokens, special tokens,
    borders of conversations, positions, and refused rows."""
    import msgspec
    from rich.console import Console

    from sftstream.cli.inspect import require_place
    from sftstream.inspection.stored import read_state
    from sftstream.loader import PackLoader
    from sftstream.preview.page import page
    from sftstream.preview.terminal import show
    from sftstream.preview.view import preview as previewed
    from sftstream.toml_file import read_data_config

    # Every refused row is shown, whatever share of the rows it is. As in a resume, the table's
    # accept_changed holds.
    data = msgspec.structs.replace(read_data_config(config), max_refused=1.0, max_too_long=1.0)
    saved = None if state is None else read_state(require_place(state))
    loader = PackLoader(data, workers=0, state=saved)
    found = previewed(loader, pack, count or (1 if html is None else 4))
    text = None if html else lambda: show(found, Console(highlight=False, markup=False))
    show_result(found, lambda: page(found, f"Packs of {config}"), html, text, as_json=as_json)
