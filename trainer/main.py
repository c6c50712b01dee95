"""Train a Llama on conversations: `torchrun -m trainer.main [run.toml] [section.key=value ...]`."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trainer.process import command_line, exit_process, prepare_output, print_error, print_interrupt, program
from trainer.training.scorer import ALLOW_CODE
from trainer.usage import Debug, Version, application, call, epilog

STOPPED = os.EX_TEMPFAIL
"""Exit code 75 of a run that was asked to stop before its end."""

DEMO = Path(__file__).parents[1] / "examples" / "demo.toml"
MODULE = "trainer.main"

END = epilog(
    (
        "torchrun -m trainer.main run.toml                             # one GPU, or the CPU",
        "torchrun --nproc-per-node 8 -m trainer.main run.toml parallel.tp=2",
        "torchrun -m trainer.main run.toml optimizer.learning_rate=1e-5 run.name=low",
        "python -m trainer.main run.toml --plan=32 --json              # memory and time on 32 GPUs, no training",
        "python -m trainer.main                                        # examples/demo.toml",
    ),
    {
        0: "the run is complete, and the model exported",
        1: "an error; one line on stderr says what is wrong and how to go on",
        2: "an unknown option",
        75: "the run was asked to stop, and saved a checkpoint; the same command goes on",
        130: "interrupted by Ctrl-C outside of the training; the same command goes on",
    },
)


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN.toml SECTION.KEY=VALUE",
            help="Config of the run, and values that replace those of the config. Default: examples/demo.toml.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="[=GPUS]",
            help="Print memory, steps and hours on GPUS GPUs, and do not train. Default: torchrun's processes.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each step and message, or for the plan.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option(ALLOW_CODE, help="Call the function that evaluation.scorer names.")
    ] = False,
    debug: Debug = False,
    version: Version = False,  # noqa: ARG001 - typer calls its callback
) -> None:
    """Train a Llama on conversations, or plan the training.

    Repeat the command of a killed or stopped run to continue from its last checkpoint.
    """
    rest = list(words or ())
    path = Path(rest.pop(0)) if rest and "=" not in rest[0] else DEMO
    prepare_output(debug=debug)
    line = command_line(MODULE, [*(words or ()), *([ALLOW_CODE] if allow_code else [])])
    # The imports make half a million lasting objects, which the collector would scan many times: a
    # second. A run enables the collector before its first step.
    gc.disable()
    try:
        from trainer.config_file import load_config

        config = load_config(path, rest)
        if plan is None:
            from trainer.run import run

            gc.freeze()  # these objects are never scanned
            raise typer.Exit(0 if run(config, line, as_json=as_json, allow_code=allow_code) else STOPPED)
        from trainer.estimate import print_estimate

        print_estimate(config, _gpus(plan), as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(print_interrupt(line)) from None
    except (typer.Exit, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the only place; a panic of a Rust library is no Exception
        raise typer.Exit(print_error(error, str(path))) from None
    finally:
        gc.enable()


def _gpus(plan: str) -> int:
    gpus = plan or os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"[0-9]{1,5}", gpus) or not int(gpus):
        raise ValueError(f"--plan={plan}: give a number of GPUs from 1 to 99999, as in --plan=32")
    return int(gpus)


app = application(train, END)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of `arguments` (default: the process's) and return the exit code.

    A user's error is printed in one line, and the exit code is 1. The exit code of a run that was
    asked to stop is 75.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # typer knows no option whose value may be left out
    return call(app, ["--plan=" if word == "--plan" else word for word in words], program(MODULE))


def run_process() -> None:
    """Run the command of the process and end the process with its exit code."""
    exit_process(main())


if __name__ == "__main__":
    run_process()
