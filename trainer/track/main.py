"""The command `python -m trainer.track`. Steps are sent without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from trainer.usage import Debug, Version, application, call_and_exit, epilog

MODULE = "trainer.track"
END = epilog(
    (
        "python -m trainer.track runs/first                  # send the steps that its trackers do not have yet",
        "python -m trainer.track runs/first --json",
    ),
    {
        0: "all trackers have all steps",
        1: "an error, or a tracker that does not answer; one line on stderr says which, and how to go on",
        2: "an unknown option or argument",
    },
)


def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, under way or ended.")],
    follow: Annotated[
        int | None, typer.Option(metavar="INDEX", help="Follow a run for a single tracker.", hidden=True)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document for programs, instead of text.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001 - `main` reads the option
    version: Version = False,  # noqa: ARG001 - typer calls its callback
) -> None:
    """Send the steps of a run to its trackers, from the first step that each does not have.

    A run sends its steps itself while it trains. This command is for the steps that a tracker that
    was down has missed.
    """
    if follow is not None:
        _follow(run, follow)
    _catch_up(run, as_json=as_json)


def _follow(run: Path, index: int) -> None:
    parent = os.getppid()
    from trainer.track.follow import follow, parent_ended
    from trainer.track.send import read_about

    os.nice(10)  # the training goes first
    sent = follow(run, read_about(run).trackers[index], parent_ended(parent))
    raise typer.Exit(0 if sent else 1)


class Sent(NamedTuple):
    """The steps that a tracker got from this command."""

    tracker: str
    steps: int
    last: int
    """Newest step that the tracker has."""


def _catch_up(run: Path, *, as_json: bool) -> None:
    from trainer.track.cursor import claimed, cursor_path
    from trainer.track.open import opener
    from trainer.track.send import Sender, read_about
    from trainer.track.tracker import TrackerDown

    done: list[Sent] = []
    failures: list[str] = []
    for tracker in read_about(run).trackers:
        with claimed(cursor_path(run, tracker)) as alone:
            if not alone:
                failures.append(f"the run, or another command, is sending the steps to {tracker.kind}")
                continue
            sender = Sender(run, tracker, opener(run, tracker))
            before = sender.sent
            try:
                sender.send()
                sender.close()
            except TrackerDown as error:
                failures.append(f"{error}; step {sender.sent + 1} and later are not sent")
            else:
                done.append(Sent(tracker.kind, sender.sent - before, sender.sent))
    if as_json:
        typer.echo(json.dumps({"sent": [sent._asdict() for sent in done]}))
    else:
        for tracker_name, steps, last in done:
            typer.echo(f"{tracker_name}: {steps:,} {'step' if steps == 1 else 'steps'} sent, up to {last:,}")
    if failures:
        raise ValueError(f"{'; '.join(failures)}; repeat the command later")


app = application(track, END)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit. An error is a single line on stderr, with exit code 1."""
    call_and_exit(app, arguments, MODULE)
