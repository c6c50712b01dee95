"""Load the packs of a shard from its logical streams, with worker processes, state and resume."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import msgspec

from sftstream.config import DataConfig
from sftstream.encoded_stream import encode_stream
from sftstream.records import Pack, Ref, Refusal
from sftstream.sources import Corpus, FileSet
from sftstream.sources.full_digests import FullDigests
from sftstream.start import check_topology, first_state, open_encoder, with_streams
from sftstream.state import DataState, StreamState, state_dict_of
from sftstream.streaming.assignment import WHOLE, PackAssignment, Shard
from sftstream.streaming.beside import Beside
from sftstream.streaming.deferred_signals import deferred_signals
from sftstream.streaming.example_reader import unread_columns
from sftstream.streaming.forecast import Forecast, foresee
from sftstream.streaming.length_sample import TO_FORESEE, sample_lengths
from sftstream.streaming.packing import build_pack
from sftstream.streaming.refusals import (
    RowCounts,
    limit_of,
    require_few_refused,
    row_counts,
    sum_row_counts,
)
from sftstream.streaming.sampler import row_order
from sftstream.streaming.worker import EncodedStreams, PackStreams, StreamWorker


class LoaderPosition(NamedTuple):
    """The position of a shard between two packs. The states of the streams stay encoded, so a
    position costs almost nothing."""

    header: DataState
    """State of the run without its streams: identity, number of packs, history."""
    streams: EncodedStreams
    """States of the shard's streams, encoded in parts."""

    @property
    def encoded_streams(self) -> dict[int, bytes]:
        """States of the shard's streams as MessagePack, as checkpoints store them."""
        return {number: stream.whole for number, stream in self.streams.items()}

    @property
    def state(self) -> DataState:
        """The state at this position. Decoding it takes milliseconds."""
        streams = {
            number: msgspec.msgpack.decode(encoded, type=StreamState)
            for number, encoded in self.encoded_streams.items()
        }
        return msgspec.structs.replace(self.header, streams=streams)


class Progress(NamedTuple):
    """The progress of a shard after some packs.

    A Progress is never modified. The loader replaces it by a single assignment, so an interrupt or
    another thread sees the progress before a pack or after it, and never a mixture.
    """

    at: int
    """Number, in the run, of the pack after the last returned pack of this shard. The pack with
    this number may belong to another shard."""
    streams: EncodedStreams
    """States of the shard's streams."""
    exhausted: frozenset[int]
    """Exhausted streams of the shard."""
    counts: Mapping[int, tuple[RowCounts, ...]]
    """Rows read from each source, by stream."""
    examples: Mapping[tuple[int, str], tuple[Refusal, str]]
    """First row refused since the loader was opened, and its location, for each pair of a source
    and the config key of a limit."""


