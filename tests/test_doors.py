"""Doors turn whatever a library raises into one line that names the file; no other code catches everything."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import run
from test_imports import ORDER, files

from sftstream import ChatEncoder, DataConfig, toml_file
from sftstream.cli.main import main
from sftstream.door import Door
from sftstream.inspection import stored
from sftstream.records import Refused
from sftstream.rendering.limits import time_limit
from sftstream.rendering.template import ChatTemplate
from sftstream.sources import Corpus
from sftstream.tokenization.tokenizer import Tokenizer

DOORS = {
    "sftstream": {"cli.main"},
    "checkpoints": {"cli.main", "ranks"},
    "trainer": {"main", "parity", "usage"},
}
"""The files that catch errors of any type; `sftstream.door` does so without an `except`."""


def catches_everything(handler: ast.ExceptHandler) -> bool:
    names = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"Exception"}
    )
    return bool(names & {"Exception", "BaseException"})


def passes_on(handler: ast.ExceptHandler) -> bool:
    """Return True if the handler cleans up and raises the same error again."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("package", ORDER)
def test_errors_of_any_type_are_caught_once_in_each_door_and_nowhere_else(package: str) -> None:
    found = [
        name
        for name, path in files(package).items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and catches_everything(node) and not passes_on(node)
    ]
    assert sorted(found) == sorted(DOORS[package])


@pytest.mark.parametrize("package", ORDER)
def test_no_error_of_any_type_is_suppressed(package: str) -> None:
    for path in files(package).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "suppress":
                names = {name.id for argument in node.args for name in ast.walk(argument) if isinstance(name, ast.Name)}
                assert not names & {"Exception", "BaseException"}, path


OWN = {"ValueError", "RuntimeError", "IndexError", "Refused", "BrokenRow", "CheckpointError", "CorruptCheckpoint"}
OWN |= {"LostRank", "TrackerDown"}
"""Types of errors whose messages these packages write; `Refused` is caught together with IndexError."""


@pytest.mark.parametrize("package", ORDER)
def test_the_message_of_a_library_enters_another_message_as_one_printable_line(package: str) -> None:
    raw = [
        f"{path}:{part.lineno}"
        for path in files(package).values()
        for handler in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(handler, ast.ExceptHandler) and handler.name and caught(handler) - OWN
        for part in ast.walk(handler)
        if isinstance(part, ast.FormattedValue) and part.conversion == -1 and ast.unparse(part.value) == handler.name
    ]
    assert not raw


def caught(handler: ast.ExceptHandler) -> set[str]:
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind) for kind in types if kind}


