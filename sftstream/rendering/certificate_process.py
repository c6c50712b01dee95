"""Compile and print a chat template in a process of its own, within limits of time and memory.

`certificate.py` starts the process. It reads a request from standard input and writes the answer to
standard output, both as JSON:

    request  {"text": "{% for m in messages %}...", "date": "2000-01-01", "seconds": 60,
              "contexts": [{"messages": [...], "tools": null, ...}, ...]}
    answer   {"digests": ["ab12...", "refused", ...]}
    or       {"error": "the chat template is not valid Jinja: ..."}
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import date as Date
from typing import Any

import jinja2

from sftstream.refused import Refused
from sftstream.rendering.environment import compiled
from sftstream.rendering.limits import Bounded, bounded_memory


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    seconds = request["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        with bounded_memory():
            template = compiled(request["text"])
            answer: dict[str, Any] = {"digests": digests(template, request["contexts"], request["date"])}
    except ValueError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


def digests(template: jinja2.Template, contexts: Sequence[Mapping[str, Any]], date: str) -> list[str]:
    """Return for each context the SHA-256 of the printed text, or "refused".

    The template prints `date` as today's date. Raises ValueError if a render does too much work.
    """
    clock = {"strftime_now": Date.fromisoformat(date).strftime}
    return [_digest(template, {**context, **clock}) for context in contexts]


def _digest(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    try:
        with Bounded():
            text = template.render(**context)
    except Refused as refused:
        if refused.reason == "template does too much":
            raise ValueError(f"the chat template does too much: {refused.detail}; use another template") from None
        return "refused"
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
