"""Signals inside a block are handled after the block, and every handler is installed again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sftstream.streaming.deferred_signals import deferred_signals

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupt(Exception):
    pass


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals handled so far; a handler of SIGUSR2 raises as well."""
    calls: list[int] = []

    def handle(number: int, _: object) -> None:
        calls.append(number)
        if number == signal.SIGUSR2:
            raise Interrupt

    before = {number: signal.signal(number, handle) for number in NUMBERS}
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_inside_the_block_is_handled_after_it(handled: list[int]) -> None:
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert handled == []
    assert handled == [signal.SIGUSR1]


def test_a_handler_that_raises_does_so_after_the_block_is_complete(handled: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in NUMBERS]

    def run() -> None:
        with deferred_signals():
            os.kill(os.getpid(), signal.SIGUSR2)
            handled.append(0)

    with pytest.raises(Interrupt):
        run()
    assert handled == [0, signal.SIGUSR2]
    assert [signal.getsignal(number) for number in NUMBERS] == handlers


def test_an_error_inside_the_block_restores_the_handlers(handled: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(ValueError, match="inside"), deferred_signals():
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in NUMBERS] == handlers


def test_another_thread_leaves_the_handlers_as_they_are(handled: list[int]) -> None:
    seen: list[bool] = []

    def look() -> None:
        before = signal.getsignal(signal.SIGUSR1)
        with deferred_signals():
            seen.append(signal.getsignal(signal.SIGUSR1) is before)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [True]
