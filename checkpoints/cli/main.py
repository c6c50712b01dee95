"""The commands of `python -m checkpoints`.

`list`, `verify`, `inspect` and `values` take no lock and change nothing: safe to use beside a
running training.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoints.errors import CheckpointError, CorruptCheckpoint, one_line, printable

if TYPE_CHECKING:
    from checkpoints.store import CheckpointStore

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # Prints brackets in help texts unchanged.
    pretty_exceptions_enable=False,  # `main` prints errors.
    help="List, verify, inspect, prune and export checkpoints.",
)

Root = Annotated[str, typer.Argument(help="Directory of steps, such as runs/my-run/checkpoints, or its URL.")]
Step = Annotated[str, typer.Argument(help="Directory of a step, such as runs/my-run/checkpoints/step-00000100.")]


@app.command("list")
def list_(root: Root) -> None:
    """List the steps of a directory."""
    from rich.console import Console

    from checkpoints.cli.show import show_steps

    show_steps(_store(root), Console(highlight=False, markup=False))


@app.command()
def verify(path: Annotated[str, typer.Argument(help="Directory of steps, or of a single step.")]) -> None:
    """Read every byte of a step or of all steps. Exit code 1 if any step is damaged."""
    store, steps = _steps(path)
    undamaged = [_is_undamaged(store, step) for step in steps]
    raise typer.Exit(not all(undamaged))


def _is_undamaged(store: CheckpointStore, step: int) -> bool:
    try:
        files = store.verify(step).files
    except CorruptCheckpoint as error:
        typer.echo(f"step {step}: DAMAGED: {one_line(error)}")
        return False
    typer.echo(f"step {step}: whole, {len(files)} files")
    return True


@app.command()
def inspect(
    step: Step,
    everything: Annotated[bool, typer.Option("--all", help="Print each setting and each entry of a value.")] = False,
) -> None:
    """Print when and by whom a step was saved, how far the run was, versions and sizes. `sftstream
    inspect` prints the position in the data."""
    from rich.console import Console

    from checkpoints.cli.show import show_step

    show_step(*_step(step), Console(highlight=False, markup=False), everything=everything)


@app.command()
def values(
    path: Annotated[str, typer.Argument(help="Directory of a step, or of steps, of which the newest is read.")],
    prefix: Annotated[str, typer.Option(help="Beginning of the keys of the values to write.")] = "",
) -> None:
    """Write the values of a step to stdout, for programs: root, step and values, as MessagePack."""
    import msgspec

    from checkpoints.object_store import open_root
    from checkpoints.values import read_step_values

    root, step = _root_and_step(path)
    backend = open_root(root)
    steps = [step] if step is not None else backend.steps()
    if not steps:
        raise CheckpointError(f"{root} holds no steps; name a directory such as runs/my-run/checkpoints")
    manifest = backend.manifest(steps[-1])
    spans = {key: span for key, span in manifest.values.items() if key.startswith(prefix)}
    found = read_step_values(backend.step_files(steps[-1], manifest), manifest, spans)
    sys.stdout.buffer.write(msgspec.msgpack.encode({"root": root, "step": steps[-1], "values": found}))


@app.command()
def prune(
    root: Root,
    keep: Annotated[int, typer.Option(help="Number of newest steps that stay.", min=1)],
    keep_every: Annotated[
        int | None, typer.Option(help="Steps that are multiples of this number stay too.", min=1)
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(help="Number of steps with the lowest validation loss that stay too.", min=1)
    ] = None,
) -> None:
    """Delete old steps.

    The newest undamaged step always stays. Refused while a run saves to the directory.
    """
    from checkpoints.retention import Retention
    from checkpoints.store import CheckpointStore

    with CheckpointStore(_existing(root), Retention(keep, keep_every, keep_best)) as store:
        deleted = store.prune()
    typer.echo(f"deleted {deleted or 'nothing'}; {store.steps()} stay")


@app.command()
def export(
    path: Annotated[str, typer.Argument(help="Directory of a step, or of steps with --best or --last.")],
    out: Annotated[Path, typer.Argument(help="Model directory to make; must not exist.")],
    best: Annotated[bool, typer.Option("--best", help="Export the step of the lowest validation loss.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Export the newest undamaged step.")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Add the adapters of the step to the weights of their base model.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model for --merged; default: that of the run.")
    ] = None,
) -> None:
    """Write the model of a step as a Hugging Face directory, with config and tokenizer.

    A step of adapters becomes a PEFT adapter, or with --merged a whole model.
    """
    if base is not None and not merged:
        raise CheckpointError("--base names the model under adapters; give --merged as well")
    if best and last:
        raise CheckpointError("--best and --last name different steps; give one of them")
    store, number = _chosen(_store(path), best=best) if best or last else _step(path)
    store.export(number, out, merged=merged, base=base)
    typer.echo(f"exported step {number} to {out}")


def _store(root: str) -> CheckpointStore:
    from checkpoints.store import CheckpointStore

    return CheckpointStore(_existing(root))


def _existing(root: str) -> str:
    from checkpoints.object_store import open_root

    if not open_root(root).steps():
        raise CheckpointError(f"{root} holds no steps; name a directory such as runs/my-run/checkpoints")
    return root


def _root_and_step(path: str) -> tuple[str, int | None]:
    """Return the root and the number of a step; the root and None for a directory of steps."""
    from checkpoints.local_store import step_of

    root, _, name = path.rstrip("/").rpartition("/")
    step = step_of(name)
    return (path, None) if step is None else (root or ".", step)


def _step(path: str) -> tuple[CheckpointStore, int]:
    from checkpoints.store import CheckpointStore

    root, step = _root_and_step(path)
    if step is None:
        raise CheckpointError(f"{path} is not a step; name a directory such as runs/my-run/checkpoints/step-00000100")
    return CheckpointStore(root), step


def _chosen(store: CheckpointStore, *, best: bool) -> tuple[CheckpointStore, int]:
    step = store.best() if best else store.latest()
    if step is None:
        raise CheckpointError(
            f"no undamaged step in {store.root} has a validation loss; export a step by its directory, or use --last"
        )
    return store, step


def _steps(path: str) -> tuple[CheckpointStore, list[int]]:
    if _root_and_step(path)[1] is None:
        store = _store(path)
        return store, store.steps()
    store, step = _step(path)
    return store, [step]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit. An error is a single line on stderr, with exit code 1.

    `--debug` or LOGLEVEL=DEBUG shows the traceback as well.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("LOGLEVEL") == "DEBUG"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        app([word for word in words if word != "--debug"], prog_name="python -m checkpoints")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the only place; a panic of a Rust library is no Exception
        if debug:
            traceback.print_exception(error)
        line = one_line(error)
        if not isinstance(error, CheckpointError | OSError):
            line = f"{printable(' '.join(words))}: {type(error).__name__}: {line}; --debug shows the traceback"
        sys.exit(f"error: {line}")
