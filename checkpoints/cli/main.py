"""The commands of `python -m checkpoints`.

`list`, `verify`, `inspect`, `values`, `export` and `push` take no lock and change no step: safe to
use beside a running training.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from checkpoints.cli.usage import USAGE
from checkpoints.errors import CheckpointError, CorruptCheckpoint, one_line, printable

if TYPE_CHECKING:
    from checkpoints.store import CheckpointStore

app = typer.Typer(
    add_completion=Path(sys.argv[0]).name.startswith("sftstream-"),  # shells complete no `python -m`
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # Prints brackets in help texts unchanged.
    pretty_exceptions_enable=False,  # `main` prints errors.
)

Root = Annotated[
    str, typer.Argument(help="Directory of a run, such as runs/my-run, or of its steps; also the URL of steps.")
]
Step = Annotated[
    str,
    typer.Argument(
        help="Directory of a step, such as runs/my-run/checkpoints/step-00000100; of a run, for its newest step."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, instead of text.")]
"""The option `--json` of a verb."""
Merged = Annotated[
    bool, typer.Option("--merged", help="Add the adapters of the step to the weights of their base model.")
]
Base = Annotated[Path | None, typer.Option(help="Directory of the base model for --merged; default: that of the run.")]


def _print_json(value: Any) -> None:
    """Print a value as one JSON document of ASCII characters; bytes are written in base64."""
    import json

    import msgspec

    typer.echo(json.dumps(json.loads(msgspec.json.encode(value)), indent=1))


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sftstream {version('sftstream')}")
        raise typer.Exit


@app.callback(epilog="Every verb has --help with examples and exit codes. --debug shows the traceback of an error.")
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """List, verify, inspect, prune, export and publish checkpoints."""


@app.command("list", epilog=USAGE["list"].text())
def list_(root: Root, as_json: Json = False) -> None:
    """List the steps of a run."""
    from checkpoints.cli.show import listed_steps, show_steps

    store = _store(root)
    if as_json:
        _print_json(listed_steps(store))
        return
    from rich.console import Console

    show_steps(store, Console(highlight=False, markup=False))


@app.command(epilog=USAGE["verify"].text())
def verify(
    path: Annotated[str, typer.Argument(help="Directory of a run, of its steps, or of a single step.")],
    as_json: Json = False,
) -> None:
    """Read every byte of a step or of all steps. Exit code 1 if any step is damaged."""
    store, steps = _steps(path)
    damages: dict[int, str | None] = {}
    for step in steps:
        damages[step], line = _verified(store, step)
        if not as_json:
            typer.echo(line)
    if as_json:
        _print_json([{"step": step, "damage": damage} for step, damage in damages.items()])
    raise typer.Exit(any(damages.values()))


def _verified(store: CheckpointStore, step: int) -> tuple[str | None, str]:
    """Return the damage of a step, None for a whole step, and a line for people."""
    try:
        files = store.verify(step).files
    except CorruptCheckpoint as error:
        return one_line(error), f"step {step}: DAMAGED: {one_line(error)}"
    return None, f"step {step}: whole, {len(files)} files"


@app.command(epilog=USAGE["inspect"].text())
def inspect(
    step: Step,
    everything: Annotated[bool, typer.Option("--all", help="Print each setting and each entry of a value.")] = False,
    as_json: Json = False,
) -> None:
    """Print when and by whom a step was saved, how far the run was, versions and sizes. `sftstream
    inspect` prints the position in the data."""
    from checkpoints.cli.show import describe_step, show_step

    store, number = _step(step)
    if as_json:
        _print_json(describe_step(store, number))
        return
    from rich.console import Console

    show_step(store, number, Console(highlight=False, markup=False), everything=everything)


@app.command(epilog=USAGE["values"].text())
def values(
    path: Annotated[str, typer.Argument(help="Directory of a step, or of steps, of which the newest is read.")],
    prefix: Annotated[str, typer.Option(help="Beginning of the keys of the values to write.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Write JSON instead of MessagePack, bytes in base64.")
    ] = False,
) -> None:
    """Write the values of a step to stdout, for programs: root, step and values, as MessagePack."""
    import msgspec

    from checkpoints.object_store import open_root
    from checkpoints.values import read_step_values

    root, step = _root_and_step(path)
    backend = open_root(root)
    steps = [step] if step is not None else backend.steps()
    manifest = backend.manifest(steps[-1])
    spans = {key: span for key, span in manifest.values.items() if key.startswith(prefix)}
    found = read_step_values(backend.step_files(steps[-1], manifest), manifest, spans)
    content = {"root": root, "step": steps[-1], "values": found}
    if as_json:
        _print_json(content)
    else:
        sys.stdout.buffer.write(msgspec.msgpack.encode(content))


@app.command(epilog=USAGE["prune"].text())
def prune(
    root: Root,
    keep: Annotated[int, typer.Option(help="Number of newest steps that stay.", min=1)],
    keep_every: Annotated[
        int | None, typer.Option(help="Steps that are multiples of this number stay too.", min=1)
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(help="Number of steps with the lowest validation loss that stay too.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Delete old steps.

    The newest undamaged step always stays. Refused while a run saves to the directory.
    """
    from checkpoints.retention import Retention
    from checkpoints.store import CheckpointStore

    with CheckpointStore(_existing(root), Retention(keep, keep_every, keep_best)) as store:
        deleted = store.prune()
    if as_json:
        _print_json({"deleted": deleted, "kept": store.steps()})
    else:
        typer.echo(f"deleted {deleted or 'nothing'}; {store.steps()} stay")