class PackLoader:
    """Iterator over the packs of a shard, in order, from the beginning or from a state.

    `workers` processes load packs ahead (default: `config.workers`; 0 loads in this process).
    `state` is a state dict of a PackLoader, which may have had another topology; `merge` combines
    the state dicts of several shards into a state dict for any number of shards.

    All packs of the run are the same for any number of shards and workers. If the number of shards
    does not divide `streams` and `global_batch`, the shards have different numbers of packs in a
    step, and a state can be taken only at the end of a step. A finite run ends at the end of a
    step: exhausted streams return empty packs until then. Shards may end at different steps.

    If an error or an interrupt occurs in `next` or `next_step`, the workers are closed, and the
    state remains that of the last returned pack or step. The next call continues from there.
    `state_dict` may be called from any thread, and from a signal handler.

    The attribute `config` is the given config; if `streams` is "auto", with the chosen number.

    Raises ValueError if the topology does not fit the config, or if `state` has other data or
    settings than `config`.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        shard: Shard = WHOLE,
        workers: int | None = None,
        state: Mapping[str, Any] | DataState | None = None,
    ) -> None:
        self.shard = shard
        self.workers = config.workers if workers is None else workers
        check_topology(self.shard, self.workers)
        saved = None if state is None else DataState.parse(state)
        self.corpus = Corpus(config.sources)
        self.encoder = open_encoder(config, saved, shard)
        self.config = config = with_streams(config, saved, self.corpus, self.encoder, shard)
        self._assignment = PackAssignment(
            config.stream_count, config.global_batch, shard.count, max(self.workers, 1), resumed=saved is not None
        )
        self._digests = FullDigests(self.corpus)
        start = first_state(config, self.corpus, self.encoder, self._assignment, shard, saved, self._digests)
        self._run = msgspec.structs.replace(start, streams={})
        self._unread: dict[int, tuple[str, ...]] | msgspec.UnsetType = self._run.unread_columns
        self._progress = Progress(
            start.packs,
            {number: encode_stream(stream) for number, stream in start.streams.items()},
            frozenset(number for number, stream in start.streams.items() if stream.exhausted),
            {number: row_counts(stream) for number, stream in start.streams.items()},
            {},
        )
        self._workers: dict[int, StreamWorker] = {}
        self._workers_at: EncodedStreams | None = None
        """Stream states after the last pack that the workers returned; None while a pack is
        read."""
        self._reading_thread: int | None = None
        self._forecast: Beside[Forecast] | None = None

    def start(self, *, foresees: bool = False) -> None:
        """Start the workers, which read ahead, before the first pack is asked for.

        Loads a required tokenizing library before, once for all workers. If workers are started and
        `foresees` is true, another process computes the next result of `forecast`.
        """
        if fast := self.encoder.tokenizer.fast_tokenizer:
            fast.load_if_required()
        progress = self._progress
        if not self.workers or self._is_exhausted(progress) or self._workers_at is progress.streams:
            return
        self._require_only_reader()
        self.close()
        if foresees:
            self._forecast = Beside(self._foresee)
        self._open_workers(progress)
        self._workers_at = progress.streams

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Pack:
        before = self._progress
        if self._is_exhausted(before) and self._at_border(before):
            self.close()
            raise StopIteration
        self._require_only_reader()
        try:
            self._reading_thread = threading.get_ident()
            pack, after = self._advance(before)
            self._judge(after)
            self._reading_thread = None
            # The last statement: Python handles signals only after calls, and no call follows.
            self._progress = after
            return pack
        except BaseException:
            self._go_back(before)
            raise

    def next_step(self) -> list[Pack]:
        """Return the shard's packs of the next step: the same number of packs on all shards.

        A shard with fewer packs in the step gets empty packs in addition. A shard whose streams are
        all exhausted gets empty packs only, so that it can take part in the steps of other shards.

        Raises ValueError if `next` has returned a part of the step.
        """
        before = self._progress
        batch = self.config.global_batch
        step, taken = divmod(self._packs_after(before), batch)
        if taken:
            raise ValueError(
                f"`next` has returned {taken} of the {batch} packs of this step; call `next` for the rest of the step"
            )
        count = self._assignment.micro_batches(step)
        own = 0 if self._is_exhausted(before) else self._assignment.shards_of_step(step).count(self.shard.index)
        self._require_only_reader()
        try:
            self._reading_thread = threading.get_ident()
            after, packs = before, []
            for _ in range(own):
                pack, after = self._advance(after)
                packs.append(pack)
            packs += [self._empty_pack() for _ in range(count - own)]
            if self._is_exhausted(after):
                self.close()
            after = after._replace(at=(step + 1) * batch)
            self._judge(after)
            self._reading_thread = None
            self._progress = after
            return packs
        except BaseException:
            self._go_back(before)
            raise

    @property
    def packs(self) -> int:
        """Number of packs consumed by all shards together, if all are at the step of this shard.

        Raises ValueError inside a step that the shards do not share evenly.
        """
        return self._packs_after(self._progress)

    @property
    def total_rows(self) -> int | None:
        """Number of rows drawn in all epochs; None for an endless run or with a streamed source."""
        epochs = self.config.epochs
        sources = [source for source in self.corpus.sources if isinstance(source, FileSet)]
        if epochs is None or len(sources) < len(self.config.sources):
            return None
        past = self._run.orders
        return sum(
            row_order(opened.file_sizes, self.config, number, past.get(number, ())).draws(source.repeat, epochs)
            for number, (opened, source) in enumerate(zip(sources, self.config.sources, strict=True))
        )

    @property
    def row_counts(self) -> tuple[RowCounts, ...]:
        """Rows accepted and refused by the shard's streams so far, by source."""
        return sum_row_counts(self._progress.counts.values())

    @property
    def refused_examples(self) -> list[tuple[Refusal, str]]:
        """For each source and limit: the first row refused since the loader was opened, and its
        location."""
        return list(self._progress.examples.values())

    def forecast(self) -> Forecast:
        """Estimate the packs of the whole run and their fill from a sample of rows."""
        beside, self._forecast = self._forecast, None
        return (beside and beside.result()) or self._foresee()

    def _foresee(self) -> Forecast:
        return foresee(self.config, self.corpus, sample_lengths(self.corpus, self.encoder, TO_FORESEE))

    def unread_columns(self) -> list[str]:
        """Return a line for each source with columns, or keys of messages, that no layout reads, or
        with tool definitions that the chat template does not print.

        An unread column is harmless, unless it contains a part of the conversation under an unknown
        name. The setting `columns` renames columns; `ignore` suppresses the line. Up to 100 rows of
        each source are examined.
        """
        found = unread_columns(self.corpus, prints_tools=self.encoder.report.prints_tools)
        unread = {number: tuple(sorted(names)) for number, names in enumerate(found) if names}
        self._unread = unread or msgspec.UNSET
        return [
            f"source {self.config.sources[number].path!r}: nothing reads {', '.join(names)}"
            for number, names in unread.items()
        ]

    @property
    def exhausted(self) -> bool:
        """True if all streams of the shard are exhausted."""
        return self._is_exhausted(self._progress)

    @property
    def state(self) -> DataState:
        """The state after the last returned pack; packs loaded ahead do not count."""
        return self.position().state

    def position(self) -> LoaderPosition:
        """Return the position after the last returned pack.

        Raises ValueError inside a step that the shards do not share evenly.
        """
        progress = self._progress
        digests = self._digests.known or msgspec.UNSET
        run = msgspec.structs.replace(
            self._run, packs=self._packs_after(progress), full_digests=digests, unread_columns=self._unread
        )
        return LoaderPosition(run, progress.streams)

    def state_dict(self) -> dict[str, Any]:
        """Return `state` as a dict of JSON-able values: see `state_dict_of`.

        `DataState.parse(state).builtins()` is the same state with plain lists of waiting rows.
        """
        return state_dict_of(*self.position())

    def load_state_dict(self, _state: Mapping[str, Any]) -> None:
        """Raise RuntimeError: a state is passed to the constructor, before any pack is read."""
        raise RuntimeError(
            "resume by constructing PackLoader(config, state=...): a loader that has begun cannot go back"
        )

    def locate_row(self, row: Refusal | Ref) -> str:
        """Return the location of a row for an editor: `chats.jsonl:17`."""
        return self.corpus.locate_row(row.source, row.row)

    def close(self) -> None:
        """Stop the workers. The position remains; `next` starts the workers again."""
        self._digests.stop()
        if self._forecast:
            self._forecast.close()
        self._forecast = self._workers_at = None
        with deferred_signals():
            while self._workers:
                self._workers.popitem()[1].close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PackLoader holds open files and processes and cannot be pickled; pickle its state_dict()")

    def _require_only_reader(self) -> None:
        if self._reading_thread not in (None, threading.get_ident()):
            raise RuntimeError("another thread is reading a pack of this loader; call next in one thread at a time")

    def _go_back(self, before: Progress) -> None:
        """Return to the progress `before` after an error or an interrupt, and close the workers."""
        self._progress = before
        # After an error, an open StatefulDataLoader would skip packs or end too early.
        self.close()
        self._reading_thread = None

    def _advance(self, before: Progress) -> tuple[Pack, Progress]:
        """Read the shard's next pack after `before`; return it with the progress after the pack."""
        number = self._next_pack(before)
        stream = number % self.config.stream_count
        if self._workers_at is not before.streams:
            self.close()
            self._open_workers(before)
        self._workers_at = None
        pack, state, counts = next(self._workers[self._assignment.worker(stream)])
        after = Progress(
            number + 1,
            {**before.streams, stream: state},
            before.exhausted | {stream} if pack.exhausted else before.exhausted,
            {**before.counts, stream: counts},
            self._with_examples(before, pack.refused),
        )
        self._workers_at = after.streams
        return pack, after

    def _judge(self, progress: Progress) -> None:
        """Raise ValueError at a step's border if too many rows are refused.

        A loader of one of several shards judges nothing, because it knows only the counts of its
        own streams. The caller adds up the counts of all shards and calls `require_few_refused`.
        """
        if self.shard.count == 1 and progress.at % self.config.global_batch == 0:
            counts = sum_row_counts(progress.counts.values())
            require_few_refused(self.config, self.corpus.sizes, counts, progress.examples.values())

    def _with_examples(
        self, progress: Progress, refused: Sequence[Refusal]
    ) -> Mapping[tuple[int, str], tuple[Refusal, str]]:
        """Return `progress.examples`, with an entry added for each source and limit that has its
        first refused row in `refused`."""
        first = {(r.source, limit_of(r.reason).key): r for r in reversed(refused)}
        further = {key: (r, self.locate_row(r)) for key, r in first.items() if key not in progress.examples}
        return {**progress.examples, **further} if further else progress.examples

    def _next_pack(self, progress: Progress) -> int:
        """Return the number in the run of the shard's next pack."""
        return self._assignment.next_pack(self.shard.index, progress.at)

    def _at_border(self, progress: Progress) -> bool:
        """Return True if the shard has no pack left in the current step."""
        batch = self.config.global_batch
        return progress.at % batch == 0 or self._next_pack(progress) // batch > progress.at // batch

    def _packs_after(self, progress: Progress) -> int:
        if self._at_border(progress):
            return -(-progress.at // self.config.global_batch) * self.config.global_batch
        if self._assignment.even:
            return self._next_pack(progress) - self.shard.index
        raise ValueError(
            f"{self.shard.count} shards do not share a step of {self.config.global_batch} packs "
            "evenly; take the state at the end of a step"
        )

    def _is_exhausted(self, progress: Progress) -> bool:
        return len(progress.exhausted) == len(progress.streams)

    def _open_workers(self, progress: Progress) -> None:
        # Only workers with a stream: a worker without a stream would search for a pack for ever.
        owned = self._assignment.streams_of(self.shard.index)
        workers = {self._assignment.worker(stream) for stream in owned}
        with deferred_signals():
            for worker in workers:
                self._workers[worker] = self._open(worker, progress)
        self._digests.start()

    def _open(self, worker: int, progress: Progress) -> StreamWorker:
        streams = {
            stream: encoded for stream, encoded in progress.streams.items() if self._assignment.worker(stream) == worker
        }
        dataset = PackStreams(self.config, self.corpus, self.encoder, progress.at, streams, self._run.orders)
        return StreamWorker(dataset, self.config.prefetch if self.workers else None)

    def _empty_pack(self) -> Pack:
        pad_id = self.encoder.tokenizer.vocabulary.pad_id
        return build_pack((), (), self.config.capacity, pad_id, exhausted=True)
