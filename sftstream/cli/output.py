"""Options of verbs, and the output of results."""

from __future__ import annotations

from typing import Annotated

import typer

from sftstream.cli.results import print_json as print_json
from sftstream.cli.results import show_result as show_result

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, instead of text.")]
"""The option `--json` of a verb."""
