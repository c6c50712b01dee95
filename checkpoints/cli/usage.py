"""Examples and exit codes of each verb, printed at the end of its help."""

from __future__ import annotations

from typing import NamedTuple


class Usage(NamedTuple):
    """The end of a verb's help."""

    examples: tuple[str, ...]
    """Command lines, each with a comment."""
    failed: str = ""
    """Meaning of exit code 1 beside errors."""

    def text(self) -> str:
        r"""Return the examples and exit codes as text; `\b` keeps its lines apart."""
        examples = "\n".join(f"  {example}" for example in self.examples)
        error = "an error; one line on stderr says what is wrong and how to go on"
        codes = {0: "success", 1: f"{self.failed}, or {error}" if self.failed else error, 2: "an unknown option"}
        return f"\b\nExamples:\n{examples}\n\n\b\nExit codes:\n" + "\n".join(
            f"  {code}  {meaning}" for code, meaning in codes.items()
        )


STEP = "runs/first/checkpoints/step-00000002"
USAGE = {
    "list": Usage(
        ("python -m checkpoints list runs/first", "python -m checkpoints list runs/first/checkpoints --json")
    ),
    "verify": Usage(
        (
            "python -m checkpoints verify runs/first                 # every byte of every step",
            f"python -m checkpoints verify {STEP} --json",
        ),
        "a step is damaged",
    ),
    "inspect": Usage(
        (
            "python -m checkpoints inspect runs/first                # the newest step",
            f"python -m checkpoints inspect {STEP} --all",
        )
    ),
    "values": Usage(
        (
            f"python -m checkpoints values {STEP} --prefix progress --json",
            "python -m checkpoints values runs/first > values.msgpack",
        )
    ),
    "prune": Usage(("python -m checkpoints prune runs/first --keep 3 --keep-every 1000 --keep-best 1",)),
    "export": Usage(
        (
            "python -m checkpoints export runs/first model-of-newest   # the newest undamaged step",
            "python -m checkpoints export runs/first model-of-best --best",
            f"python -m checkpoints export {STEP} model-of-step",
        )
    ),
    "push": Usage(
        (
            "python -m checkpoints push runs/first organisation/name --license apache-2.0",
            f"python -m checkpoints push {STEP} organisation/name --private",
        )
    ),
}
"""Name of a verb -> its usage."""
