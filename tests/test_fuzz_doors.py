"""Damaged and hostile inputs at each door end in success or one line, in bounded time and memory.

SFTSTREAM_FUZZ_SECONDS is the time of all doors together, SFTSTREAM_SEED the seed of the inputs; a
failure prints the seed and the number of the input.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import runs
import tiny
import torch
from commands import Outcome, run
from tiny_llama import CONFIG, exported

from checkpoints import RECIPE, CheckpointStore, Recipe, Rows, one_line
from checkpoints.cli.main import main as checkpoints_main
from sftstream import ChatEncoder, DataConfig, Refused
from sftstream.cli.main import main as sftstream_main
from sftstream.records import BrokenRow, Ref
from sftstream.sources import Corpus, CorpusReader, FileSet
from trainer.config_file import load_config
from trainer.llama.hf_config import find_model, read_config
from trainer.llama.model import Llama
from trainer.llama.weights import load_weights
from trainer.report.main import main as report_main
from trainer.run import run as train

SEED = int(os.environ.get("SFTSTREAM_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
DOORS = 7
SECONDS = float(os.environ.get("SFTSTREAM_FUZZ_SECONDS", "3")) / DOORS
LONGEST, MOST_MEMORY = 60, 4 << 30
"""Limits of an input: seconds, and further bytes of address space."""

T = TypeVar("T")


class Hang(BaseException):
    """An input that takes longer than `LONGEST` seconds."""


@contextmanager
def limited() -> Iterator[None]:
    """Bound time and memory of the process while an input is read."""

    def hang(*_: object) -> None:
        raise Hang

    watch = threading.Timer(3 * LONGEST, os.kill, (os.getpid(), signal.SIGPROF))
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, before[1]))
    # Not SIGALRM: renders set an alarm of their own.
    earlier = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    watch.start()  # a process that waits, as for a writer of a pipe, has no processor time
    try:
        yield
    finally:
        watch.cancel()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(
    door: str,
    directory: Path,
    make: Callable[[random.Random, Path], T],
    use: Callable[[T], None],
    restore: Callable[[T], bool] = lambda _: False,
) -> None:
    """Make inputs and use them until the door's time is over, at least five.

    An input that `restore` restores after an error, with the result True, must then be usable: "restore
    the file" is the remedy of such errors.
    """
    end = time.monotonic() + SECONDS
    for number in itertools.count():
        if number >= 5 and time.monotonic() > end:
            break
        place = directory / str(number)
        place.mkdir()
        made = make(random.Random(f"{SEED}/{door}/{number}"), place)
        context = f"input {number} of the door {door!r} with SFTSTREAM_SEED={SEED}"
        try:
            with limited():
                use(made)
        except (ValueError, RuntimeError) as error:  # the types of a door; CheckpointError is a RuntimeError
            require_line(error, context)
            if restore(made):
                use(made)
        except BaseException as error:
            raise AssertionError(f"{context}: {type(error).__name__}: {error}") from error
        _remove(place)


def restored_from(original: Path) -> Callable[[Path], bool]:
    """Return a function that puts the files of `original` in place of a damaged copy."""

    def restore(copied: Path) -> bool:
        _remove(copied)
        shutil.copytree(original, copied)
        return True

    return restore


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def require_line(error: Exception, context: str) -> None:
    """Fail unless the error is of a door, with one printable line."""
    assert not isinstance(error, RecursionError | NotImplementedError | UnicodeError), context
    assert len(str(error).splitlines()) == 1, f"{context}: {error}"
    assert str(error).isprintable(), f"{context}: {error!r}"


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES = [
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**32, 2**63, 10**30, 0.5, -1e300, "", "a", "\0", "\x1b[2J", "x" * 3000),
    *("~nosuch/x", "../../outside", "/", "é\u202e", [], {}, [1], {"a": 1}, [[]], deep(50), deep(200), "1e400"),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container inside a value with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed(value: Any, draw: random.Random) -> Any:
    """Return a copy with one to three parts replaced, deleted or swapped."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        found = list(places(value))
        if not found or draw.random() < 0.02:
            return draw.choice(VALUES)
        container, key = draw.choice(found[: draw.choice([8, 60, len(found)])])
        match draw.randrange(3):
            case 0:
                container[key] = copy.deepcopy(draw.choice(VALUES))
            case 1:
                del container[key]
            case _:
                other, other_key = draw.choice(found[:60])
                container[key] = copy.deepcopy(other[other_key]) if other_key in keys(other) else None
    return value


def keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to four places changed, cut, doubled or filled."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        length = draw.choice([1, 1, 2, 8, 100, 3000])
        match draw.randrange(5):
            case 0:
                data[at : at + length] = draw.randbytes(length)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = draw.choice([b"\0", b"\xff\xfe", b"[" * 2000, b"{", b"}", b'"', b"9" * 5000, b"\x1b[2J"])
            case _:
                del data[at:]
    return bytes(data)


def replaced(path: Path, draw: random.Random) -> None:
    """Put what is no file in the place of a file."""
    path.unlink()
    match draw.randrange(4):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(path.name)
        case _:
            path.symlink_to("/dev/zero")


def changed_file(path: Path, draw: random.Random) -> None:
    """Damage a file: a JSON file most often by its values, any other by its bytes."""
    if draw.random() < 0.2:
        replaced(path, draw)
    elif path.suffix == ".json" and draw.random() < 0.75:
        value = changed(json.loads(path.read_text()), draw)
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(damaged(path.read_bytes(), draw))


def changed_copy(original: Path, copied: Path, draw: random.Random) -> Path:
    shutil.copytree(original, copied)
    files = sorted(path for path in copied.rglob("*") if path.is_file())
    changed_file(draw.choice(files), draw)
    return copied


def test_a_config(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, "rows.jsonl")

    def make(draw: random.Random, place: Path) -> Path:
        tables = changed(config, draw)
        text = ""
        if isinstance(tables, dict):
            with_values = ((name, table) for name, table in tables.items() if table is not None)
            try:
                text = "".join(f"{name} = {runs.toml(table)}\n" for name, table in with_values)
            except RecursionError:  # the writer of this test follows values less deeply than the values are nested
                text = "run = " + "[" * 9000
        content = text.encode(errors="replace")
        (place / "run.toml").write_bytes(content if draw.random() < 0.6 else damaged(content, draw))
        return place / "run.toml"

    fuzz("config", tmp_path, make, lambda path: load_config(path) and None)


def test_a_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    def use(directory: Path) -> None:
        encoder = ChatEncoder(str(directory))
        try:
            encoder.encode(tiny.chat("what is the sum", "seven", "é", "never")["messages"])
        except Refused:
            return

    original = Path(tokenizer)
    fuzz(
        "tokenizer",
        tmp_path,
        lambda draw, place: changed_copy(original, place / "t", draw),
        use,
        restored_from(original),
    )


FRAGMENTS = [
    *("{{ messages }}", "{{ messages[0].content * 999999999 }}", "{% break %}", "{{ raise_exception('x') }}"),
    *("{% for a in range(90000) %}", "{% endfor %}", "{{ x.y.z }}", "{{ messages | tojson(indent=9) }}", "{{ 1 / 0 }}"),
    *("{% macro f(a) %}{{ f(a) }}{% endmacro %}{{ f(1) }}", "{% set n = namespace(s='a') %}", "{{ loop }}", "{{ ((("),
    *("{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "{{ ''.__class__ }}", "{{ 9 ** 9 ** 9 }}"),
    *("{% generation %}", "{% endgeneration %}", "{{ strftime_now('%d') }}", "{{ self }}", "{% include 'a' %}"),
    *("{{ messages | map('x') | list }}", "{% if messages %}", "{% endif %}", "{{ cycler }}", "{{ '%s' % messages }}"),
    *("{{ dict(a=1) | random }}", "{% set a %}", "{% endset %}", "{{ range(10**9) | list }}", "{{ joiner() }}"),
]


def test_a_template(tmp_path: Path, tokenizer: str) -> None:
    lines = re.split(r"(?<=%})|(?<=}})", tiny.TEMPLATE)

    def make(draw: random.Random, place: Path) -> Path:
        parts = list(lines)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(parts))
            match draw.randrange(3):
                case 0:
                    parts.insert(at, draw.choice(FRAGMENTS) * draw.choice([1, 1, 1, 30]))
                case 1:
                    del parts[at]
                case _:
                    parts[at] = damaged(parts[at].encode(), draw).decode(errors="replace")
        (place / "chat.jinja").write_text("".join(parts), encoding="utf-8")
        return place / "chat.jinja"

    def use(path: Path) -> None:
        encoder = ChatEncoder(tokenizer, str(path))
        try:
            encoder.encode(tiny.chat("what is the sum", "seven", "é", "never")["messages"])
        except Refused:
            return

    fuzz("template", tmp_path, make, use)


