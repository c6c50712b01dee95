"""The pages of runs in a browser: every theme and width, hostile text, values at the pointer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, opened
from commands import run
from run_files import end, launch, saved, step, write
from test_report_command import HOSTILE

from trainer.report.main import main


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a hostile run of many launches, of a run without a step, and of both."""
    directory = tmp_path_factory.mktemp("pages" * 30)
    sources = [{"path": f"{HOSTILE}.jsonl"}, {"path": "b.jsonl"}]
    events = []
    for number in range(40):
        config = {"data": {"sources": sources}, HOSTILE: {HOSTILE: HOSTILE}}
        sign = {"reached": 50 * number + 20, "last_sign": 1e9 + 1000 * number - 720} if number else {}
        events.append(launch(50 * number, 1e9 + 1000 * number, config=config, **sign))
        events.append(saved(50 * number + 50, 1e9 + 1000 * number + 200))
    events.append(end(2000, 1e9 + 39_210, f"error: {HOSTILE}"))
    lines = [
        step(
            n,
            time=1e9 + 1000 * ((n - 1) // 50) + 4 * ((n - 1) % 50 + 1),
            tokens_by_source=[n % 7, 3],
            mfu=0.4,
            validation_loss=1.5 if n % 100 == 0 else None,
        )
        for n in range(1, 2001)
    ]
    lines[7] |= {"refused": 1, "refused_by_reason": {HOSTILE: 1}}
    refused = [{"step": 8, "place": HOSTILE, "reason": HOSTILE, "detail": HOSTILE}]
    hostile = write(directory / HOSTILE.replace("/", "|"), [*lines, HOSTILE + "\n"], events, refused)
    new = write(directory / "new", [], [launch(0, 4e9)])
    found = {name: directory / f"{name}.html" for name in ("hostile", "new", "both")}
    for name, runs in (("hostile", [hostile]), ("new", [new]), ("both", [hostile, new])):
        assert run(main, *runs, "--html", found[name]).exit_code == 0
    return found


@pytest.mark.parametrize(
    ("name", "width"), [("hostile", 1280), ("hostile", 390), ("hostile", 320), ("new", 390), ("both", 390)]
)
def test_a_page_fits_every_width_and_theme_and_runs_nothing(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    for scheme in ("light", "dark"):
        shown, seen = opened(browser, pages[name], width, scheme)
        shown.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert seen == []
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert shown.title() != "owned"
        assert shown.locator("main script, main img").count() == 0
        sizes = shown.evaluate(
            "[...document.querySelectorAll('svg.x text')].map((t) => t.getBoundingClientRect().height)"
        )
        assert all(size >= 11 for size in sizes)
        shown.close()
    assert "\u202e" not in pages[name].read_text()
    assert "\x1b" not in pages[name].read_text()


def test_every_part_of_a_run_is_on_its_page(browser: Any, pages: dict[str, Path]) -> None:
    shown, _ = opened(browser, pages["hostile"])
    headings = shown.locator("h2").all_inner_texts()
    assert headings == [
        *("Curves", "Launches and interruptions", "Mixture", "Refused rows", "Checkpoints", "Settings"),
    ]
    plots = shown.locator(".chart h3").all_inner_texts()
    assert plots == [
        *("Loss", "Learning rate", "Gradient norm", "Tokens per second", "MFU", "Fill of the packs"),
        *("Trained share of the tokens", "Wait for data, share of the step", "Share of the tokens"),
    ]
    assert shown.locator("svg.lines >> nth=0").locator(".launch").count() == 39
    assert shown.locator("svg.times .lost").count() == 39
    assert shown.locator("svg.times .tick").count() == 40
    assert r"<script>document.title = 'owned'</script>" in shown.inner_text("main")
    assert shown.locator(".notice li").count() == 1


def test_lines_of_more_runs_than_colours_have_dashes_also_for_few_validations(tmp_path: Path) -> None:
    runs = [write(tmp_path / str(n), [step(1, validation_loss=3.0), step(2, validation_loss=2.0)]) for n in range(7)]
    assert run(main, *runs, "--html", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="line c0 d1"') == page.count('class="line c0"') == 9
    assert 'class="dots' not in page


def test_the_pointer_shows_step_and_values(browser: Any, pages: dict[str, Path]) -> None:
    shown, seen = opened(browser, pages["hostile"])
    shown.hover("svg.lines >> nth=4")
    output = shown.locator(".chart output >> nth=4")
    assert output.inner_text() == "step 1,000: 40%"
    shown.mouse.move(1, 1)
    assert output.inner_text() == ""
    assert seen == []


def test_a_chosen_theme_outlives_a_reload(browser: Any, pages: dict[str, Path]) -> None:
    shown, _ = opened(browser, pages["new"])
    before = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    shown.click("#theme")
    is_other = "before => sessionStorage.theme && getComputedStyle(document.body).backgroundColor != before"
    shown.wait_for_function(is_other, arg=before)
    shown.reload()
    shown.wait_for_function(is_other, arg=before)


def test_a_page_of_a_run_under_way_loads_itself_again_and_another_does_not(pages: dict[str, Path]) -> None:
    assert '<main data-reload="60">' in pages["new"].read_text()
    assert "<main>" in pages["hostile"].read_text()


def bounded(directory: Path, steps: int) -> int:
    """Return the size of the page of a run of `steps` steps, with a checkpoint every tenth step."""
    line = json.dumps(step(10**9, tokens_by_source=[3, 4], mfu=0.4, peak_memory=3.0, time=1e9))
    texts = (line.replace("1000000000", str(n), 1).replace("2.0", f"{n % 977 / 7:.4f}") for n in range(1, steps + 1))
    write(directory, [f"{text}\n" for text in texts], [launch(0, 1e9), *(saved(n, 1e9) for n in range(10, steps, 10))])
    assert run(main, directory).exit_code == 0
    return (directory / "report.html").stat().st_size


def test_the_size_of_a_page_is_bounded(tmp_path: Path) -> None:
    assert 100_000 < bounded(tmp_path, 20_000) < 500_000


def test_a_page_of_long_texts_and_many_launches_is_small(tmp_path: Path) -> None:
    long = "x" * 10**5
    many = {f"{n}{long}": long for n in range(60)}
    events = [launch(1, 1e9 + n, environment={"host": f"{n % 2}"}, config={"a": {"b": 1}}) for n in range(3000)]
    events += [launch(1, 2e9, environment=many, config=many), end(1, 2e9, long)]
    refused = [{"step": 1, "place": long, "reason": f"{n}{long}", "detail": long} for n in range(60)]
    lines = [step(1), step(2, refused_by_reason={f"{n}{long}": 1 for n in range(60)})]
    write(tmp_path, lines, events, refused)
    assert run(main, tmp_path).exit_code == 0
    assert (tmp_path / "report.html").stat().st_size < 600_000


@pytest.mark.slow
def test_a_page_of_a_million_steps_is_small(tmp_path: Path) -> None:
    assert bounded(tmp_path, 10**6) < 500_000