@app.command(epilog=USAGE["export"].text())
def export(
    path: Step,
    out: Annotated[Path, typer.Argument(help="Model directory to make; must not exist.")],
    best: Annotated[bool, typer.Option("--best", help="Export the step of the lowest validation loss.")] = False,
    last: Annotated[
        bool, typer.Option("--last", help="Export the newest undamaged step, the default for a run.")
    ] = False,
    merged: Merged = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write the model of a step as a Hugging Face directory, with config and tokenizer.

    A step of adapters becomes a PEFT adapter, or with --merged a whole model.
    """
    if base is not None and not merged:
        raise CheckpointError("--base names the model under adapters; give --merged as well")
    if best and last:
        raise CheckpointError("--best and --last name different steps; give one of them")
    store, number = _chosen(_store(path), best=best) if best or last else _step(path, undamaged=True)
    store.export(number, out, merged=merged, base=base)
    if as_json:
        _print_json({"step": number, "out": str(out)})
    else:
        typer.echo(f"exported step {number} to {out}")


@app.command(epilog=USAGE["push"].text())
def push(
    step: Step,
    repository: Annotated[str, typer.Argument(help="Name on the Hugging Face hub, as organisation/name.")],
    license: Annotated[
        str, typer.Option(help="License identifier of the hub, such as apache-2.0, llama3.2 or other.")
    ] = "unknown",
    license_name: Annotated[str | None, typer.Option(help="Name of a license `other`.")] = None,
    license_link: Annotated[str | None, typer.Option(help="URL of the text of a license `other`.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that holds files.")] = False,
    merged: Merged = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Upload a step to the Hugging Face hub in one commit: the export and a model card with
    license, base model, digests of data and config, and the command of the run.

    The token is that of `hf auth login` or of the variable HF_TOKEN.
    """
    if base is not None and not merged:
        raise CheckpointError("--base names the model under adapters; give --merged as well")
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from checkpoints.model.card import License
    from checkpoints.model.hub import push as pushed

    if as_json or not sys.stderr.isatty():
        disable_progress_bars()
    store, number = _step(step, undamaged=True)
    terms = License(license, license_name, license_link)
    url = pushed(store, number, repository, terms, private=private, update=update, merged=merged, base=base)
    if as_json:
        _print_json({"step": number, "repository": repository, "commit": url})
    else:
        typer.echo(f"pushed step {number} to {repository}: {url}")


def _store(path: str) -> CheckpointStore:
    from checkpoints.store import CheckpointStore

    return CheckpointStore(_existing(path))


def _existing(path: str) -> str:
    """Return the directory of the steps in a run or directory of steps; raises CheckpointError."""
    from checkpoints.object_store import open_root

    for root in (path, f"{path.rstrip('/')}/checkpoints"):
        if open_root(root).steps():
            return root
    raise CheckpointError(f"{path} holds no steps; name a directory such as runs/my-run/checkpoints")


def _root_and_step(path: str) -> tuple[str, int | None]:
    """Return the root and the number of a step; the root and None for a run or directory of
    steps."""
    from checkpoints.local_store import step_of

    root, _, name = path.rstrip("/").rpartition("/")
    step = step_of(name)
    return (_existing(path), None) if step is None else (root or ".", step)


def _step(path: str, *, undamaged: bool = False) -> tuple[CheckpointStore, int]:
    """Return the step in `path`, for a run or directory of steps the newest.

    `undamaged` reads every byte to find the newest undamaged step.
    """
    from checkpoints.store import CheckpointStore

    root, step = _root_and_step(path)
    store = CheckpointStore(root)
    if step is None and undamaged:
        return _chosen(store, best=False)
    return store, store.steps()[-1] if step is None else step


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


def _program() -> str:
    name = Path(sys.argv[0]).name
    return name if name.startswith("sftstream-") else "python -m checkpoints"


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
        app([word for word in words if word != "--debug"], prog_name=_program())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the only place; a panic of a Rust library is no Exception
        if debug:
            traceback.print_exception(error)
        line = one_line(error)
        if not isinstance(error, CheckpointError | OSError):
            line = f"{printable(' '.join(words))}: {type(error).__name__}: {line}; --debug shows the traceback"
        sys.exit(f"error: {line}")