def draw_place(draw: random.Random) -> str:
    words = ["~nosuch/", "a\0b", "s3://", "x" * 300, "*", "**", "[", "\x1b", "://", "file://", "..", "%", "hf://a", "é"]
    return "".join(draw.choices(words, k=draw.randint(1, 3))) + ".jsonl"


def draw_file(draw: random.Random, place: Path, rows: list[tiny.Row]) -> Path:
    """Write a damaged file of rows, or a directory with a damaged dataset card."""
    kind = draw.choice(["jsonl", "json", "parquet", "csv", "card"])
    path = place / f"rows.{kind}"
    if kind == "card":
        path.mkdir()
        tiny.write_jsonl(path / "train.jsonl", rows)
        card = (
            b"---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\ndataset_info: {features: [{name: a}]}\n---\n"
        )
        (path / "README.md").write_bytes(damaged(card, draw))
        return path
    if kind == "parquet":
        tiny.write_parquet(path, rows)
    else:
        text = {"jsonl": tiny.json_lines(rows).decode(), "csv": "prompt,response\na,b\nc,d\n"}
        path.write_text(text.get(kind) or json.dumps(changed(rows, draw)))
    if kind != "json":
        shutil.copy(path, place / f"whole.{kind}")
    path.write_bytes(damaged(path.read_bytes(), draw))
    suffix = draw.choice([kind, kind, "arrow", "jsonl", "tsv", "jsonl.gz", "x"])
    return path.rename(path.with_name(f"rows.{suffix}"))


def test_a_source(tmp_path: Path, tokenizer: str) -> None:
    rows = tiny.rows(12)

    def make(draw: random.Random, place: Path) -> DataConfig:
        location = draw_place(draw) if draw.random() < 0.2 else str(draw_file(draw, place, rows))
        source = {"path": location, "streaming": draw.random() < 0.4, "shuffle": False}
        return tiny.data_config(tokenizer, sources=[source])

    def use(config: DataConfig) -> None:
        corpus = Corpus(config.sources)
        reader = CorpusReader(corpus)
        source = reader.sources[0]
        for row in range(len(source) if isinstance(source, FileSet) else 20):
            try:
                if not isinstance(source, FileSet) and not source.reaches(Ref(0, row, 0)):
                    break
                reader.read(Ref(0, row, 0))
            except BrokenRow:
                continue

    def restore(config: DataConfig) -> bool:
        path = Path(config.sources[0].path)
        whole = path.with_name(f"whole{path.suffix}")
        is_kept = path.is_relative_to(tmp_path) and whole.exists()
        if is_kept:
            shutil.copy(whole, path)
        return is_kept

    fuzz("source", tmp_path, make, use, restore)


def test_a_model_directory(tmp_path: Path) -> None:
    original = exported(tmp_path / "model")

    def use(directory: Path) -> None:
        try:
            load(directory)
        except ValueError as error:
            raise ValueError(one_line(error)) from error  # as the command prints errors

    def load(directory: Path) -> None:
        config = read_config(find_model(str(directory)))
        if all(getattr(config, name) <= 4 * getattr(CONFIG, name) for name in ("hidden_size", "num_hidden_layers")):
            with torch.device("meta"):
                small = sum(parameter.numel() for parameter in Llama(config).parameters()) < 10**7
            if small:
                load_weights(Llama(config), directory)

    (tmp_path / "inputs").mkdir()
    fuzz(
        "model",
        tmp_path / "inputs",
        lambda draw, place: changed_copy(original, place / "m", draw),
        use,
        restored_from(original),
    )


