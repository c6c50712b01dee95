"""Train a Llama on conversations.

Command: torchrun -m trainer.main [run.toml] [section.key=value ...] [--plan[=GPUS]] [--debug]

run.toml           the config; without a config, examples/demo.toml
section.key=value  a value that replaces the config's, for example optimizer.learning_rate=1e-5
--debug            show the traceback behind an error as well
--plan[=GPUS]      print the memory, steps and hours of the run on GPUS GPUs (default: the processes
                   that torchrun started), then exit without training
--json             with --plan: print one JSON document

Repeat the command of a killed or stopped run to continue from its last checkpoint. The exit code
is 0 after the last step, 75 after a stop on request, 1 after an error.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.config import load_config
from trainer.distributed.mesh import exit_process, prepare_output, print_error
from trainer.estimate import print_estimate
from trainer.run import run

STOPPED = os.EX_TEMPFAIL
"""Exit code 75 of a run that was asked to stop before its end."""

DEMO = Path(__file__).parents[1] / "examples" / "demo.toml"


class CommandLine(NamedTuple):
    """The parts of the command line."""

    config: Path
    overrides: list[str]
    plan: str | None
    """The last `--plan` or `--plan=GPUS`, as written."""
    json: bool
    """True to print the plan as JSON."""
    debug: bool
    """True to show the traceback of an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of `arguments` (default: the process's) and return the exit code.

    A user's error is printed in one line, and the exit code is 1. The exit code of a run that was
    asked to stop is 75.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)  # noqa: T201
        return 0
    command = _parse(words)
    prepare_output(debug=command.debug)
    try:
        config = load_config(command.config, command.overrides)
        if command.plan is None:
            return 0 if run(config) else STOPPED
        print_estimate(config, _gpus(command.plan), as_json=command.json)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - the only place; a panic of a Rust library is no Exception
        return print_error(error, str(command.config))
    return 0


def _parse(words: Sequence[str]) -> CommandLine:
    plans = [word for word in words if word.partition("=")[0] == "--plan"]
    rest = [word for word in words if word not in plans and word not in ("--debug", "--json")]
    config = Path(rest.pop(0)) if rest and "=" not in rest[0] else DEMO
    return CommandLine(config, rest, plans[-1] if plans else None, "--json" in words, "--debug" in words)


def _gpus(plan: str) -> int:
    gpus = plan.partition("=")[2] or os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch(r"[0-9]{1,5}", gpus) or not int(gpus):
        raise ValueError(f"{plan}: give a number of GPUs from 1 to 99999, as in --plan=32")
    return int(gpus)


if __name__ == "__main__":
    exit_process(main())
