"""Logical streams -> the packs of one shard. The only file that knows workers and StatefulDataLoader."""

from __future__ import annotations

import gc
import itertools
import signal
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from sftstream.config import DataConfig
from sftstream.identity import accepted_changes, identify
from sftstream.rebase import rebase
from sftstream.records import Pack, Refusal
from sftstream.sources import Corpus
from sftstream.state import DataState, StreamState
from sftstream.streaming.assignment import WHOLE, PackAssignment, Shard
from sftstream.streaming.order import draws_of_source
from sftstream.streaming.packing import Packer, build_pack
from sftstream.streaming.stream import build_stream
from sftstream.tokenization.encoder import ChatEncoder

MIN_ROWS_TO_JUDGE = 100
"""Rows read before their refused share is held against `max_refused`."""


class Failed(NamedTuple):
    """An error on its way out of a worker, which would otherwise arrive wrapped in the worker's traceback."""

    message: str


class LoaderPosition(NamedTuple):
    """A place in the packs, from which `state` makes a state: that takes milliseconds and is seldom asked for."""

    start: DataState
    packs: int
    moved: Mapping[str, bytes]
    """The streams that gave packs since the start, encoded."""

    @property
    def state(self) -> DataState:
        """Where a run goes on from here."""
        moved = {int(stream): msgspec.msgpack.decode(state, type=StreamState) for stream, state in self.moved.items()}
        return msgspec.structs.replace(self.start, packs=self.packs, streams=self.start.streams | moved)

    @property
    def run(self) -> DataState:
        """The state without its streams: identity, packs and history."""
        return msgspec.structs.replace(self.start, packs=self.packs, streams={})

    def encoded_streams(self) -> dict[int, bytes]:
        """Return each logical stream's StreamState as MessagePack, in the order of `start`."""
        return {
            number: self.moved.get(str(number)) or msgspec.msgpack.encode(stream)
            for number, stream in self.start.streams.items()
        }


class PackStreams(IterableDataset[Pack | Failed]):
    """Some of a shard's streams, as one process reads them: their packs in the order of the run."""

    def __init__(
        self, config: DataConfig, corpus: Corpus, encoder: ChatEncoder, start: DataState, streams: Collection[int]
    ) -> None:
        super().__init__()
        self._config = config
        self._corpus = corpus
        self._encoder = encoder
        self._start = start
        self._streams = streams
        self._moved: dict[str, StreamState] = {}
        self._states: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[Pack | Failed]:
        nodes: dict[int, Packer] = {}
        for number in itertools.count(self._start.packs):
            stream = number % self._config.streams
            if stream not in self._streams:
                continue
            node = nodes[stream] = nodes.get(stream) or self._open(stream)
            try:
                pack = next(node)
            except (ValueError, RuntimeError, OSError) as error:
                yield Failed(str(error))
                return
            self._moved[str(stream)] = node.state
            yield pack

    def state_dict(self) -> dict[str, bytes]:
        """The streams that gave a pack, encoded: a worker is asked with each pack, a loader without workers seldom."""
        # Bytes of a frozen record: cheap to send, and only the stream that moved differs from what was sent before.
        self._states |= {stream: msgspec.msgpack.encode(state) for stream, state in self._moved.items()}
        self._moved.clear()
        return dict(self._states)

    def load_state_dict(self, _state: dict[str, bytes]) -> None:
        """StatefulDataLoader asks for this method; it is never the way in."""
        raise RuntimeError("resume by constructing PackLoader(config, state=...)")

    def _open(self, stream: int) -> Packer:
        node = build_stream(self._config, self._corpus, self._encoder, stream)
        node.reset(msgspec.to_builtins(self._start.streams[stream]))
        return node


class Reader:
    """One process that reads some streams ahead, or this process where there are no workers."""

    def __init__(self, dataset: PackStreams, prefetch: int | None) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
            self._loader: StatefulDataLoader[Pack | Failed] = StatefulDataLoader(
                dataset,
                batch_size=None,
                # One worker each: a loader of several would insist on taking turns, whoever's stream is next.
                num_workers=0 if prefetch is None else 1,
                collate_fn=_as_is,
                prefetch_factor=prefetch,
                worker_init_fn=_begin_work,
                # fork: workers inherit the row index, the tokenizer and the compiled template.
                multiprocessing_context=None if prefetch is None else "fork",
                generator=torch.Generator(),  # else it draws a seed from the global generator
                snapshot_every_n_steps=1,
            )
        self._in_process = prefetch is None
        self._packs = iter(self._loader)
        self._has_given = False

    def __next__(self) -> Pack:
        pack: Pack | Failed = next(self._packs)
        if isinstance(pack, Failed):
            raise ValueError(pack.message)
        self._has_given = True
        return pack

    def close(self) -> None:
        """End the worker. Not left to the collector: an exception on its way up would keep it."""
        del self._packs, self._loader

    def states(self) -> dict[str, bytes]:
        """The streams' states as of the last pack given, from StatefulDataLoader's private layout (torchdata 0.11)."""
        if not self._has_given:
            return {}
        snapshot = self._loader.state_dict()
        if not self._in_process:
            (snapshot,) = snapshot["_snapshot"]["_worker_snapshots"].values()
        states: dict[str, bytes] = snapshot["dataset_state"]
        return states


