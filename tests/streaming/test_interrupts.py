"""An interrupt at any instruction, and a second thread at any moment, lose and repeat no pack."""

from __future__ import annotations

import opcode
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny

from sftstream import DataConfig, Pack, PackLoader
from sftstream import loader as loader_module

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = 60
MORE_DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 3000)


RETURN = opcode.opmap["RETURN_VALUE"]


class Interrupt(BaseException):
    """As a signal handler may raise it anywhere."""


@pytest.fixture(scope="module")
def interrupted(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """An indexed and a streamed source, in steps of six packs of three streams."""
    directory = tmp_path_factory.mktemp("interrupted")
    (directory / "shards").mkdir()
    for number in range(3):
        tiny.write_jsonl(directory / "shards" / f"{number}.jsonl", tiny.rows(9, seed=number))
    sources = [
        {"path": tiny.write_jsonl(directory / "rows.jsonl", [*tiny.rows(30), {"text": "?"}]), "weight": 1},
        {"path": str(directory / "shards"), "streaming": True, "shuffle": "shards", "weight": 1},
    ]
    return tiny.data_config(
        tokenizer, sources=sources, streams=3, global_batch=6, capacity=128, overflow="split", window=5
    )


@pytest.fixture(scope="module")
def whole(interrupted: DataConfig) -> list[str]:
    return tiny.digests(PackLoader(interrupted))


@contextmanager
def interrupt_after(instructions: int, within: str = f"{os.sep}sftstream{os.sep}") -> Iterator[None]:
    """Raise `Interrupt` before some instruction of the files of a path, but for a return.

    Python handles signals after calls and on jumps back, and so never between the last instruction of a
    function and its return.
    """
    left = instructions

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if within not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left <= 0 and frame.f_code.co_code[frame.f_lasti] != RETURN:
                sys.settrace(None)
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def _instructions(take: Callable[[], object], within: str) -> int:
    """The number of instructions of the files of a path that a call takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if within not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        take()
    finally:
        sys.settrace(None)
    return count


def _take(loader: PackLoader, by_step: bool) -> list[Pack]:
    return loader.next_step() if by_step else [next(loader)]


def _check(config: DataConfig, whole: list[str], draw: random.Random) -> None:
    loader = PackLoader(config)
    by_step = draw.random() < 0.3
    digests: list[str] = []
    interrupts = 0
    while len(digests) < len(whole):
        state = loader.state_dict()

        if draw.random() < 0.6:
            most = draw.choice([60, 400, 3000, 20000])
            try:
                with interrupt_after(draw.randint(1, most)):
                    packs = _take(loader, by_step)
            except Interrupt:
                interrupts += 1
                assert loader.state_dict() == state
                if draw.random() < 0.3:
                    loader = PackLoader(config, state=state)
                continue
        else:
            packs = _take(loader, by_step)
        digests += tiny.digests(packs)
        assert loader.packs == len(digests)
        if interrupts > 25:
            digests += tiny.digests(loader)
    assert digests == whole


def test_an_interrupt_at_any_instruction_loses_and_repeats_nothing(interrupted: DataConfig, whole: list[str]) -> None:
    print(f"seed {SEED}")
    for number in range(DRAWS // 20):
        _check(interrupted, whole, random.Random(f"{SEED}/{number}"))


@pytest.mark.slow
def test_interrupts_at_thousands_of_instructions(interrupted: DataConfig, whole: list[str]) -> None:
    print(f"seed {SEED}")
    for number in range(1000, 1000 + MORE_DRAWS // 20):
        _check(interrupted, whole, random.Random(f"{SEED}/{number}"))


@pytest.mark.parametrize("by_step", [False, True])
def test_an_interrupt_at_each_instruction_of_the_loader(
    interrupted: DataConfig, whole: list[str], by_step: bool
) -> None:
    within = str(Path(loader_module.__file__))
    start = PackLoader(interrupted)
    tiny.take(start, 6)
    state = start.state_dict()

    counted = PackLoader(interrupted, state=state)
    count = _instructions(lambda: _take(counted, by_step), within)
    assert count > 300
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    for instruction in [*draw.sample(range(1, count), 15), *range(count - 15, count + 1)]:
        loader = PackLoader(interrupted, state=state)
        try:
            with interrupt_after(instruction, within):
                packs = _take(loader, by_step)
        except Interrupt:
            assert loader.state_dict() == state
            packs = _take(loader, by_step)
        assert tiny.digests(packs) == whole[6 : 6 + len(packs)]
        assert loader.packs == 6 + len(packs)


@pytest.mark.parametrize("workers", [0, 2])
def test_alarms_from_a_signal_handler_lose_and_repeat_nothing(
    interrupted: DataConfig, whole: list[str], workers: int, started: tiny.Started
) -> None:
    draw = random.Random(SEED)
    print(f"seed {SEED}")

    def handle(_: int, frame: FrameType | None) -> None:
        if _is_logging(frame):  # an exception would leave the lock of `logging` taken for all later tests
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
        else:
            raise KeyboardInterrupt

    loader = PackLoader(interrupted, workers=workers)
    before = signal.signal(signal.SIGALRM, handle)
    digests: list[str] = []
    try:
        for _ in range(30):
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, 0.05 if workers else 0.01))
                # A loop over the loader stores each pack before Python handles a signal.
                for pack in loader:
                    digests.append(pack.digest())
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # An interrupt may fall between a pack's arrival and its digest: the loader counts that pack.
    given = loader.packs
    rest = tiny.digests(loader)
    assert rest == whole[given:]
    assert _is_subsequence(digests, whole[:given])
    assert given - len(digests) <= 30
    loader.close()
    assert started() == []


def _is_logging(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "logging":
            return True
        frame = frame.f_back
    return False


def _is_subsequence(some: list[str], all_of: list[str]) -> bool:
    rest = iter(all_of)
    return all(digest in rest for digest in some)


def test_a_state_from_another_thread_is_of_some_pack(interrupted: DataConfig, whole: list[str]) -> None:
    loader = PackLoader(interrupted)
    positions = {0: loader.state_dict()}
    states: list[dict[str, Any]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            states.append(loader.state_dict())

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=watch)
    try:
        thread.start()
        for number in range(len(whole)):
            next(loader)
            positions[number + 1] = loader.state_dict()
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(switch)
    assert len(states) > 20
    assert all(state == positions[state["packs"]] for state in states)


def test_a_state_from_another_thread_stands_at_a_border_while_steps_are_taken(interrupted: DataConfig) -> None:
    loader = PackLoader(interrupted)
    states: list[dict[str, Any]] = []
    advance = loader._advance
    loader._advance = lambda before: (states.append(loader.state_dict()), advance(before))[1]  # type: ignore[method-assign, assignment, func-returns-value]
    for _ in range(3):
        loader.next_step()
    assert [state["packs"] for state in states] == [0] * 6 + [6] * 6 + [12] * 6


def test_a_second_thread_cannot_take_packs_at_the_same_time(interrupted: DataConfig, whole: list[str]) -> None:
    loader = PackLoader(interrupted)
    errors: list[str] = []

    def take() -> None:
        try:
            next(loader)
        except RuntimeError as error:
            errors.append(str(error))

    def meanwhile(*arguments: Any) -> Any:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return advance(*arguments)

    advance = loader._advance
    loader._advance = meanwhile  # type: ignore[method-assign]
    digests = tiny.digests(tiny.take(loader, 2))
    loader._advance = advance  # type: ignore[method-assign]
    assert errors == ["another thread is reading a pack of this loader; call next in one thread at a time"] * 2
    assert digests + tiny.digests(loader) == whole


def test_too_many_refusals_leave_the_state_of_the_last_pack_given(tokenizer: str, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [*tiny.rows(120), *[{"text": "?"}] * 30])
    loader = PackLoader(tiny.data_config(tokenizer, path, max_refused=0.05))
    states = [loader.state_dict()]
    with pytest.raises(ValueError, match=r"rows are refused for .*, more than data.max_refused"):
        states.extend(loader.state_dict() for _ in loader)
    assert len(states) > 2
    assert loader.state_dict() == states[-1]
    with pytest.raises(ValueError, match=r"rows are refused for .*, more than data.max_refused"):
        next(loader)
