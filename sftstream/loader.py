"""Logical streams -> the packs of one shard. The only file that knows workers and StatefulDataLoader."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from sftstream.config import DataConfig
from sftstream.encoder import ChatEncoder
from sftstream.identity import identify, require_equal
from sftstream.packing import Packer, build_pack
from sftstream.records import Pack, Refusal
from sftstream.sources import Corpus
from sftstream.state import DataState, StreamState
from sftstream.stream import Stages, build_stream


@dataclass(frozen=True)
class Shard:
    """One data-parallel coordinate: number `index` of `count`."""

    index: int
    count: int


WHOLE = Shard(0, 1)


MIN_ROWS_TO_JUDGE = 100
"""Rows read before their refused share is held against `max_refused`."""


class Failed(NamedTuple):
    """An error on its way out of a worker, which would otherwise arrive wrapped in the worker's traceback."""

    message: str


class PackStreams(IterableDataset[Pack | Failed]):
    """The streams of one shard; in a worker, its share of them.

    Pack `g` of the run comes from stream `g % streams`. Shard `r` of `R` takes `g = r (mod R)`, its worker `w` of `W` every
    `W`-th of those. As `R * W` divides the streams, each stream is read in one place, and neither number enters the order.
    """

    def __init__(self, config: DataConfig, stages: Stages, shard: Shard, start: DataState) -> None:
        super().__init__()
        self._config = config
        self._stages = stages
        self._shard = shard
        self._start = start
        self._states: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[Pack | Failed]:
        worker = get_worker_info()  # here and not in __init__, which runs in the main process
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        streams, count = self._config.streams, self._shard.count
        nodes: dict[int, Packer] = {}
        for ordinal in itertools.count(self._start.packs + self._shard.index + number * count, count * workers):
            stream = ordinal % streams
            node = nodes[stream] = nodes.get(stream) or self._open(stream)
            try:
                pack = next(node)
            except (ValueError, RuntimeError, OSError) as error:
                yield Failed(str(error))
                return
            # Bytes of a frozen record: cheap to send, and only the stream that moved differs from what was sent before.
            self._states[str(stream)] = msgspec.msgpack.encode(node.state)
            yield pack

    def state_dict(self) -> dict[str, bytes]:
        """The streams that gave a pack, encoded."""
        return dict(self._states)

    def load_state_dict(self, _state: dict[str, bytes]) -> None:
        """StatefulDataLoader asks for this method; it is never the way in."""
        raise RuntimeError("resume by constructing PackLoader(config, state=...)")

    def _open(self, stream: int) -> Packer:
        node = build_stream(self._config, self._stages, stream)
        node.reset(msgspec.to_builtins(self._start.streams[stream]))
        return node