class PanicException(BaseException):
    """A panic of a Rust library, by the name and base class of pyo3."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("model"), "file 'x' cannot be loaded: KeyError: 'model'"),
        (PanicException("index\nout of range"), "file 'x' cannot be loaded: index out of range"),
        (MemoryError(), "file 'x' cannot be loaded: MemoryError"),
        (OSError(2, "No such file", "y"), "file 'x' cannot be loaded: No such file"),
        (Exception("\x1b[2Jclear"), "file 'x' cannot be loaded: \\x1b[2Jclear"),
    ],
)
def test_a_door_gives_one_printable_line(error: BaseException, line: str) -> None:
    def library() -> None:
        raise error

    library.__globals__["__name__"], before = "library", __name__
    try:
        with pytest.raises(ValueError, match=r".") as found, Door("file 'x' cannot be loaded"):
            library()
    finally:
        library.__globals__["__name__"] = before
    assert str(found.value) == line
    assert found.value.__cause__ is error


def test_a_door_lets_interrupts_and_refusals_pass() -> None:
    for error in (KeyboardInterrupt(), SystemExit(3), Refused("reason", "detail"), StopIteration()):
        with pytest.raises(type(error)), Door("x"):
            raise error


def test_an_error_of_this_package_passes_and_an_error_of_an_extension_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("x = 1")
    with pytest.raises(ValueError, match=r"^config '.*' has no \[data\] table"), Door("outer"):
        toml_file.read_data_config(tmp_path / "a.toml", [])
    with pytest.raises(ValueError, match=r"^outer: "), Door("outer"):
        eval("int('x')", vars(toml_file))  # a call of C code from a line of this package


def changed_tokenizer(tokenizer: str, directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    directory.mkdir()
    for path in Path(tokenizer).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    content = json.loads((directory / "tokenizer.json").read_text())
    changed = change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content if changed is None else changed))
    return directory


def normalizers(*steps: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(normalizer={"type": "Sequence", "normalizers": list(steps)})


def replacement(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


BAD_TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda _: [], "cannot be loaded: "),
    "a number": (lambda _: 7, "cannot be loaded: "),
    "no model": (lambda content: content.pop("model") and None, "cannot be loaded: "),
    "model of unknown type": (lambda content: content["model"].update(type="Unknown"), "cannot be loaded: "),
    "merges that do not exist": (lambda content: content["model"]["merges"].append(["qq", "zz"]), "cannot be loaded: "),
    "merges of numbers": (lambda content: content["model"].update(merges=[1, 2]), "cannot be loaded: "),
    "vocabulary as a list": (lambda content: content["model"].update(vocab=[1]), "cannot be loaded: "),
    "an id of 2**32": (lambda content: content["model"]["vocab"].update(zz=2**32), "has the id 4294967296 for 'zz'"),
    "an id of 2**31": (lambda content: content["model"]["vocab"].update(zz=2**31), "has the id 2147483648 for 'zz'"),
    "a negative id": (lambda content: content["model"]["vocab"].update(zz=-1), "has the id -1 for 'zz'"),
    "an added id of 2**24": (lambda content: content["added_tokens"][0].update(id=2**24), "has the id 16777216"),
    "normalizers that double": (normalizers(*[replacement({"String": "a"}, "aa")] * 34), "1.72e+10 times as long"),
    "a pattern between letters": (normalizers(replacement({"Regex": ""}, "b" * 2000)), "2e+03 times as long"),
    "an empty pattern": (normalizers(replacement({"String": ""}, "b" * 2000)), "2e+03 times as long"),
    "a pattern that is no regex": (normalizers(replacement({"Regex": "("}, "")), "cannot be loaded: "),
    "a normalizer without a type": (normalizers({}), "cannot be loaded: "),
    "a deep list": (lambda content: content.update(normalizer=nested(900)), "cannot be loaded: "),
    "dropout": (lambda content: content["model"].update(dropout=0.5), "draws its merges by chance"),
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_one_line_with_its_directory(tokenizer: str, tmp_path: Path, name: str) -> None:
    change, message = BAD_TOKENIZERS[name]
    directory = changed_tokenizer(tokenizer, tmp_path / "bad", change)
    outcome = run(main, "template", directory)
    assert outcome.exit_code == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"error: tokenizer '{directory}' {message}") or message in line
    assert str(directory) in line


def test_a_tokenizer_within_the_bounds_loads(tokenizer: str, tmp_path: Path) -> None:
    steps = normalizers({"type": "NFC"}, replacement({"String": " "}, "▁"), replacement({"Regex": " {2,}"}, "▁"))
    directory = changed_tokenizer(tokenizer, tmp_path / "good", steps)
    assert Tokenizer(str(directory)).ids("a b")


def test_a_text_that_the_tokenizer_cannot_encode_is_refused(tokenizer: str, tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"yes": 0}, "unk_token": "none"}
    directory = changed_tokenizer(tokenizer, tmp_path / "words", lambda content: content.update(model=words))
    encoder = ChatEncoder(str(directory))
    with pytest.raises(Refused, match=r"tokenizer raises: the text cannot be tokenized: .*UNK"):
        encoder.encode(tiny.chat("unheard of", "yes")["messages"])


BAD_TEMPLATES = {
    "a break outside of a loop": ("{% break %}", "'break' outside loop"),
    "25 nested loops": ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
    "5000 brackets": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion"),
    "a long chain": ("{{ x" + "|trim" * 5000 + " }}", "recursion"),
    "a filter of no name": ("{{ a | nothing }}", "No filter named 'nothing'"),
    "an unclosed tag": ("{% for", "not valid Jinja"),
    "loops without end": ("{% for a in range(90000) %}" * 3 + "{% endfor %}" * 3, "more than 10,000,000 units of work"),
    "a power": ("{{ 9 ** 99999999 }}", "it makes a number of 399,999,996 bits"),
    "a width": ("{{ 'a' | center(1000000000) }}", "it makes a value of size"),
    "a format": ("{{ '%0999999999d' % 1 }}", "a width of 7 digits or more"),
    "text without a tag": ("{#" + "a" * (1 << 20) + "#}{{ 1 }}", "has more than 1,048,576 characters"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_bad_template_is_one_line_with_its_file(tokenizer: str, tmp_path: Path, name: str) -> None:
    text, message = BAD_TEMPLATES[name]
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    outcome = run(main, "template", tokenizer, path)
    assert outcome.exit_code == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"error: chat template '{path}': ")
    assert message in line


@pytest.mark.parametrize("path", ["~nosuch/chat.jinja", "a\0b", "x" * 5000, "/"])
def test_a_template_that_cannot_be_read_is_named(tokenizer: str, path: str) -> None:
    outcome = run(main, "template", tokenizer, path)
    assert outcome.exit_code == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert "give a file or the Jinja text" in outcome.stderr


def growth(body: str) -> str:
    return "{% set n = namespace(s='ab') %}{% for i in range(90) %}{% set n.s = " + body + " %}{% endfor %}{{ n.s }}"


@pytest.mark.parametrize(
    "body",
    [
        "n.s + n.s",
        "n.s ~ n.s",
        "n.s * 2",
        "[n.s, n.s]",
        "n.s.replace('a', n.s)",
        "n.s | replace('a', n.s)",
        "'%s%s' % (n.s, n.s)",
        "'{0}{0}'.format(n.s)",
        "n.s.join([n.s, n.s, n.s])",
        "[n.s, n.s] | join(n.s)",
    ],
)
def test_each_way_to_double_a_value_is_counted(tokenizer: str, body: str) -> None:
    with pytest.raises(ValueError, match="the chat template does too much: it makes a value of size"):
        ChatEncoder(tokenizer, growth(body))


def test_what_is_refused_depends_on_no_clock(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ChatEncoder(tokenizer, tiny.TEMPLATE + "{% for a in messages[0].content %}{% endfor %}")
    monkeypatch.setattr("sftstream.rendering.limits.SECONDS", 0.01)
    slow = tiny.chat("a" * 3_000_000, "b")["messages"]
    with pytest.raises(RuntimeError, match=r"did not print a conversation within 0 s; .* lower max_row_bytes"):
        encoder.encode(slow)
    monkeypatch.setattr("sftstream.rendering.bounds.MOST_WORK", 1000)
    with pytest.raises(Refused, match="template does too much"):
        encoder.encode(tiny.chat("a" * 2000, "b")["messages"])


def test_time_in_which_the_process_does_not_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftstream.rendering.limits.SECONDS", 0.05)
    with time_limit():
        time.sleep(0.3)  # as a suspended process, it takes no CPU time
    with pytest.raises(RuntimeError, match="did not print a conversation"):
        _compute_for(seconds=30)


def test_a_limit_whose_body_an_interrupt_has_left_ends_no_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sftstream.rendering.limits.SECONDS", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    _enter_alone()
    _compute(seconds=0.3)
    assert signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(RuntimeError, match="did not print a conversation"):
        _compute_for(seconds=30)


def _enter_alone() -> None:
    """Enter a limit, as if an interrupt had prevented its `__exit__`."""
    time_limit().__enter__()


def _compute_for(seconds: float) -> None:
    with time_limit():
        _compute(seconds)


def _compute(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def config(tokenizer: str, path: str, **source: Any) -> DataConfig:
    return tiny.data_config(tokenizer, sources=[{"path": path, **source}])


BOMB = "---\ndataset_info:\n  a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def bad_source(name: str, directory: Path) -> str:
    rows = json.dumps({"messages": tiny.chat("a", "b")["messages"]}) + "\n"
    match name:
        case "script":
            (directory / "data").mkdir()
            (directory / "data/data.py").write_text("raise SystemExit")
            (directory / "data/README.md").write_text("---\nconfigs:\n- config_name: a\n---\n")
        case "bomb":
            (directory / "data").mkdir()
            (directory / "data/train.jsonl").write_text(rows)
            (directory / "data/README.md").write_text(f"{BOMB}---\n")
        case "card":
            (directory / "data").mkdir()
            (directory / "data/train.jsonl").write_text(rows)
            (directory / "data/README.md").write_text("---\nconfigs: 7\ndataset_info: [\n---\n")
        case _:
            return name
    return str(directory / "data")


@pytest.mark.parametrize(
    "name", ["script", "bomb", "card", "~nosuch/x.jsonl", "a\0b.jsonl", "x" * 5000, "s3://", "://", "nope://x/y.jsonl"]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_source_is_one_line_with_its_path(tokenizer: str, tmp_path: Path, name: str, streaming: bool) -> None:
    path = bad_source(name, tmp_path)
    with pytest.raises(ValueError, match=r".") as error:
        Corpus(config(tokenizer, path, streaming=streaming, shuffle=False).sources)
    assert len(str(error.value).splitlines()) == 1
    assert repr(path)[1:-1] in str(error.value) or path in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"x = {'[' * 100_000}", "is nested too deeply"),
        (f"x = {'9' * 5000}", "is not TOML"),
        ("x = '\udcff'", "is not TOML"),
        ("run = 3\n[data]\n", "has no [data] table"),
        ("data = [1]", "has no [data] table"),
        ("[data]\nsources = 7", "the [data] table is not valid"),
        ("#" * (17 << 20), "has more than 16,777,216 bytes"),
    ],
    ids=["deep", "digits", "bytes", "run", "data", "sources", "large"],
)
def test_a_bad_config_is_one_line_with_its_path(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    outcome = run(main, "bench", path)
    assert outcome.exit_code == 1
    (line,) = outcome.stderr.splitlines()
    assert message in line
    assert str(path) in line


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[]", "7", '{"streams": 5}', "{", "\udcff"])
def test_a_bad_state_is_one_line_with_its_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    outcome = run(main, "inspect", path)
    assert outcome.exit_code == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert str(path) in outcome.stderr


@pytest.mark.parametrize("kind", [KeyError, RecursionError, MemoryError, PanicException])
def test_an_unexpected_error_is_one_line_and_debug_shows_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    def broken(_: object) -> None:
        raise kind("first\n\x1b[2Jsecond")

    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setattr(stored, "find_state", broken)
    monkeypatch.delenv("LOGLEVEL", raising=False)
    outcome = run(main, "inspect", tmp_path / "state.json")
    (line,) = outcome.stderr.splitlines()
    assert outcome.exit_code == 1
    assert line.startswith(f"error: inspect {tmp_path}/state.json: {kind.__name__}: ")
    assert "\x1b" not in line
    assert "Traceback (most recent call last)" in run(main, "inspect", tmp_path / "state.json", "--debug").stderr
    monkeypatch.setenv("LOGLEVEL", "DEBUG")
    assert "Traceback (most recent call last)" in run(main, "inspect", tmp_path / "state.json").stderr


def test_control_characters_of_a_tokenizer_are_not_printed(tmp_path: Path) -> None:
    stop = "<|end\x1b[2J\x07|>"
    directory = tiny.save_tokenizer(
        tmp_path / "words", tiny.TEMPLATE.replace("<|eot_id|>", stop.replace("\x1b", "\\x1b"))
    )
    change = {"id": 2000, "content": stop, "special": True, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    changed = changed_tokenizer(directory, tmp_path / "evil", lambda c: c["added_tokens"].append(change | flags))
    outcome = run(main, "template", changed)
    printed = outcome.stdout + outcome.stderr
    assert "\\x1b[2J\\x07" in printed
    assert not [line for line in printed.splitlines() if not line.isprintable()]


@pytest.mark.parametrize("print_content", ["'%s' % m.content", "'{}'.format(m.content)", "'**{}**'.format(m.content)"])
@pytest.mark.parametrize("content", ["5% of 2 * 3", '{"id": 1234567}', "{:9999999}", "%9999999d"])
def test_a_content_with_percent_signs_and_braces_is_printed_by_a_format(print_content: str, content: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ " + print_content + " }}{% endfor %}", {})
    assert content in template.render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "text", ["'%*d' % (10 ** 9, 1)", "'{:{}}'.format(1, 10 ** 9)", "'{0[0]:{0[1]}}'.format([1, 10 ** 9])"]
)
def test_a_format_with_a_width_from_a_value_is_refused(text: str) -> None:
    template = ChatTemplate("{{ " + text + " }}", {})
    with pytest.raises((Refused, ValueError), match="does too much"):
        template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name)])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_is_no_file_in_a_tokenizer_is_named(
    tokenizer: str, tmp_path: Path, name: str, put: Callable[[Path], object]
) -> None:
    directory = changed_tokenizer(tokenizer, tmp_path / "bad", lambda _: None)
    (directory / name).unlink()
    put(directory / name)
    outcome = run(main, "template", directory)
    assert re.fullmatch(
        rf"error: {directory}/{name} is a .*; put a file in its place, or move it away\n", outcome.stderr
    )


@pytest.mark.parametrize("words", [("template", "{tokenizer}", "/dev/zero"), ("inspect", "/dev/zero")])
def test_a_device_without_end_is_refused_at_once(tokenizer: str, words: tuple[str, ...]) -> None:
    outcome = run(main, *(word.format(tokenizer=tokenizer) for word in words))
    assert outcome.exit_code == 1
    assert "/dev/zero is a pipe, a socket or a device; put a file in its place" in outcome.stderr


def test_an_error_of_python_itself_is_not_shown_as_one_of_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "find_state", lambda _: list(zip([1], [1, 2], strict=True)))
    outcome = run(main, "inspect", tmp_path)
    assert outcome.stderr == (
        f"error: inspect {tmp_path}: ValueError: zip() argument 2 is longer than argument 1; --debug shows the traceback\n"
    )


@pytest.mark.parametrize(
    "words", [("preview", "--pack", "1000001"), ("preview", "--count", "10001"), ("bench", "--seconds", "3601")]
)
def test_work_that_would_hardly_end_is_refused(words: tuple[str, ...]) -> None:
    outcome = run(main, words[0], "run.toml", *words[1:])
    assert outcome.exit_code == 2
    assert f"Invalid value for '{words[1]}'" in outcome.stderr


def test_no_code_of_a_model_is_run_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(2))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks a person, unless told not to
    outcome = run(main, "init", rows, "--model", tmp_path, "--out", tmp_path / "run.toml")
    assert outcome.exit_code == 1
    assert f"error: model '{tmp_path}' cannot be opened: " in outcome.stderr
    assert not (tmp_path / "ran").exists()
