"""`sftstream preview`: packs token by token, in a terminal, as JSON, and as a page in a browser."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
from browser import chromium, opened
from commands import run

from sftstream import DataConfig, PackLoader, read_state
from sftstream.cli.main import main
from sftstream.preview.view import Preview, preview
from sftstream.toml_file import read_data_config

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"
    " \x1b[2J\x1b]0;owned\x07 [red]markup[/red] [/] \u202egnp.exe </div></body> <|eot_id|>"
)


@pytest.fixture(scope="module")
def hostile(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of conversations that attack a terminal and a browser, and of plain ones."""
    directory = tmp_path_factory.mktemp("hostile" * 6)
    rows = [tiny.chat(HOSTILE, "seven stones", system="Be brief."), *tiny.rows(12), tiny.chat("what", HOSTILE)]
    bad = [{"messages": [{"role": HOSTILE, "content": "?"}]}, {HOSTILE: 1}]
    tiny.write_jsonl(directory / "a.jsonl", [*rows, *bad])
    tiny.write_jsonl(directory / "b.jsonl", tiny.rows(4, seed=1))
    config = runs.run_config(
        tokenizer,
        str(directory / "a.jsonl"),
        str(directory / "b.jsonl"),
        data={"streams": 1, "global_batch": 2, "capacity": 4096, "epochs": 1, "window": 64},
    )
    (directory / "run.toml").write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    return directory / "run.toml"


def seen_by(config: DataConfig, count: int = 2) -> tuple[Preview, list[Any]]:
    """Return a preview, and the packs of another loader."""
    return preview(PackLoader(config, workers=0), 0, count), tiny.take(PackLoader(config, workers=0), count)


def assert_equal_to_packs(found: Preview, packs: list[Any]) -> None:
    for view, pack in zip(found.packs, packs, strict=True):
        tokens = [token for c in view.conversations for r in c.runs for token in r.tokens]
        assert [token.id for token in tokens] == pack.input_ids[: pack.tokens].tolist()
        counted = [False, *(pack.labels[: pack.tokens - 1] >= 0).tolist()]
        assert [token.trained for token in tokens] == counted
        assert view.trained == sum(counted) == sum(c.trained for c in view.conversations)
        assert [c.start for c in view.conversations] == pack.borders[: len(pack.segments)].tolist()
        assert view.digest == pack.digest()


def test_each_token_has_the_id_the_mark_and_the_role_of_the_pack(config: DataConfig) -> None:
    found, packs = seen_by(config)
    assert_equal_to_packs(found, packs)
    for conversation in found.packs[0].conversations:
        roles = [run.role for run in conversation.runs if run.role != "template"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        spoken = [run for run in conversation.runs if run.role == "assistant"]
        assert all(run.tokens[-1].text == "<|eot_id|>" and run.tokens[-1].special for run in spoken)
        assert conversation.trained == sum(len(run.tokens) for run in spoken)
        text = "".join(token.text for run in conversation.runs for token in run.tokens)
        assert text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n")


@pytest.mark.parametrize("changes", [{"overflow": "split"}, {"overflow": "truncate"}, {"train_on": ["user"]}])
def test_parts_of_long_conversations_have_roles_too(tokenizer: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    words = " ".join(tiny.WORDS)
    rows = [tiny.chat("what", words, "which", words, system="Be brief."), *tiny.rows(8)]
    config = tiny.data_config(
        tokenizer, tiny.write_jsonl(tmp_path / "a.jsonl", rows), streams=1, capacity=96, **changes
    )
    found, packs = seen_by(config, 4)
    assert_equal_to_packs(found, packs)
    roles = {run.role for pack in found.packs for c in pack.conversations for run in c.runs}
    assert {"user", "assistant", "template"} <= roles <= {"system", "user", "assistant", "template"}


def test_rows_of_plain_text_are_shown_without_roles(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "seven stones"}] * 3)
    config = tiny.data_config(tokenizer, streams=1, sources=[{"path": path, "verified": False}])
    found, packs = seen_by(config, 1)
    assert_equal_to_packs(found, packs)
    assert {run.role for c in found.packs[0].conversations for run in c.runs} == {"text"}


def test_characters_of_several_tokens_show_their_bytes(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [tiny.chat("what", "é👩 seven")] * 2)
    found, packs = seen_by(tiny.data_config(tokenizer, path, streams=1), 1)
    assert_equal_to_packs(found, packs)
    spoken = next(run for run in found.packs[0].conversations[0].runs if run.role == "assistant")
    assert "".join(token.text for token in spoken.tokens) == r"\xc3\xa9\xf0\x9f\x91\xa9 seven<|eot_id|>"


def test_the_terminal_shows_packs_marks_and_refusals_without_control_codes(hostile: Path) -> None:
    result = run(main, "preview", hostile)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout
    text = " ".join(result.stdout.split())
    assert r"\x1b[2J\x1b]0;owned\x07 [red]markup[/red] [/] \u202egnp.exe" in text
    assert "⟦seven stones<|eot_id|>⟧" in text
    assert f"{hostile.parent}/a.jsonl:15 unknown role" in text
    assert f"{hostile.parent}/a.jsonl:16 unknown layout" in text
    assert re.search(r"pack 0 · stream 0 · [\d,]+ of 4,096 slots filled", text)
    assert "slots of padding" in text


