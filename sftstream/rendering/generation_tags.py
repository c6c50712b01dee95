"""Narrow turns to the `{% generation %}` blocks of a chat template."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from sftstream.records import Span
from sftstream.rendering.payloads import Payload


def narrow(
    span: Span, payloads: Sequence[Payload], tags: Sequence[Span], text: str, stops: Sequence[str]
) -> Span | None:
    """Return the part of a turn that lies in the block around the turn's payloads.

    `span` is the turn, and `tags` are the ranges of `text` printed inside blocks, in order. Return
    None if no block contains all payloads.
    """
    start = min((p.start for p in payloads), default=span.start)
    end = max((p.end for p in payloads), default=span.start)
    tag = tags[max(0, bisect_right(tags, start, key=lambda tag: tag.start) - 1)] if tags else Span(0, 0)
    if not tag.start <= start <= end <= tag.end:
        return None
    # Some blocks include the generation prompt, and some leave the stop out.
    stop_follows = text[tag.end : span.end] in ("", *stops)
    tag_end = max(tag.end, span.end) if stop_follows else span.end
    return Span(max(tag.start, span.start), min(tag_end, span.end))
