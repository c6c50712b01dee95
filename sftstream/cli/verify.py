"""The command that kills and resumes a user's own run."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from sftstream.cli.output import Json, print_json
from sftstream.excerpt import printable


def verify_resume(
    config: Annotated[Path, typer.Argument(help="TOML file of a run.")],
    data_only: Annotated[bool, typer.Option("--data-only", help="Compare packs alone, without a model.")] = False,
    steps: Annotated[int, typer.Option(min=2, max=100_000, help="Number of steps of each run.")] = 12,
    kills: Annotated[int, typer.Option(min=1, max=10_000, help="Number of kills.")] = 4,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the moments and topologies. Default: random, and printed.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Call the function that evaluation.scorer names.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove on your own data and machine that a killed run resumes exactly. The exit code is 1 if
    a difference is found."""
    import msgspec

    from sftstream.ledger.verify import verify_data, verify_training
    from sftstream.toml_file import read_data_config

    chosen = random.SystemRandom().randrange(10**9) if seed is None else seed

    def say(line: str) -> None:
        typer.echo(printable(line), err=as_json)

    say(f"seed {chosen}")

    with TemporaryDirectory() as directory:
        place = Path(directory)
        data = read_data_config(config, [])
        verdict = (
            verify_data(data, place, steps, kills, chosen, say)
            if data_only
            else verify_training(config, place, steps, kills, chosen, say, ["--allow-code"] if allow_code else [])
        )
    if as_json:
        print_json({"seed": chosen, "exact": not verdict.differences, **msgspec.structs.asdict(verdict)})
        raise typer.Exit(bool(verdict.differences))
    for title, lines in (
        ("shown", verdict.shown),
        ("not shown", verdict.not_shown),
        ("difference", verdict.differences),
    ):
        for line in lines:
            say(f"{title}: {line}")
    say("verdict: the resumes are not exact" if verdict.differences else "verdict: the resumes are exact")
    raise typer.Exit(bool(verdict.differences))
