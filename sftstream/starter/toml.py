"""Write a proposal as a commented TOML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sftstream.excerpt import printable
from sftstream.starter.hardware import Hardware
from sftstream.starter.look import Look
from sftstream.starter.propose import Proposal


def toml(look: Look, proposal: Proposal, hardware: Hardware, template: str | None) -> str:
    """Return the text of a config, in which comments say what was measured and why.

    `template` is the chat template of the config; None for the tokenizer's own.
    """
    p = proposal
    lines = [
        *_measured(look),
        "",
        "[run]",
        f"name = {_value(p.name)}",
        _line(f"epochs = {p.epochs}", "passes over the data"),
        "",
        "[data]",
        _line(
            f"capacity = {p.capacity}", f"tokens of a pack, a micro-batch; {_percent(_fitting(look, p.capacity))} fit"
        ),
        _line(f"global_batch = {p.global_batch}", "packs of an optimizer step, over all GPUs"),
        _line(f"workers = {p.workers}", "loader processes of each data-parallel rank"),
    ]
    if p.max_refused is not None:
        share = len(look.refused) / look.sampled
        lines.append(
            _line(f"max_refused = {p.max_refused}", f"{share:.1%} of the sample were refused; better correct them")
        )
    lines += [
        "",
        "[[data.sources]]",
        f"path = {_value(look.path)}",
        *_source(look),
        "",
        "[data.tokenizer]",
        f"path = {_value(p.model)}",
        *([] if template is None else [f"template = {_value(template)}"]),
        "",
        "[model]",
        f"init_from = {_value(p.model)}",
        "",
        *([f"# {_comment(hardware.name)}; by --plan", "[parallel]", f"tp = {p.tp}", ""] if p.tp > 1 else []),
        "[optimizer]",
        _line(f"learning_rate = {p.learning_rate:g}", "for full fine-tuning of a model of this width"),
        "",
        "[schedule]",
        'kind = "cosine"',
        _line('over = "data"', "decays with the conversations used"),
        _line(f"warmup = {p.warmup}", "steps"),
        "",
        "[checkpoint]",
        _line(f"every = {p.every}", "steps; the last step is always saved"),
        "",
        "# Held-out conversations, to watch the validation loss and to keep the best checkpoint:",
        "# [validation]",
        '# sources = [{ path = "held_out.jsonl" }]',
        f"# every = {p.every}",
        "",
    ]
    return "\n".join(lines)


def _measured(look: Look) -> list[str]:
    """Return comments with the numbers of the sample."""
    layouts = ", ".join(f"{name}: {count}" for name, count in look.layouts.items())
    shares = " ".join(f"{_percent(q)} {look.length(q):,};" for q in (0.5, 0.9, 0.99))
    return [
        f"# {_comment(look.path)}: {look.rows:,} rows in {look.files} file{'s' * (look.files > 1)}, {look.sampled} sampled.",
        f"# Layouts: {_comment(layouts)}.",
        f"# Tokens of a conversation: {shares} longest {look.lengths[-1]:,}. About {look.tokens:,} in all.",
        f"# Refused in the sample: {len(look.refused)} of {look.sampled}.",
    ]


def toml_of(tables: Mapping[str, Mapping[str, Any]], comments: Sequence[str]) -> str:
    """Return the text of a config with `tables`, after the lines of `comments`."""
    lines = [f"# {_comment(comment)}" for comment in comments]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_inline(value)}" for key, value in table.items())]
    return "\n".join([*lines, ""])


def _inline(value: Any) -> str:
    """Return a TOML value in one line. A date becomes a text, as a template prints it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_value(str(key))} = {_inline(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _value(value if isinstance(value, str | int | float) else str(value))


def _source(look: Look) -> list[str]:
    lines = []
    if look.columns:
        lines.append(f"columns = {_inline(look.columns)}")
    if look.ignore:
        lines.append(f"ignore = {_inline(look.ignore)}")
    if look.named_roles:
        lines.append(f"roles = {_inline(look.named_roles)}")
    if not look.verified:
        lines.append(_line("verified = false", "plain text or token ids: trained as they are, nothing can be proved"))
    return lines


def _fitting(look: Look, capacity: int) -> float:
    return sum(length <= capacity for length in look.lengths) / len(look.lengths)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%")


def _line(setting: str, comment: str) -> str:
    return f"{setting:<24}# {comment}"


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> str:
    return " ".join(printable(text).split())
