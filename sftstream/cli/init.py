"""The command that writes a first config for conversations of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sftstream.cli.output import Json, print_json
from sftstream.excerpt import printable

if TYPE_CHECKING:
    from sftstream.config import NamedRole
    from sftstream.starter.axolotl import Translated
    from sftstream.starter.hardware import Hardware, Plan
    from sftstream.starter.look import Look
    from sftstream.starter.propose import Proposal
    from sftstream.starter.write import Started

SHOWN = 5
"""Refused rows that are printed."""
LONGEST = 160
"""Characters of a refused row's detail that are printed: two thirds for its end, the remedy."""
OPTIONS = "settings that a remedy names are options of init: --columns NAME=COLUMN, --ignore NAME, --roles NAME=ROLE"


def init(
    data: Annotated[
        str | None,
        typer.Argument(help="File, glob, directory or hub dataset of conversations.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub name of the model to train. Default: an open model that fits.", show_default=False
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Jinja file of a chat template, or name:NAME for one of several in the tokenizer. Default: the "
            "tokenizer's own; a base model often has none.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Config to write.")] = Path("run.toml"),
    gpus: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=4096,
            help="Number of GPUs, each of 80 GB. Default: the GPUs of this machine.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        list[str],
        typer.Option(help="NAME=COLUMN, to read a column under a known name such as prompt. Repeat it for several."),
    ] = [],  # noqa: B006
    ignore: Annotated[
        list[str],
        typer.Option(
            help="Column to leave out, or key of messages such as messages[].thoughts. Repeat it for several."
        ),
    ] = [],  # noqa: B006
    roles: Annotated[
        list[str],
        typer.Option(
            help="NAME=ROLE, to read a role as system, user, assistant, tool, or tool_call if its content is a call. Repeat "
            "it for several."
        ),
    ] = [],  # noqa: B006
    axolotl: Annotated[
        Path | None,
        typer.Option("--from", help="Config of axolotl to translate, instead of DATA.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing config.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented config for data, after a look at a sample: layouts, lengths, turns and
    refused rows; capacity, batch, model and parallelism for the GPUs that are there."""
    from sftstream.config import SourceConfig
    from sftstream.starter.write import move_in, start

    if out.exists() and not force:
        raise ValueError(f"{out} exists; give another --out, or replace it with --force")
    if axolotl is not None:
        if data is not None or model is not None or template is not None or columns or ignore or roles:
            raise ValueError(
                "--from has data, model, template and settings of rows of its own; leave DATA, --model, --template, "
                "--columns, --ignore and --roles out"
            )
        _tell(move_in(axolotl, out, gpus), out, as_json=as_json)
        return
    if data is None:
        raise ValueError("no data is given; name a file of conversations, or give a config of axolotl with --from")
    source = SourceConfig(path=data, columns=_columns(columns), ignore=tuple(ignore), roles=_roles(roles))
    _show(start(source, model, out, gpus, template), out, as_json=as_json)


def _show(started: Started, out: Path, *, as_json: bool) -> None:
    import msgspec

    found, proposal, hardware, planned = started
    if as_json:
        plan = planned if planned is None else msgspec.structs.asdict(planned)
        print_json({"wrote": str(out), "data": found, "proposal": proposal, "hardware": hardware, "plan": plan})
        return
    for line in _lines(found, proposal, hardware, planned):
        typer.echo(printable(line))
    _say_next(out)
    ranks = f"--nproc-per-node {hardware.gpus} " if hardware.gpus > 1 else ""
    typer.echo(printable(f"  torchrun {ranks}-m trainer.main {shlex.quote(str(out))}"))


def _tell(found: Translated, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"wrote": str(out), "tables": found.tables, "told": found.told})
        return
    for setting in found.told:
        typer.echo(printable(f"without a counterpart: {setting}"))
    _say_next(out)


def _say_next(out: Path) -> None:
    quoted = shlex.quote(str(out))
    typer.echo(printable(f"\nwrote {out}; next:\n  sftstream preview {quoted}\n  sftstream stats {quoted}"))


def _columns(pairs: list[str]) -> dict[str, str] | None:
    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (name, _, column) in zip(pairs, split, strict=True) if not name or not column]:
        raise ValueError(f"--columns {wrong[0]!r} is not NAME=COLUMN; write --columns prompt=question")
    return {name: column for name, _, column in split} or None


def _roles(pairs: list[str]) -> dict[str, NamedRole] | None:
    from sftstream.config import ROLE_NAMES

    roles: dict[str, NamedRole] = {}
    for pair in pairs:
        name, _, given = pair.rpartition("=")
        if not name or given not in ROLE_NAMES:
            raise ValueError(
                f"--roles {pair!r} is not NAME=ROLE with a role of {', '.join(ROLE_NAMES)}; write --roles narrator=user"
            )
        roles[name] = ROLE_NAMES[given]
    return roles or None


def _lines(found: Look, proposal: Proposal, hardware: Hardware, planned: Plan | None) -> list[str]:
    files = f"{found.files} file{'s' * (found.files > 1)}"
    lines = [
        f"data      {found.path}: {found.rows:,} rows in {files}, {found.sampled} sampled",
        f"layout    {', '.join(f'{name} ({count})' for name, count in found.layouts.items())}",
    ]
    if found.messages:
        middle = found.messages[len(found.messages) // 2]
        roles = ", ".join(f"{role} in {count / len(found.messages):.0%}" for role, count in found.roles.items())
        lines.append(f"messages  {found.messages[0]} to {found.messages[-1]}, median {middle}; {roles}")
    if not found.verified:
        lines.append("          plain text or token ids: trained as they are, with verified = false")
    share = found.trained / max(sum(found.lengths), 1)
    lines += [
        f"lengths   {_bars(found.lengths)}  {found.lengths[0]:,} to {found.lengths[-1]:,} tokens, median "
        f"{found.length(0.5):,}, 99 % below {found.length(0.99):,}; {share:.0%} trained",
        f"total     about {found.tokens:,} tokens",
        f"refused   {len(found.refused)} of {found.sampled} sampled rows",
        *(f"          {row.place}: {row.reason}: {_shortened(row.detail)}" for row in found.refused[:SHOWN]),
        *([f"          {OPTIONS}"] if found.refused else []),
        f"machine   {hardware.name}",
        f"model     {proposal.model}" + (f", {planned.parameters:,} parameters" if planned else ""),
        f"proposal  packs of {proposal.capacity:,} tokens, {proposal.global_batch} in a step, {proposal.epochs} epochs"
        + (f", tensor parallel {proposal.tp}" if proposal.tp > 1 else ""),
    ]
    if planned:
        steps = "" if planned.steps is None else f", {planned.steps:,} steps"
        lines.append(
            f"plan      {planned.memory / 2**30:.0f} of {hardware.memory / 2**30:.0f} GiB on each GPU, "
            f"{planned.weights_dtype} weights, recompute {planned.recompute}; {planned.seconds_per_step:.1f} s a step{steps}"
        )
    return lines


def _shortened(detail: str) -> str:
    return detail if len(detail) <= LONGEST else f"{detail[: LONGEST // 3]} ... {detail[-2 * LONGEST // 3 :]}"


def _bars(lengths: tuple[int, ...], width: int = 24) -> str:
    """Return a histogram of sorted lengths in one line, from the shortest to the longest."""
    low, high = lengths[0], lengths[-1]
    counts = [0] * width
    for length in lengths:
        counts[min(width - 1, (length - low) * width // max(high - low, 1))] += 1
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // max(counts))] for count in counts)
