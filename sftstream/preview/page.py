"""Make the HTML page of a preview."""

from __future__ import annotations

from collections.abc import Iterator

from sftstream.pages import Page, document, figures, header, tag, text
from sftstream.preview.view import ROLES, ConversationView, PackView, Preview, RunView, TokenView

KEYS = (
    ("/", "search"),
    ("j", "next conversation"),
    ("k", "conversation before"),
    ("t", "light or dark"),
    ("?", "this list"),
)
"""Keys of the page, and their effects."""


def page(preview: Preview, title: str) -> str:
    """Return the page of a preview as one self-contained HTML document."""
    tokens, slots = sum(p.tokens for p in preview.packs), sum(p.capacity for p in preview.packs)
    facts = {
        "packs": figures.count(len(preview.packs)),
        "conversations": figures.count(sum(len(p.conversations) for p in preview.packs)),
        "tokens": figures.count(tokens),
        "slots filled": figures.share(tokens, slots),
        "tokens trained": figures.share(sum(p.trained for p in preview.packs), tokens),
        "logical streams": figures.count(preview.streams),
        "rows refused": figures.count(len(preview.refused)),
    }
    made_by = text("Packs as the model will see them. Tokenizer ") + tag("code", text(preview.tokenizer))
    body = [
        header(title, made_by, facts, theme=False),
        _bar(preview),
        tag("main", [*map(_pack, preview.packs), _refused(preview)]),
        tag("footer", text("Made by sftstream preview. The page loads nothing from anywhere; text of the data is never run.")),
        '<div id="tip" hidden></div>',
        tag(
            "dialog",
            [tag("h3", text("Keys")), *(tag("p", text(effect) + tag("kbd", text(key))) for key, effect in KEYS)],
            id="keys",
        ),
    ]  # fmt: skip
    return document(Page(title, "".join(body), ("preview.js",)))


def _bar(preview: Preview) -> str:
    present = {run.role for pack in preview.packs for c in pack.conversations for run in c.runs}
    roles = [
        tag("button", text(role), type="button", class_=f"chip r-{role}", data_role=role, aria_pressed="true")
        for role in ROLES
        if role in present
    ]
    sources = [
        tag("option", text("all sources"), value=""),
        *(tag("option", text(f"{n}: {path}"), value=n) for n, path in enumerate(preview.sources)),
    ]
    reasons = [
        tag("option", text("all reasons"), value=""),
        *(tag("option", text(reason), value=reason) for reason in sorted({row.reason for row in preview.refused})),
    ]
    controls = [
        '<input id="search" type="search" placeholder="Search  ( / )" aria-label="Search" autocomplete="off">',
        tag("select", sources, id="source", aria_label="Source"),
        tag("select", reasons, id="reason", aria_label="Reason of refusals"),
        *roles,
        '<span class="end"><span class="count" id="count" role="status"></span>'
        '<button type="button" id="help" aria-label="Keys">?</button>'
        '<button type="button" id="theme" aria-label="Light or dark">&#9680;</button></span>',
    ]
    return tag("div", tag("div", controls), class_="bar", role="search")


def _pack(pack: PackView) -> str:
    line = (
        f"stream {pack.stream}; {pack.tokens:,} of {pack.capacity:,} slots filled ({figures.share(pack.fill)}), "
        f"{figures.share(pack.trained, pack.tokens)} of the tokens trained; digest {pack.digest[:12]}"
    )
    padding = pack.capacity - pack.tokens
    return tag(
        "section",
        [
            tag("h2", text(f"Pack {pack.number}")),
            tag("p", text(line), class_="sub num"),
            _packbar(pack),
            *(_conversation(pack, index, c) for index, c in enumerate(pack.conversations)),
            tag("p", text(f"{padding:,} slots of padding, positions {pack.tokens:,} to {pack.capacity:,}"), class_="sub num")
            if padding
            else "",
        ],
    )  # fmt: skip


def _packbar(pack: PackView) -> str:
    """Return a drawing of the pack: a block for each conversation, its trained share below."""
    blocks = []
    for index, c in enumerate(pack.conversations):
        share = c.trained / max(c.length, 1)
        title = tag("title", text(f"{c.location}: {c.length:,} tokens, {share:.0%} trained"))
        blocks.append(
            tag(
                "rect",
                title,
                x=c.start,
                y=0,
                width=c.length,
                height=100,
                class_=f"seg{index % 2}",
                data_to=_id(pack, index),
            )
        )
        blocks.append(tag("rect", x=c.start, y=82, width=c.length * share, height=18, class_="segt"))
    return tag(
        "svg",
        blocks,
        class_="packbar",
        viewBox=f"0 0 {pack.capacity} 100",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"Conversations of pack {pack.number}",
    )


def _id(pack: PackView, index: int) -> str:
    return f"p{pack.number}c{index}"


def _conversation(pack: PackView, index: int, c: ConversationView) -> str:
    part = f", part {c.part}" if c.part else ""
    facts = (
        f"source {c.source}, row {c.row}, epoch {c.epoch}{part}",
        f"positions {c.start:,} to {c.start + c.length:,}",
        f"{c.trained:,} of {c.length:,} tokens trained",
    )
    heading = [tag("b", text(c.location)), *(tag("span", text(fact)) for fact in facts)]
    return tag(
        "article",
        [tag("header", heading), *map(_run, c.runs)],
        class_="card conversation",
        id=_id(pack, index),
        data_source=c.source,
        data_start=c.start,
    )


def _run(run: RunView) -> str:
    last = run.position + len(run.tokens)
    who = tag("div", text(run.role) + tag("span", text(f"{run.position:,}–{last:,}")), class_="who")
    return tag(
        "div",
        [who, tag("div", map(_token, run.tokens), class_="tokens", dir="auto")],
        class_=f"turn r-{run.role}",
        data_role=run.role,
    )


def _token(token: TokenView) -> str:
    classes = " ".join(name for name, on in (("s", token.special), ("n", "\n" in token.text)) if on)
    return tag("b" if token.trained else "i", text(token.text), class_=classes or None, data_t=token.id)


def _refused(preview: Preview) -> str:
    if not preview.refused:
        return tag("section", [tag("h2", text("Refused rows")), tag("p", text("No row was refused."), class_="sub")])
    head = tag("tr", (tag("th", text(name)) for name in ("place", "reason", "detail")))
    return tag(
        "section",
        [
            tag("h2", text("Refused rows")),
            tag("div", tag("table", [head, *_rows(preview)]), class_="scroll"),
        ],
    )


def _rows(preview: Preview) -> Iterator[str]:
    for row in preview.refused:
        cells = [
            tag("td", text(row.location), class_="mono w"),
            tag("td", text(row.reason), class_="reason"),
            tag("td", text(row.detail), class_="w"),
        ]
        yield tag("tr", cells, class_="refused", data_source=row.source, data_reason=row.reason)
