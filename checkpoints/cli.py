"""The commands. Those that only look take no lock and change nothing, and so may be used beside a run that saves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from checkpoints.errors import CheckpointError, CorruptCheckpoint
from checkpoints.local_store import step_of
from checkpoints.retention import Retention
from checkpoints.show import show_step, show_steps
from checkpoints.store import CheckpointStore

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # Brackets in a help text stay as they are.
    pretty_exceptions_enable=False,  # `main` prints errors.
    help="Looks at checkpoints, takes them apart and tidies them up.",
)

Root = Annotated[str, typer.Argument(help="A directory of steps, such as runs/my-run/checkpoints, or its URL.")]
Step = Annotated[str, typer.Argument(help="A step's directory, such as runs/my-run/checkpoints/step-00000100.")]


@app.command("list")
def list_(root: Root) -> None:
    """List the steps by what their manifests say."""
    show_steps(_opened(root), Console(highlight=False, markup=False))


@app.command()
def verify(path: Annotated[str, typer.Argument(help="A directory of steps, or one step's.")]) -> None:
    """Read every byte of one step or of all; the exit code is 1 where any is damaged."""
    store, steps = _steps(path)
    verdicts = [_is_whole(store, step) for step in steps]
    raise typer.Exit(not all(verdicts))


def _is_whole(store: CheckpointStore, step: int) -> bool:
    try:
        files = store.verify(step).files
    except CorruptCheckpoint as error:
        typer.echo(f"step {step}: DAMAGED: {error}")
        return False
    typer.echo(f"step {step}: whole, {len(files)} files")
    return True


@app.command()
def inspect(step: Step) -> None:
    """Say what a step holds: tensors, sizes, and every value that is short."""
    show_step(*_one(step), Console(highlight=False, markup=False))


@app.command()
def prune(
    root: Root,
    keep: Annotated[int, typer.Option(help="Newest steps that stay.", min=1)],
    keep_every: Annotated[int | None, typer.Option(help="Multiples of it stay as well.", min=1)] = None,
    keep_best: Annotated[int | None, typer.Option(help="As many of the lowest validation loss do, too.", min=1)] = None,
) -> None:
    """Delete old steps. The newest one that is whole always stays, and nothing happens while a run has the directory."""
    with CheckpointStore(_existing(root), Retention(keep, keep_every, keep_best)) as store:
        gone = store.prune()
    typer.echo(f"deleted {gone or 'nothing'}; {store.steps()} stay")


@app.command()
def export(
    step: Step, out: Annotated[Path, typer.Argument(help="The model directory to make; it must not exist.")]
) -> None:
    """Write a step's model as a Hugging Face directory: weights, config, tokenizer, chat template."""
    store, number = _one(step)
    store.export(number, out)
    typer.echo(f"exported step {number} to {out}")


def _opened(root: str) -> CheckpointStore:
    return CheckpointStore(_existing(root))


def _existing(root: str) -> str:
    if not CheckpointStore(root).steps():
        raise CheckpointError(f"{root} holds no steps; name a directory such as runs/my-run/checkpoints")
    return root


def _one(path: str) -> tuple[CheckpointStore, int]:
    root, _, name = path.rstrip("/").rpartition("/")
    step = step_of(name)
    if step is None:
        raise CheckpointError(f"{path} is no step; name a directory such as runs/my-run/checkpoints/step-00000100")
    return CheckpointStore(root or "."), step


def _steps(path: str) -> tuple[CheckpointStore, list[int]]:
    if step_of(path.rstrip("/").rpartition("/")[2]) is None:
        store = _opened(path)
        return store, store.steps()
    store, step = _one(path)
    return store, [step]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit. An error is one line on stderr, with exit code 1."""
    try:
        app(arguments, prog_name="python -m checkpoints")
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
