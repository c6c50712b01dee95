"""Hand over the result of a command: text for people, a JSON document for programs, a page."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sftstream.door import Door
from sftstream.excerpt import printable


def show_result(
    value: Any, page: Callable[[], str], path: Path | None, show: Callable[[], None] | None, *, as_json: bool
) -> None:
    """Print a result, and write its page to `path` if there is one.

    With `as_json` the only output is one JSON document. Otherwise `show` prints text, if it is not
    None. Raises ValueError if the page cannot be written.
    """
    if as_json:
        print_json(value)
    elif show is not None:
        show()
    if path is None:
        return
    content = page()
    write_page(path, content)
    if not as_json:
        _print(printable(f"wrote {path}, {len(content) / 1e6:.1f} MB; open it in a browser"))


def print_json(value: Any) -> None:
    """Print a value as one JSON document of ASCII characters, indented.

    Terminal control codes in the value arrive as escapes such as `\\u001b`, and change no terminal.
    """
    import json

    import msgspec

    _print(json.dumps(msgspec.to_builtins(value, str_keys=True), indent=1))


def write_page(path: Path, content: str) -> None:
    """Replace a page at once, so that a browser never reads half of a page.

    A path that is no regular file, such as /dev/stdout, is written to. Raises ValueError naming the
    file.
    """
    with Door(f"the page {str(path)!r} cannot be written"):
        if path.exists() and not path.is_file():
            path.write_text(content, encoding="utf-8")
            return
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.write_text(content, encoding="utf-8")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
