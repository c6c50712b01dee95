"""The system's Chromium, driven by playwright. Tests of pages are skipped without either.

`apt-get install -y chromium` and `pip install playwright` install both.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Opened(NamedTuple):
    """A page, and the things that a hostile page would do: errors, dialogs, requests."""

    page: Any
    seen: list[str]


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser without a window; skip the test if there is none on this machine."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install -y chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> Opened:
    """Open a file; `seen` receives console messages, errors, dialogs and requests but the file's."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen: list[str] = []
    page.on("console", lambda message: seen.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on("dialog", lambda dialog: seen.append("dialog") or dialog.dismiss())
    page.on("request", lambda request: request.url == file.as_uri() or seen.append(f"request: {request.url}"))
    page.goto(file.as_uri())
    return Opened(page, seen)
