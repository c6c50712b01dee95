"""Build a self-contained HTML document whose content security policy allows its own code only.

The policy names the SHA-256 of the style and of each script of the document. A browser therefore
runs no script and loads no image, font or address that text inside the document asks for, even if
an escape were missing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import NamedTuple

_KEPT = "\n\t\u200c\u200d"
"""Characters that are not printable but stay as they are: line ends, tabs, and the joiners that
Arabic scripts and emoji need."""


class Page(NamedTuple):
    """The parts of a document."""

    title: str
    body: str
    """HTML of the body. All text from outside went through `text`."""
    scripts: tuple[str, ...] = ()
    """Names of files in this folder, such as "preview.js"."""


def text(value: object) -> str:
    """Return a value as HTML text: markup is escaped, control characters are shown.

    `text("<b>\\x1b[2J")` returns `"&lt;b&gt;\\\\x1b[2J"`. Characters that reorder a line (U+202E
    and its kin) are shown as escapes too.
    """
    shown = str(value)
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() or c in _KEPT else _escaped(c) for c in shown)
    return escape(shown, quote=True)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def tag(name: str, content: Iterable[str] | str = "", **attributes: object) -> str:
    """Return an element. `content` is HTML; the values of attributes are escaped.

    An underscore at the end or inside of an attribute's name becomes nothing or a hyphen:
    `tag("p", text("a<b"), class_="note", data_row=3)` returns
    `'<p class="note" data-row="3">a&lt;b</p>'`. An attribute with the value None is left out.
    """
    inner = content if isinstance(content, str) else "".join(content)
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{given}>{inner}</{name}>"


def document(page: Page) -> str:
    """Return the whole HTML document of a page."""
    style = _file("page.css")
    scripts = [_file(name) for name in ("page.js", *page.scripts)]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {' '.join(map(_hash, scripts))}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        tag("title", text(page.title)),
        f"<style>{style}</style>",
    ]
    code = "".join(f"<script>{script}</script>" for script in scripts)
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>{page.body}{code}</body></html>\n'


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