class PackLoader:
    """The packs of one shard, in order, from the beginning or from a state. It is its own iterator.

    `workers` processes load ahead (`config.workers` by default; 0 loads in this process). `state` is a state dict of this
    class, of another topology too; the shards' state dicts are put together by `merge`. A finite stream ends at a step's
    border; its dry streams give empty packs until then. Several shards can end at different steps.

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
        _check_topology(config, self.shard, self.workers)
        saved = None if state is None else DataState.parse(state)
        self.corpus = Corpus(config.sources)
        self.encoder = _open_encoder(config, saved)
        self._stages = Stages(self.corpus, self.encoder)
        self._start = self._start_from(saved)
        self._dry = {number for number, stream in self._start.streams.items() if stream.dry}
        streams = self._start.streams.values()
        self._rows = sum(stream.conversations for stream in streams)
        self._refused = sum((Counter(stream.refused) for stream in streams), Counter[str]())
        self._given = 0
        self._loader: StatefulDataLoader[Pack | Failed] | None = None
        self._packs: Iterator[Pack | Failed] | None = None

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Pack:
        if self._finished:
            self.close()
            raise StopIteration
        pack = self._load()
        if pack.last:
            self._dry.add((self.packs + self.shard.index) % self.config.streams)
        self._given += 1
        self._count(pack)
        return pack

    def next_step(self) -> list[Pack]:
        """This shard's packs of the run's next step, `global_batch / shards` of them.

        Once its own streams have run dry they are empty, so that it can take part in the steps of shards that end later.
        """
        count = self.config.global_batch // self.shard.count
        if self._finished:
            self.close()
            return [self._empty() for _ in range(count)]
        return [next(self) for _ in range(count)]

    @property
    def packs(self) -> int:
        """Packs of the whole run consumed so far, if all shards have taken as many as this one."""
        return self._start.packs + self._given * self.shard.count

    @property
    def exhausted(self) -> bool:
        """All streams of this shard have run dry."""
        return len(self._dry) == len(self._start.streams)

    @property
    def state(self) -> DataState:
        """Where this shard stands after the last pack that was taken, whatever was loaded ahead."""
        streams = self._start.streams | {
            int(stream): msgspec.msgpack.decode(state, type=StreamState) for stream, state in self._snapshot().items()
        }
        return msgspec.structs.replace(self._start, packs=self.packs, streams=streams)

    def state_dict(self) -> dict[str, Any]:
        """`state` as plain JSON-able values."""
        return self.state.builtins()

    def load_state_dict(self, _state: Mapping[str, Any]) -> None:
        """There is one way in, so that nothing can have been read before it."""
        raise RuntimeError(
            "resume by constructing PackLoader(config, state=...): a loader that has begun cannot go back"
        )

    def place(self, refusal: Refusal) -> str:
        """Where an editor finds a refused row."""
        return self.corpus.place(refusal.source, refusal.row)

    def close(self) -> None:
        """Stop the workers. The state stays; the next pack starts them again."""
        if self._packs is not None:
            self._start, self._given = self.state, 0
            self._packs = self._loader = None

    @property
    def _finished(self) -> bool:
        return self.exhausted and self.packs % self.config.global_batch == 0

    def _load(self) -> Pack:
        if self._packs is None:
            self._packs = self._open()
        try:
            pack = next(self._packs)
            if isinstance(pack, Failed):
                raise ValueError(pack.message)
        except BaseException:
            # StatefulDataLoader would go on without the worker that failed: in another order, or to a false end.
            self.close()
            raise
        return pack

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
        self._given += 1
        return build_pack((), (), self.config.capacity, self.encoder.tokenizer.pad_id, last=True)

    def _open(self) -> Iterator[Pack | Failed]:
        dataset = PackStreams(self.config, self._stages, self.shard, self._start)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
            self._loader = self._run(dataset)
        return iter(self._loader)

    def _run(self, dataset: PackStreams) -> StatefulDataLoader[Pack | Failed]:
        return StatefulDataLoader(
            dataset,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_is,
            prefetch_factor=self.config.prefetch if self.workers else None,
            worker_init_fn=_leave_signals_to_the_trainer,
            # fork: workers inherit the row index, the tokenizer and the compiled template instead of making them again.
            multiprocessing_context="fork" if self.workers else None,
            generator=torch.Generator(),  # else it draws a seed from the global generator
            snapshot_every_n_steps=1,
        )

    def _snapshot(self) -> dict[str, bytes]:
        """The dataset's states as of the last pack taken, from StatefulDataLoader's private layout (torchdata 0.11)."""
        if self._loader is None or self._given == 0:
            return {}
        snapshot = self._loader.state_dict()
        workers = snapshot["_snapshot"]["_worker_snapshots"].values() if self.workers else [snapshot]
        return {stream: state for worker in workers for stream, state in (worker["dataset_state"] or {}).items()}

    def _start_from(self, saved: DataState | None) -> DataState:
        identity = identify(self.config, self.corpus, self.encoder)
        owned = range(self.shard.index, self.config.streams, self.shard.count)
        if saved is None:
            return DataState(identity=identity, packs=0, streams={stream: self._fresh(stream) for stream in owned})
        require_equal(saved.identity, identity)
        if missing := [stream for stream in owned if stream not in saved.streams]:
            raise ValueError(
                f"the state lacks {len(missing)} streams of this shard, stream {missing[0]} the first; "
                "merge the states of all shards"
            )
        if saved.packs % self.shard.count:
            raise ValueError(
                f"the state stands at pack {saved.packs}, which {self.shard.count} shards cannot share evenly; "
                "take it at a step's border"
            )
        return msgspec.structs.replace(saved, streams={stream: saved.streams[stream] for stream in owned})

    def _fresh(self, stream: int) -> StreamState:
        node = build_stream(self.config, self._stages, stream)
        node.reset()
        return node.state


def _open_encoder(config: DataConfig, saved: DataState | None) -> ChatEncoder:
    """A day that the config does not name is the one on which the stream first started."""
    tokenizer = config.tokenizer
    date = tokenizer.date or (saved.identity.date if saved else None)
    return ChatEncoder(tokenizer.path, tokenizer.template, date=date, policy=config)


def _check_topology(config: DataConfig, shard: Shard, workers: int) -> None:
    if not 0 <= shard.index < shard.count:
        raise ValueError(f"shard {shard.index} of {shard.count} does not exist; the index counts from 0")
    if config.global_batch % shard.count:
        raise ValueError(
            f"global_batch = {config.global_batch} packs cannot be shared by {shard.count} shards; "
            f"{_choices(config.global_batch)} can share them"
        )
    if workers < 0:
        raise ValueError(f"workers = {workers} must be 0 (load in this process) or more")
    readers = shard.count * max(workers, 1)
    if config.streams % readers:
        raise ValueError(
            f"streams = {config.streams} cannot be shared by {shard.count} shards x {max(workers, 1)} workers; "
            f"shards x workers can be {_choices(config.streams)}"
        )


def _choices(number: int) -> str:
    divisors = [str(n) for n in range(1, number + 1) if number % n == 0]
    return ", ".join(divisors[:-1]) + f" or {divisors[-1]}" if len(divisors) > 1 else divisors[0]


def _as_is(pack: Pack | Failed) -> Pack | Failed:
    return pack


def _leave_signals_to_the_trainer(_worker: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer finishes its step and needs its loader for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
