"""Prove at the start of a run that a chat template is safe to compile and prints the same text in
each process.

A second process with another hash seed compiles the template and prints the probes, within limits
of time and memory. Only then does this process compile the template, print the probes, and compare
the digests of the texts. The digests are stored in the cache, so later starts need no second
process: they compare their texts with the digests of the first start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import date as Date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sftstream.cache import Unwritable, cached, derived, found
from sftstream.refused import Refused
from sftstream.rendering.certificate_process import digests
from sftstream.rendering.limits import MEMORY, SECONDS, bounded_memory
from sftstream.rendering.probe import SHAPES
from sftstream.rendering.template import ChatTemplate, TemplateMessage

SUFFIX = ".certificate"
DATE = Date(2000, 1, 1)
"""The date that the probes are printed on, so that a certificate is valid on every day."""
CODE = ("../refused.py", "../door.py", "../excerpt.py", "__init__.py", "bounds.py", "limits.py", "json_cache.py")
"""Files that the second process imports, besides `environment.py` and `certificate_process.py`."""

_START = """
import sys, types
package = sys.modules["sftstream"] = types.ModuleType("sftstream")
package.__path__ = [sys.argv[1]]
sys.path[:] = sys.argv[2:]
from sftstream.refused import Refused
from sftstream.rendering.certificate_process import main
main()
"""
"""The code of the second process. `sftstream/__init__.py` is not run, since it imports torch."""


def certify(template: ChatTemplate, seconds: float = SECONDS) -> None:
    """Raise ValueError unless the template prints the probes as a second process prints them.

    `seconds` of CPU time are the limit of the second process. ValueError is also raised if the
    template is not valid Jinja, or if the second process needs more time or memory than allowed.
    """
    probes = _probes(template.on(DATE))
    request = json.dumps({"text": template.text, "date": DATE.isoformat(), "contexts": _contexts(probes)}, default=repr)
    elsewhere = _digests_elsewhere(request, seconds)
    with bounded_memory():
        here = digests(template.compiled, json.loads(request)["contexts"], DATE.isoformat())
    for probe, own, other in zip(probes, here, elsewhere, strict=True):
        if own != other:
            raise ValueError(
                f"the chat template prints the probe {probe.name!r} differently in each process{_address(probe)}, so a "
                "resumed run would train another text; use another template"
            )


class _Probe(NamedTuple):
    """A conversation to print, with or without the generation prompt."""

    name: str
    template: ChatTemplate
    messages: list[TemplateMessage]
    tools: tuple[Any, ...]
    prompt: bool


def _probes(template: ChatTemplate) -> list[_Probe]:
    """Return all probes, with contents as texts and as parts.

    How the template reads contents is not known yet.
    """
    return [
        _Probe(name, candidate, messages, tools, prompt)
        for candidate in (template, template.with_content_as_parts())
        for name, (messages, tools) in SHAPES.items()
        for prompt in (False, True)
    ]


def _contexts(probes: Iterable[_Probe]) -> list[dict[str, Any]]:
    """Return the variables of each probe, without the clock, which each process adds itself."""
    contexts = [probe.template.context(probe.messages, probe.tools, probe.prompt) for probe in probes]
    return [{name: value for name, value in context.items() if name != "strftime_now"} for context in contexts]


def _address(probe: _Probe) -> str:
    """Return the address of an object that the template prints, as a part of a sentence, or ""."""
    try:
        probe.template.render(probe.messages, probe.tools, prompt=probe.prompt)
    except Refused as refused:
        return f" ({refused.detail.partition(' differs')[0]})"
    return ""


def _digests_elsewhere(request: str, seconds: float) -> list[str]:
    """Return the digests that another process computed: at an earlier start, if the cache has them,
    or now."""
    here = Path(__file__).parent
    code = [(here / name).read_bytes() for name in (*CODE, "environment.py", "certificate_process.py")]
    key = derived("certificate", sys.version, metadata.version("jinja2"), request, *code)
    with suppress(OSError):  # without a cache, each start needs a second process
        if path := found(key, SUFFIX):
            return list(json.loads(path.read_bytes()))
    printed = _print_elsewhere({**json.loads(request), "seconds": max(1, round(seconds))})
    with suppress(Unwritable, OSError):
        cached(key, SUFFIX, lambda: (json.dumps(printed).encode(),))
    return printed


def _print_elsewhere(request: dict[str, Any]) -> list[str]:
    """Start the second process; return its digests, or raise its error as ValueError."""
    ended = subprocess.run(
        [sys.executable, "-S", "-c", _START, str(Path(__file__).parents[1]), *sys.path],
        input=json.dumps(request).encode(),
        env={**os.environ, "PYTHONHASHSEED": _other_seed()},
        capture_output=True,
    )
    if ended.returncode == 0:
        answer = json.loads(ended.stdout)
        if "error" in answer:
            raise ValueError(answer["error"])
        return list(answer["digests"])
    reason = (ended.stderr.decode(errors="replace").split("\n")[-2:] or [""])[0]
    if -ended.returncode in (signal.SIGXCPU, signal.SIGKILL):
        reason = f"it needs more than {request['seconds']} s of CPU time"
    raise ValueError(
        f"a second process could not compile the chat template and print {len(request['contexts'])} short conversations "
        f"within {request['seconds']} s and {MEMORY >> 20} MiB: {reason}; use another template"
    )


def _other_seed() -> str:
    """Return a seed for the hashes of texts that differs from the seed of this process."""
    return "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
