"""Examples and exit codes of each verb, printed at the end of its help."""

from __future__ import annotations

from typing import NamedTuple

FAILED = "an error; one line on stderr says what is wrong and how to go on"
MISUSED = "an unknown option or argument"


class Usage(NamedTuple):
    """The end of a verb's help."""

    short: str
    """The verb's line in the list of verbs."""
    examples: tuple[str, ...]
    """Command lines, each with a comment."""
    codes: tuple[tuple[int, str], ...]
    """Exit codes of the verb that differ from the codes 0, 1 and 2 of every verb."""

    def text(self) -> str:
        r"""Return the examples and exit codes as text; `\b` keeps its lines apart."""
        codes = {0: "success", 1: FAILED, 2: MISUSED, **dict(self.codes)}
        examples = "\n".join(f"  {example}" for example in self.examples)
        return f"\b\nExamples:\n{examples}\n\n\b\nExit codes:\n" + "\n".join(
            f"  {code}  {meaning}" for code, meaning in codes.items()
        )


USAGE = {
    "init": Usage(
        "Write a config for conversations of your own.",
        (
            "sftstream init chats.jsonl --model model --out own.toml   # a model directory or a hub name",
            "sftstream init chats.jsonl --model model --out own.toml --gpus 8",
            "sftstream init chats.jsonl --model model --out own.toml --template chat.jinja   # for a base model",
            "sftstream init --from axolotl.yaml --out moved.toml --gpus 8",
        ),
        (),
    ),
    "preview": Usage(
        "Show packs as the model will see them.",
        (
            "sftstream preview run.toml                          # the first pack",
            "sftstream preview run.toml --pack 3 --html packs.html",
            "sftstream preview run.toml --state runs/first       # the packs that a resume trains next",
        ),
        (),
    ),
    "stats": Usage(
        "Measure the data: lengths, fill, mixture, refusals.",
        (
            "sftstream stats run.toml                            # every row of the data",
            "sftstream stats run.toml --sample 1000 --html stats.html",
        ),
        (),
    ),
    "template": Usage(
        "Report on a chat template.",
        (
            "sftstream template model                            # the tokenizer's own template",
            "sftstream template model chat.jinja --date 2025-01-31",
        ),
        (),
    ),
    "inspect": Usage(
        "Show how far a run or checkpoint has come.",
        (
            "sftstream inspect runs/first                        # the newest checkpoint of a run",
            "sftstream inspect runs/first/checkpoints/step-00000002 --json",
            "sftstream inspect state.json",
        ),
        (),
    ),
    "diff": Usage(
        "Compare two states, checkpoints or runs.",
        (
            "sftstream diff state.json runs/first                # each differing field",
            "sftstream diff runs/first/checkpoints/step-00000002 runs/first --json",
        ),
        ((0, "the states are equal"), (1, f"the states differ, or {FAILED}")),
    ),
    "rebase": Usage(
        "Carry a state over to new settings.",
        (
            "sftstream rebase state.json run.toml new.json --accept data.capacity",
            "sftstream rebase runs/first run.toml new.json --accept data.capacity",
        ),
        (),
    ),
    "bench": Usage(
        "Measure the speed of the pipeline.",
        ("sftstream bench run.toml --seconds 0.2",),
        (),
    ),
    "audit": Usage(
        "Prove what a run has trained.",
        (
            "sftstream audit runs/first                          # prove what was trained",
            "sftstream audit runs/first runs/first               # the first step in which two runs differ",
        ),
        ((0, "no difference"), (1, f"a difference, or {FAILED}")),
    ),
    "trace": Usage(
        "Show the conversations of a step.",
        ("sftstream trace runs/first --step 2 --pack 0",),
        (),
    ),
    "find": Usage(
        "List the steps that trained a row.",
        ("sftstream find runs/first --source 0 --row 4",),
        ((0, "the row was trained or refused"), (1, f"the row is in no step, or {FAILED}")),
    ),
    "verify-resume": Usage(
        "Kill and resume your config, compare.",
        ("sftstream verify-resume run.toml --data-only --steps 3 --kills 1",),
        ((0, "the resumes are exact"), (1, f"a resume is not exact, or {FAILED}")),
    ),
}
"""Name of a verb -> its usage. The examples run as they are in a directory that holds their
files."""
