"""HTML pages in one file each: one shell, one style, escaping, and a content security policy."""

from sftstream.pages.document import Page, document, tag, text
from sftstream.pages.elements import details, header, section, table
from sftstream.pages.plot import COLOURS, Line, Mark, Plot, labels, plot

__all__ = [
    "COLOURS",
    "Line",
    "Mark",
    "Page",
    "Plot",
    "details",
    "document",
    "header",
    "labels",
    "plot",
    "section",
    "table",
    "tag",
    "text",
]
