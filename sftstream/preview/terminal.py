"""Print packs in a terminal: roles in colour, trained tokens marked, special tokens visible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sftstream.excerpt import printable
from sftstream.pages import figures
from sftstream.preview.view import ConversationView, PackView, Preview, RunView

COLOURS = {"system": "magenta", "user": "blue", "assistant": "green", "tool": "yellow", "template": "bright_black"}
OPEN, CLOSE = "⟦", "⟧"
"""Signs around trained tokens, which are underlined too where a terminal can."""
WIDEST_NAME = 9
"""Characters of the longest role."""


def show(preview: Preview, console: Console) -> None:
    """Print the packs and the refused rows of a preview."""
    console.print(_legend(), "")
    for pack in preview.packs:
        for part in _pack(pack):
            console.print(part)
    if preview.refused:
        console.print(_refused(preview))
    else:
        console.print("no row was refused", style="dim")


def _legend() -> Text:
    text = Text()
    for role, colour in COLOURS.items():
        text.append(f"{role} ", style=colour)
    text.append(f" {OPEN}", style="dim")
    text.append("trained", style="underline")
    text.append(CLOSE, style="dim")
    text.append("  special token ", style="dim")
    text.append("<|eot|>", style="reverse")
    return text.append("  ↵ line end", style="dim")


def _pack(pack: PackView) -> Iterator[RenderableType]:
    yield Rule(
        Text(
            f"pack {pack.number} · stream {pack.stream} · {pack.tokens:,} of {pack.capacity:,} slots filled "
            f"({figures.share(pack.fill)}) · {len(pack.conversations)} conversations · "
            f"{figures.share(pack.trained, pack.tokens)} of the tokens trained"
        ),
        style="bright_black",
    )
    for conversation in pack.conversations:
        yield Group(_heading(conversation), *map(_run, conversation.runs), Text())
    padding = pack.capacity - pack.tokens
    yield Text(f"positions {pack.tokens:,} to {pack.capacity:,}: {padding:,} slots of padding", style="dim")
    yield Text()


def _heading(conversation: ConversationView) -> Text:
    part = f", part {conversation.part}" if conversation.part else ""
    text = Text(printable(conversation.location), style="bold")
    return text.append(
        f"  source {conversation.source}, row {conversation.row}, epoch {conversation.epoch}{part}; positions "
        f"{conversation.start:,} to {conversation.start + conversation.length:,}, "
        f"{conversation.trained:,} of {conversation.length:,} tokens trained",
        style="not bold dim",
    )


def _run(run: RunView) -> RenderableType:
    colour = COLOURS.get(run.role, "default")
    line = Table.grid(padding=(0, 1))
    line.add_column(width=6, justify="right", no_wrap=True)
    line.add_column(width=WIDEST_NAME, no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(Text(str(run.position), style="dim"), Text(run.role, style=colour), _tokens(run, colour))
    return line


def _tokens(run: RunView, colour: str) -> Text:
    text, inside = Text(), False
    for token in run.tokens:
        if token.trained != inside:
            text.append(OPEN if token.trained else CLOSE, style="dim")
            inside = token.trained
        style = f"{colour}{' underline' if token.trained else ''}{' reverse' if token.special else ''}"
        text.append(printable(token.text).replace("\n", "↵\n"), style=style)
    if inside:
        text.append(CLOSE, style="dim")
    text.rstrip()
    return text


def _refused(preview: Preview) -> RenderableType:
    counts = Counter(row.reason for row in preview.refused)
    total = ", ".join(f"{reason}: {count:,}" for reason, count in counts.most_common())
    table = Table(box=None, pad_edge=False, title=Text(printable(f"refused rows: {total}")), title_justify="left")
    table.add_column("place", overflow="fold")
    table.add_column("reason", style="red", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for row in preview.refused:
        table.add_row(*(Text(printable(value)) for value in (row.location, row.reason, row.detail)))
    return table