def test_a_checkpoint(tmp_path: Path) -> None:
    recipe = Recipe({"w": [Rows("w", 0, 6)]}, {"config.json": b"{}"}).builtins()
    with CheckpointStore(tmp_path / "root") as store:
        store.save(1, {"w": torch.arange(12.0).view(6, 2)}, {RECIPE: recipe, "deep": deep(40), "text": "x\x1b"})

    def use(root: Path) -> None:
        errors = []
        for words in (["list"], ["verify"], ["inspect"], ["export", "--last"]):
            target = next(root.glob("step-*"), root) if words[0] == "inspect" else root
            rest = [root.parent / "out", *words[1:]] if words[0] == "export" else words[1:]
            outcome = run(checkpoints_main, words[0], target, *rest)
            errors += require_outcome(outcome, words)
            assert msgspec.json.encode(outcome.stdout)
        _remove(root.parent / "out")
        if errors:
            raise ValueError(errors[0])

    (tmp_path / "inputs").mkdir()
    original = tmp_path / "root"
    make = partial(changed_copy, original)
    fuzz("checkpoint", tmp_path / "inputs", lambda draw, place: make(place / "c", draw), use, restored_from(original))


def require_outcome(outcome: Outcome, words: Sequence[object]) -> list[str]:
    """Check the output of a command; return the lines of its error."""
    assert outcome.exit_code in (0, 1), (words, outcome)
    assert (outcome.stdout + outcome.stderr).replace("\n", "").replace("\t", "").isprintable(), outcome
    lines = [line for line in outcome.stderr.splitlines() if line]
    assert len(lines) <= 1, (words, outcome.stderr)
    assert "shows the traceback" not in outcome.stderr, (words, outcome.stderr)
    if outcome.exit_code == 0:
        return []
    return lines or [outcome.stdout.splitlines()[-1]]


def test_a_run(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = runs.run_config(tokenizer, runs.sources(tmp_path, 30), run={"steps": 4})
    path = tmp_path / "run.toml"
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    train(load_config(path))
    whole = tmp_path / "runs/run"
    for name in ("checkpoints", "export", "tensorboard"):
        shutil.rmtree(whole / name)
    for name in ("report.html", ".lock"):
        (whole / name).unlink()

    def use(place: Path) -> None:
        verbs: list[tuple[Any, list[object]]] = [
            (sftstream_main, ["audit", place]),
            (sftstream_main, ["audit", whole, place]),
            (sftstream_main, ["trace", place, "--step", "3"]),
            (sftstream_main, ["find", place, "--source", "0", "--row", "4"]),
            (report_main, [place]),
            (report_main, [place, whole, "--json"]),
        ]
        main, words = verbs[number[0] % len(verbs)]
        errors = require_outcome(run(main, *words), words)
        if errors:
            raise ValueError(errors[0])

    def make(draw: random.Random, place: Path) -> Path:
        number[0] = draw.randrange(10**6)
        return changed_copy(whole, place / "r", draw)

    number = [0]
    (tmp_path / "inputs").mkdir()
    fuzz("run", tmp_path / "inputs", make, use, restored_from(whole))


def test_the_doors_share_the_time() -> None:
    tests = [name for name, value in globals().items() if name.startswith("test_a_") and callable(value)]
    assert len(tests) == DOORS


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), ValueError("two\nlines"), ValueError("\x1b"), Hang()])
def test_the_fuzzer_fails_on_what_is_no_door(tmp_path: Path, error: BaseException) -> None:
    def use(_: object) -> None:
        raise error

    with pytest.raises(AssertionError, match=rf"input 0 of the door 'x' with SFTSTREAM_SEED={SEED}"):
        fuzz("x", tmp_path, lambda draw, place: place, use)
