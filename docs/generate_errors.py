"""Write docs/errors.md: every message of an error in the code, with its remedy. Run by `make docs`.

Messages come from the `raise` statements of the three packages, and from the doors through which
other libraries raise. A message is a cause and a remedy:
the remedy is the part that begins, after a semicolon, colon or full stop, with the verb of an
instruction, such as "restore the file". A message that states a limit with "must" is its own
remedy. `tests/test_errors_page.py` requires one of both from every message.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_name("errors.md")
PACKAGES = ("sftstream", "checkpoints", "trainer")

VERBS = (
    "add|ask|audit|call|check|choose|convert|copy|correct|delete|divide|download|export|fetch|filter|flatten|free|give|"
    "install|keep|leave|load|lower|make|mark|merge|mix|move|name|number|open|order|pass|push|put|raise|read|remove|rename|"
    "repair|repeat|report|resize|restore|resume|run|save|see|set|simplify|start|stop|take|train|unpack|update|use|wait|write"
)
REMEDY = re.compile(
    r"(?:; |: |\. |, or |^(?=(?:give|resume) ))"
    rf"((?:or )?(?:(?:in|to) [^;]*?, )?(?:(?:{VERBS})\b|<(?:remedy|remedies|again|advice)>).*)",
    re.IGNORECASE,
)
LIMIT = re.compile(r"\bmust\b|\bis no\b|\bcounted from 0\b")
WHOLE = re.compile(r"^(?:config )?(?:<[^>]*>[:;]?\s*)+$")
"""A message that passes on the text of another error, with the file before it."""


class Kind(NamedTuple):
    """A class of errors on the page."""

    title: str
    meaning: str
    remedied: bool
    """True if `meaning` holds a remedy for each message of the class."""


KINDS = {
    "ValueError": Kind(
        "Configs, data and models (ValueError)",
        "A setting, a file of conversations, a tokenizer, a template or a model is not usable as it is.",
        remedied=False,
    ),
    "CheckpointError": Kind(
        "Checkpoints (CheckpointError)",
        "A checkpoint cannot be written, read, exported or pushed. Raised on every rank alike.",
        remedied=False,
    ),
    "CorruptCheckpoint": Kind(
        "Damaged checkpoints (CorruptCheckpoint)",
        "A file of a step is not the file that was committed. A resume skips the step and loads the newest undamaged one. "
        "Restore the step from a copy, or delete its directory; `python -m checkpoints verify` lists all damage.",
        remedied=True,
    ),
    "LostRank": Kind(
        "Lost ranks (LostRank)",
        "A process of the run has ended or does not answer. Start the run again: it continues from its last checkpoint. The "
        "first error of any rank names the cause; raise `parallel.timeout` if a step takes longer.",
        remedied=True,
    ),
    "Unproven": Kind(
        "Attention kernels that fail their test (Unproven)",
        "A run passes over the kernel and takes the next one; its first lines name the reason. Update the package of the "
        "kernel to use it.",
        remedied=True,
    ),
    "Refused": Kind(
        "Refused rows (Refused)",
        "A row cannot be trained as it is. The run goes on without the row, counts it, and lists it with place, reason and "
        "detail in refused.jsonl; above the shares `data.max_refused` and `data.max_too_long` the run stops. Correct the row, "
        "or follow the detail. `sftstream preview` and `sftstream stats` show refused rows before a run.",
        remedied=True,
    ),
    "Door": Kind(
        "Files that a library refuses",
        "The line names the file and ends with the words of the library that reads it. Restore the file, or write it again "
        "with a current version of the library; `--debug` shows where the library stopped.",
        remedied=True,
    ),
    "OSError": Kind(
        "Files and disks (OSError)",
        "The system refuses to read or write a file: the line ends with its words. Free the disk, correct the permissions "
        "or the path, and start again.",
        remedied=True,
    ),
    "RuntimeError": Kind(
        "Calls in a wrong order (RuntimeError)",
        "The library was called in an order that it cannot serve, or the machine has failed in the middle of a call.",
        remedied=False,
    ),
}


class Message(NamedTuple):
    """A message in the code."""

    kind: str
    """Class of the error."""
    text: str
    """The message, each value as <name>."""
    place: str
    """File that raises it."""

    @property
    def parts(self) -> tuple[str, str]:
        """The cause and the remedy; the remedy is "" if the message has none of its own."""
        found = REMEDY.search(self.text)
        if found is None:
            return self.text, ""
        return self.text[: found.start()], found[1]

    @property
    def has_remedy(self) -> bool:
        """True if the message, its limit or its class says how to go on."""
        passed_on = WHOLE.match(self.text) is not None
        return bool(self.parts[1]) or bool(LIMIT.search(self.text)) or passed_on or KINDS[self.kind].remedied


def messages() -> list[Message]:
    """Return the messages of all `raise` statements of the classes in `KINDS`, without repeats."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for message in _messages_of(path):
                found.setdefault((message.kind, message.text), message)
    return list(found.values())


