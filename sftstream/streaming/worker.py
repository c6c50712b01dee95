"""Read logical streams in a worker process. No other file uses StatefulDataLoader."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import msgspec
import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sftstream.config import DataConfig
from sftstream.encoded_stream import EncodedStream, encode_stream
from sftstream.records import Pack
from sftstream.sources import Corpus
from sftstream.state import NO_PAST_ORDERS, PastOrders
from sftstream.streaming.example_reader import SourceCheck
from sftstream.streaming.graph import build_stream
from sftstream.streaming.packer import Packer
from sftstream.streaming.refusals import RowCounts, row_counts
from sftstream.streaming.skip import Skip
from sftstream.tokenization.encoder import ChatEncoder

SECONDS_BETWEEN_LOOKS = 1.0
"""Interval in seconds at which a worker checks whether its parent process still runs."""
EncodedStreams = Mapping[int, EncodedStream]
"""Number of a logical stream -> its `StreamState`, encoded by the worker."""


class Failed(NamedTuple):
    """The message of an error in a worker. A worker returns the message instead of raising the
    error, because a raised error would arrive with a traceback in its message."""

    message: str


class Read(NamedTuple):
    """A pack with the state of its stream after the pack.

    A worker sends the pack and the state together. The worker reads ahead, so a state requested
    later would belong to a later pack.
    """

    pack: Pack
    state: EncodedStream
    counts: tuple[RowCounts, ...]
    """Rows read by the stream, by source."""


class PackStreams(IterableDataset[Read | Failed]):
    """The packs of some logical streams, in the order of the run, read by a single process.

    `start` holds the states of the streams to read. `packs` is the number of the run's next pack.
    """

    def __init__(
        self,
        config: DataConfig,
        corpus: Corpus,
        encoder: ChatEncoder,
        packs: int,
        start: EncodedStreams,
        past: PastOrders = NO_PAST_ORDERS,
    ) -> None:
        super().__init__()
        self._config = config
        self._corpus = corpus
        self._encoder = encoder
        self._packs = packs
        self._start = start
        self._past = past

    def __iter__(self) -> Iterator[Read | Failed]:
        nodes: dict[int, Packer] = {}
        check = SourceCheck(self._corpus, self._encoder, self._config)
        skip = Skip(self._config, self._encoder.tokenizer.vocabulary.pad_id)
        for number in itertools.count(self._packs):
            stream = number % self._config.stream_count
            if stream not in self._start:
                continue
            node = nodes[stream] = nodes.get(stream) or self._open(stream, check)
            try:
                pack = next(node)
            except (ValueError, RuntimeError, OSError) as error:
                yield Failed(str(error))
                return
            yield Read(skip.applied(pack, number), encode_stream(node.state), row_counts(node.state))

    def _open(self, stream: int, check: SourceCheck) -> Packer:
        node = build_stream(self._config, self._corpus, self._encoder, stream, self._past, check)
        node.reset(msgspec.msgpack.decode(self._start[stream].whole))
        return node


class StreamWorker:
    """A process that reads streams ahead; with `prefetch = None`, the calling process reads
    them."""

    def __init__(self, dataset: PackStreams, prefetch: int | None) -> None:
        with warnings.catch_warnings():
            # torchdata 0.11 under torch 2.13
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            self._loader: StatefulDataLoader[Read | Failed] = StatefulDataLoader(
                dataset,
                batch_size=None,
                # One worker per loader: a loader with several workers returns their packs in turn,
                # but the next pack of the run may be of a stream of any worker.
                num_workers=0 if prefetch is None else 1,
                collate_fn=_unchanged,
                prefetch_factor=prefetch,
                worker_init_fn=partial(begin_work, os.getpid()),
                # fork: workers inherit the row index, the tokenizer and the compiled template.
                multiprocessing_context=None if prefetch is None else "fork",
                # Without a generator the loader draws a seed from the global generator.
                generator=torch.Generator(),
            )
        self._packs = iter(self._loader)

    def __next__(self) -> Read:
        read: Read | Failed = next(self._packs)
        if isinstance(read, Failed):
            raise ValueError(read.message)
        return read

    def close(self) -> None:
        """End the worker now, not when the garbage collector deletes this object."""
        del self._packs, self._loader


def _unchanged(read: Read | Failed) -> Read | Failed:
    return read


def begin_work(parent: int, _worker: int = 0) -> None:
    """Begin the work of a process that was forked from the process `parent`.

    The process ends at most a second after `parent`, unless native code stops its threads.
    """
    # A terminal, a scheduler or `timeout` sends its signal to all processes of a run; the trainer
    # needs its loader to finish the step. Only the parent may end a worker.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited by the thread, which waits for it
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    # The garbage collector would write to memory shared with the parent, and so copy it.
    gc.freeze()
    gc.enable()  # a program may disable it during its start


def _exit_with(parent: int) -> None:
    """End this process when its parent process has ended or sends SIGTERM.

    StatefulDataLoader ends the loop of a worker without a parent, but the process would then wait
    forever to send packs: its own copies of the pipes' reading ends keep the pipes open and full.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if received and received.si_pid == parent:
            break
    os._exit(1)