def test_a_later_pack_and_the_packs_after_a_checkpoint_are_shown(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    later = json.loads(run(main, "preview", "run.toml", "--pack", "8", "--json").stdout)
    resumed = json.loads(run(main, "preview", "run.toml", "--state", "runs/first", "--json").stdout)
    assert later["packs"] == resumed["packs"]
    assert later["packs"][0]["number"] == 8
    result = run(main, "preview", "run.toml", "--pack", "100000")
    assert result.stderr == "error: pack 100000 does not exist: the data ends before it; give a smaller number\n"


def test_the_packs_after_a_state_are_those_of_a_resume_with_the_changes_that_the_config_accepts(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    config, state = tmp_path / "changed.toml", "runs/first"
    changed = (desk / "run.toml").read_text().replace("capacity = 256", "capacity = 128")
    config.write_text(changed)
    refused = run(main, "preview", config, "--state", state)
    assert "data.capacity: 256 -> 128" in refused.stderr
    advice = re.search(r"data\.(accept_changed = \[.*?\]) accepts the change", refused.stderr)
    assert advice
    config.write_text(changed.replace("data = {", f"data = {{{advice[1]}, "))
    shown = json.loads(run(main, "preview", config, "--state", state, "--count", "2", "--json").stdout)["packs"]
    resumed = tiny.take(PackLoader(read_data_config(config), workers=0, state=read_state(state)), 2)
    assert [(pack["number"], pack["capacity"], pack["digest"]) for pack in shown] == [
        (number, 128, pack.digest()) for number, pack in enumerate(resumed, 8)
    ]


@pytest.fixture(scope="module")
def page(hostile: Path) -> Path:
    """The page of the hostile config."""
    path = hostile.parent / "packs.html"
    result = run(main, "preview", hostile, "--html", path, "--count", "1")
    assert re.fullmatch(rf"wrote {path}, \d.\d MB; open it in a browser\n", result.stdout)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def test_hostile_text_is_shown_and_never_run(browser: Any, page: Path) -> None:
    shown, seen = opened(browser, page)
    assert shown.title().startswith("Packs of ")
    assert seen == []
    assert r"<script>document.title = 'owned'</script>" in shown.inner_text("main")
    assert "\u202e" not in page.read_text()
    assert shown.locator("main script, main img").count() == 0


def test_the_policy_stops_scripts_and_requests_even_without_escapes(browser: Any, page: Path, tmp_path: Path) -> None:
    """What would happen if an escape were forgotten."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            """Tests say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        attack = (
            f"<script>document.title='owned'</script><img src='{url}/image' onerror='document.title=1'>"
            f"<link rel=stylesheet href='{url}/style'><iframe src='{url}/frame'></iframe><script src='{url}/code'></script>"
        )
        bare = page.read_text()
        policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', bare)
        assert policy
        for name, content in (("with", bare), ("without", bare.replace(policy[0], ""))):
            (tmp_path / f"{name}.html").write_text(content.replace("<main>", f"<main>{attack}", 1))
        shown, _ = opened(browser, tmp_path / "with.html")
        assert shown.title().startswith("Packs of ")
        assert shown.inner_text("#count").endswith("conversations")  # the page's own code still runs
        assert asked == []
        shown, _ = opened(browser, tmp_path / "without.html")
        assert shown.title() in ("owned", "1")
        assert {"/image", "/style", "/frame", "/code"} <= set(asked)
        server.shutdown()


def test_search_filters_and_keys_work(browser: Any, page: Path) -> None:
    shown, seen = opened(browser, page)
    total = shown.locator(".conversation").count()
    assert shown.inner_text("#count") == f"{total} of {total} conversations"
    shown.keyboard.press("/")
    shown.keyboard.type("SEVEN STONES")
    assert shown.locator(".conversation:visible").count() == 1
    assert shown.evaluate("CSS.highlights.get('found').size") == 1
    shown.fill("#search", "")
    shown.select_option("#source", "1")
    assert shown.locator(".conversation:visible").count() == 4
    assert shown.locator("tr.refused:visible").count() == 0
    shown.select_option("#source", "")
    assert shown.locator("tr.refused:visible").count() == 2
    shown.select_option("#reason", "unknown role")
    assert shown.locator("tr.refused:visible").count() == 1
    shown.click("button[data-role=user]")
    assert shown.locator(".turn.r-user:not(.off)").count() == 0
    assert shown.locator(".turn.r-assistant.off").count() == 0
    shown.locator("h1").click()
    for key in "jjk":
        shown.keyboard.press(key)
    assert shown.locator(".conversation.at").get_attribute("id") == "p0c0"
    shown.locator(".packbar rect[data-to=p0c3]").click(force=True)
    assert shown.locator(".conversation.at").get_attribute("id") == "p0c3"
    shown.keyboard.press("?")
    assert shown.locator("dialog").is_visible()
    shown.keyboard.press("Escape")
    before = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    shown.keyboard.press("t")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert seen == []


def test_a_token_under_the_mouse_tells_its_id_position_and_label(browser: Any, page: Path) -> None:
    shown, _ = opened(browser, page)
    token = shown.locator("#p0c0 .r-assistant b").first
    token.scroll_into_view_if_needed()
    token.hover()
    tip = shown.inner_text("#tip").splitlines()
    assert tip[0] == f"id {token.get_attribute('data-t')}"
    assert re.fullmatch(r"position \d+, pack \d+", tip[1])
    assert tip[2].endswith("counted in the loss")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_width_in_light_and_dark(browser: Any, page: Path, tmp_path: Path, width: int) -> None:
    shots = []
    for scheme in ("light", "dark"):
        shown, seen = opened(browser, page, width, scheme)
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        shots.append(shown.screenshot(path=tmp_path / f"{scheme}.png"))
        assert seen == []
    assert shots[0] != shots[1]
