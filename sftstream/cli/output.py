"""Print the result of a verb: as text for people, or as one JSON document for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, instead of text.")]
"""The option `--json` of a verb."""


def print_json(value: Any) -> None:
    """Print a value as one JSON document of ASCII characters, indented.

    Terminal control codes in the value arrive as escapes such as `\\u001b`, and change no terminal.
    """
    import json

    import msgspec

    typer.echo(json.dumps(msgspec.to_builtins(value, str_keys=True), indent=1))


def write_page(path: Path, content: str, *, quiet: bool) -> None:
    """Write an HTML page, and print its path unless `quiet`. Raises ValueError naming the file."""
    from sftstream.door import Door
    from sftstream.excerpt import printable

    with Door(f"the page {str(path)!r} cannot be written"):
        path.write_text(content, encoding="utf-8")
    if not quiet:
        typer.echo(printable(f"wrote {path}, {len(content) / 1e6:.1f} MB; open it in a browser"))
