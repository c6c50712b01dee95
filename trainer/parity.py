"""The command that compares a model with transformers: `torchrun -m trainer.parity MODEL`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from trainer.process import command_line, exit_process, prepare_output, print_error, print_interrupt, program
from trainer.usage import Debug, Version, application, call, epilog

MODULE = "trainer.parity"

END = epilog(
    (
        "python -m trainer.parity models/Llama-3.2-1B-Instruct",
        "torchrun --nproc-per-node 2 -m trainer.parity models/Llama-3.2-1B-Instruct --tp 2",
        "python -m trainer.parity runs/first/adapter --json            # a PEFT adapter",
    ),
    {
        0: "every difference is within its limit",
        1: "a difference is above its limit, or an error; one line on stderr says how to go on",
        2: "an unknown option or argument",
        130: "interrupted by Ctrl-C",
    },
)


def parity(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or hub name, of a model or a PEFT adapter.")],
    tp: Annotated[int, typer.Option(help="Tensor-parallel size; the rest is data-parallel.")] = 1,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if torch sees one, else the CPU.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, instead of a table.")] = False,
    debug: Debug = False,
    version: Version = False,  # noqa: ARG001 - typer calls its callback
) -> None:
    """Compare a model in this trainer with transformers; exit code 0 only if both agree."""
    prepare_output(debug=debug)
    try:
        from transformers.utils.logging import disable_progress_bar

        from trainer.comparison import verdict
        from trainer.distributed.mesh import ParallelConfig, distributed, named_dtype

        disable_progress_bar()
        with distributed(device, ParallelConfig(tp=tp)) as topology:
            code = verdict(model, topology, named_dtype(dtype, topology.device), as_json=as_json)
    except KeyboardInterrupt:
        code = print_interrupt(command_line(MODULE, sys.argv[1:]))
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the only place; a panic of a Rust library is no Exception
        code = print_error(error, model)
    raise typer.Exit(code)


app = application(parity, END)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of `arguments` (default: the process's) and return the exit code."""
    return call(app, list(sys.argv[1:] if arguments is None else arguments), program(MODULE))


def run_process() -> None:
    """Run the command of the process and end the process with its exit code."""
    exit_process(main())


if __name__ == "__main__":
    run_process()