class PackLoader:
    """The packs of one shard, in order, from the beginning or from a state. It is its own iterator.

    `workers` processes load ahead (`config.workers` by default; 0 loads in this process). `state` is a state dict of this
    class, of another topology too; the shards' state dicts are put together by `merge`. A finite stream ends at a step's
    border; its dry streams give empty packs until then. Several shards can end at different steps.

    Any number of shards and workers gives the same packs. Where they do not divide streams and steps evenly, shards have
    different numbers of packs in a step, and a state can be taken at a step's border only.

    Raises ValueError where the config cannot be read by this topology, or where the state is of other data.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        shard: Shard = WHOLE,
        workers: int | None = None,
        state: Mapping[str, Any] | DataState | None = None,
    ) -> None:
        self.config = config
        self.shard = shard
        self.workers = config.workers if workers is None else workers
        _check_topology(self.shard, self.workers)
        self._assignment = PackAssignment(config.streams, config.global_batch, shard.count, max(self.workers, 1))
        saved = None if state is None else DataState.parse(state)
        self.corpus = Corpus(config.sources)
        self.encoder = _open_encoder(config, saved)
        self._start = self._start_from(saved)
        self._exhausted = {number for number, stream in self._start.streams.items() if stream.exhausted}
        streams = self._start.streams.values()
        self._rows = sum(stream.conversations for stream in streams)
        self._refused = sum((Counter(stream.refused) for stream in streams), Counter[str]())
        self._at = self._start.packs
        self._readers: dict[int, Reader] = {}

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Pack:
        if self.exhausted and self._at_border:
            self.close()
            raise StopIteration
        number = self._next
        pack = self._read(number % self.config.streams)
        if pack.exhausted:
            self._exhausted.add(number % self.config.streams)
        self._at = number + 1
        self._count(pack)
        return pack

    def next_step(self) -> list[Pack]:
        """This shard's packs of the run's next step, filled up with empty ones to the number that every shard runs.

        Once its own streams have run dry all are empty, so that it can take part in the steps of shards that end later.
        """
        step, unfinished = divmod(self.packs, self.config.global_batch)
        assert not unfinished, "a step is begun by next_step or by next, not by both"
        wanted = self._assignment.micro_batches(step)
        own = 0 if self.exhausted else self._assignment.step(step).count(self.shard.index)
        packs = [next(self) for _ in range(own)]
        self._at = (step + 1) * self.config.global_batch
        if self.exhausted:
            self.close()
        return packs + [self._empty() for _ in range(wanted - own)]

    @property
    def packs(self) -> int:
        """Packs of the whole run consumed so far, if the other shards stand where this one does.

        Raises ValueError inside a step that the shards do not share evenly.
        """
        if self._at_border:
            return -(-self._at // self.config.global_batch) * self.config.global_batch
        if self._assignment.even:
            return self._next - self.shard.index
        raise ValueError(
            f"{self.shard.count} shards do not share a step of {self.config.global_batch} packs evenly; "
            "take the state at its border"
        )

    @property
    def total_rows(self) -> int | None:
        """Rows that all epochs draw; None where there is no end, or a source is streamed and cannot say."""
        epochs, sizes = self.config.epochs, [size for size in self.corpus.sizes if size is not None]
        if epochs is None or len(sizes) < len(self.config.sources):
            return None
        return sum(draws_of_source(size, c.repeat, epochs) for size, c in zip(sizes, self.config.sources, strict=True))

    @property
    def exhausted(self) -> bool:
        """All streams of this shard have run dry."""
        return len(self._exhausted) == len(self._start.streams)

    @property
    def state(self) -> DataState:
        """Where this shard stands after the last pack that was taken, whatever was loaded ahead."""
        return self.position().state

    def position(self) -> LoaderPosition:
        """The same place, kept for later; raises ValueError inside a step that the shards do not share evenly."""
        return self._position_at(self.packs)

    def state_dict(self) -> dict[str, Any]:
        """`state` as plain JSON-able values."""
        return self.state.builtins()

    def load_state_dict(self, _state: Mapping[str, Any]) -> None:
        """There is one way in, so that nothing can have been read before it."""
        raise RuntimeError(
            "resume by constructing PackLoader(config, state=...): a loader that has begun cannot go back"
        )

    def locate_row(self, refusal: Refusal) -> str:
        """Where an editor finds a refused row."""
        return self.corpus.locate_row(refusal.source, refusal.row)

    def close(self) -> None:
        """Stop the workers. The state stays; the next pack starts them again."""
        if self._readers:
            # Not `state`: a loader may be closed inside a step, where shards have no common position.
            self._start = self._position_at(self._at).state
            for reader in self._readers.values():
                reader.close()
            self._readers = {}

    @property
    def _next(self) -> int:
        """The number of this shard's next pack."""
        return self._assignment.next_pack(self.shard.index, self._at)

    @property
    def _at_border(self) -> bool:
        """This shard has no pack left in the step that it is in."""
        batch = self.config.global_batch
        return self._at % batch == 0 or self._next // batch > self._at // batch

    def _position_at(self, packs: int) -> LoaderPosition:
        moved = {stream: state for reader in self._readers.values() for stream, state in reader.states().items()}
        return LoaderPosition(self._start, packs, moved)

    def _read(self, stream: int) -> Pack:
        try:
            if not self._readers:
                # Those that have a stream: one without would look for its next pack for ever.
                owned = self._assignment.streams_of(self.shard.index)
                self._readers = {worker: self._open(worker) for worker in {self._assignment.worker(s) for s in owned}}
            return next(self._readers[self._assignment.worker(stream)])
        except BaseException:
            # StatefulDataLoader would go on without the worker that failed: in another order, or to a false end.
            self.close()
            raise

    def _open(self, worker: int) -> Reader:
        streams = frozenset(
            s for s in self._assignment.streams_of(self.shard.index) if self._assignment.worker(s) == worker
        )
        dataset = PackStreams(self.config, self.corpus, self.encoder, self._start, streams)
        return Reader(dataset, self.config.prefetch if self.workers else None)

    def _count(self, pack: Pack) -> None:
        """Stops a run that would train on the wrong thing: too many of its rows are not what it was made for."""
        self._rows += pack.conversations
        self._refused.update(refusal.reason for refusal in pack.refused)
        refused = self._refused.total()
        rows = self._rows + refused
        if rows >= MIN_ROWS_TO_JUDGE and refused > self.config.max_refused * rows:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self._refused.most_common())
            raise ValueError(
                f"{refused:,} of {rows:,} rows were refused, more than data.max_refused = {self.config.max_refused} "
                f"({reasons}); mend the data, or raise it"
            )

    def _empty(self) -> Pack:
        return build_pack((), (), self.config.capacity, self.encoder.tokenizer.vocabulary.pad_id, exhausted=True)

    def _start_from(self, saved: DataState | None) -> DataState:
        identity = identify(self.config, self.corpus, self.encoder)
        owned = self._assignment.streams_of(self.shard.index)
        if saved is None:
            return DataState(identity=identity, packs=0, streams={stream: self._fresh(stream) for stream in owned})
        if changed := accepted_changes(saved.identity, identity, self.config.accept_changed):
            saved = rebase(saved, identity, self.config, self.corpus, self.encoder, changed)
        if missing := [stream for stream in owned if stream not in saved.streams]:
            raise ValueError(
                f"the state lacks {len(missing)} streams of this shard, stream {missing[0]} the first; "
                "merge the states of all shards"
            )
        shared = self._assignment.even and saved.packs % self.shard.count == 0
        if self.shard.count > 1 and saved.packs % self.config.global_batch and not shared:
            raise ValueError(
                f"the state stands at pack {saved.packs}, inside a step that {self.shard.count} shards cannot share evenly; "
                "take it at a step's border"
            )
        return msgspec.structs.replace(saved, streams={stream: saved.streams[stream] for stream in owned})

    def _fresh(self, stream: int) -> StreamState:
        node = build_stream(self.config, self.corpus, self.encoder, stream)
        node.reset()
        return node.state


def _open_encoder(config: DataConfig, saved: DataState | None) -> ChatEncoder:
    """A day that the config does not name is the one on which the stream first started."""
    tokenizer = config.tokenizer
    date = tokenizer.date or (saved.identity.date if saved else None)
    with _uncollected():
        return ChatEncoder(tokenizer.path, tokenizer.template, date=date, policy=config, backend=tokenizer.backend)


@contextmanager
def _uncollected() -> Iterator[None]:
    """What is made here stays: a collector would look through all of the process several times, a tenth of a second in all."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_topology(shard: Shard, workers: int) -> None:
    if not 0 <= shard.index < shard.count:
        raise ValueError(f"shard {shard.index} of {shard.count} does not exist; the index counts from 0")
    if workers < 0:
        raise ValueError(f"workers = {workers} must be 0 (load in this process) or more")


def _as_is(pack: Pack | Failed) -> Pack | Failed:
    return pack


def _begin_work(_worker: int) -> None:
    # A collection would write to what is shared with the parent, and so copy it.
    gc.freeze()
    # Ctrl-C reaches the whole process group; the trainer finishes its step and needs its loader for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
