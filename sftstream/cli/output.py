"""Print the result of a verb: as text for people, or as one JSON document for programs."""

from __future__ import annotations

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
