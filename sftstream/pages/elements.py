"""Build the elements that pages share: the head of a page, sections, tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sftstream.pages.document import tag, text

THEME = '<button type="button" id="theme" class="corner" aria-label="Light or dark">&#9680;</button>'
"""Button for light or dark, in the corner of the head of a page."""


def header(title: str, note: str, facts: Mapping[str, str], *, theme: bool = True) -> str:
    """Return the head of a page: title, a note, and figures under their names.

    `note` is HTML; `title` and `facts` are texts. `theme` is False for a page that has its button
    for light or dark elsewhere.
    """
    figures = [tag("div", tag("dt", text(name)) + tag("dd", text(value))) for name, value in facts.items()]
    parts = [tag("h1", text(title)), tag("p", note, class_="sub"), tag("dl", figures, class_="facts")]
    return tag("header", [THEME, *parts] if theme else parts, class_="top")


def section(title: str, *parts: str) -> str:
    """Return a section with a heading. `parts` are HTML."""
    return tag("section", [tag("h2", text(title)), *parts])


def details(title: str, *parts: str) -> str:
    """Return a part of the page that is closed until a reader opens it. `parts` are HTML."""
    return tag("details", [tag("summary", text(title)), *parts])


def table(head: Iterable[tuple[str, bool]], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of texts; each heading tells whether its column holds numbers."""
    columns = list(head)
    classes = ["n" if is_number else "w" for _, is_number in columns]
    heads = tag("tr", (tag("th", text(name), class_=c) for (name, _), c in zip(columns, classes, strict=True)))
    lines = (tag("tr", (tag("td", text(v), class_=c) for v, c in zip(row, classes, strict=True))) for row in rows)
    return tag("div", tag("table", [heads, *lines]), class_="scroll", tabindex="0")