def _messages_of(path: Path) -> Iterator[Message]:
    place = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        kind = ast.unparse(call.func)
        if kind == "Door" or (kind in KINDS and isinstance(node, ast.Raise)):
            texts = [_text(argument) for argument in call.args]
            text = f"{texts[0]}: {texts[1]}" if kind == "Refused" and len(texts) > 1 else texts[0]
            yield Message(kind, f"{text}: <reason>" if kind == "Door" else text, place)


def _text(node: ast.expr) -> str:
    """Return the text of a message, each computed part as its short name in angle brackets."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value.value if isinstance(value, ast.FormattedValue) else value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return f"<{_name(node)}>"


def _name(node: ast.expr) -> str:
    """Return a short name for a computed part: the name of its variable, attribute or call."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ").lower()
        case ast.Call(func=ast.Attribute(value=ast.Constant()), args=[inner]):  # a text joined
            return _name(inner)
        case ast.Call(
            func=ast.Name(id="excerpt" | "one_line" | "_reason" | "str" | "repr" | "list" | "sorted" | "len" | "map"),
            args=[*_, inner],
        ):
            return _name(inner)
        case ast.JoinedStr():
            return re.sub(r"[<>]", "", _text(node))
        case ast.Constant(value=value):
            return str(value)
    inner = _inner(node)
    return "value" if inner is None else _name(inner)


def _inner(node: ast.expr) -> ast.expr | None:
    """Return the part of an expression that names its value best; None without such a part."""
    for field in ("func", "value", "elt", "left", "body"):
        if isinstance(part := getattr(node, field, None), ast.expr):
            return part
    parts = getattr(node, "elts", None) or getattr(node, "values", None)
    return parts[0] if parts else None


INTRODUCTION = """\
# Errors

*Generated by `make docs` from the messages in the code. Edit the messages there, not this page.*

An error of a user's file or setting is one line on stderr, `error: ` and a message of this page, with
exit code 1. `--debug` shows the traceback as well. Values are shown here as `<name>`. Search this page
for a few words of a message that hold no value. An error whose line names another type, such as
`KeyError`, comes from a library: run the command again with `--debug`, and report the traceback.
"""


def page() -> str:
    """Return the text of docs/errors.md."""
    parts = [INTRODUCTION]
    listed = messages()
    for kind, about in KINDS.items():
        parts.append(f"\n## {about.title}\n\n{about.meaning}\n")
        rows = [message for message in listed if message.kind == kind and not WHOLE.match(message.text)]
        parts.append("| Message | Remedy | File |\n|---|---|---|")
        for message in rows:
            cause, remedy = message.parts
            otherwise = "see above" if about.remedied else "stay within the limit"
            parts.append(f"| {_cell(cause)} | {_cell(remedy or otherwise)} | `{message.place}` |")
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Return a text as a cell of a table in Markdown."""
    for character in "\\<>*_`[]|~$":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
