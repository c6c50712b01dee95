"""Open everything that a loader starts from: encoder, number of streams, and the first state."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

import msgspec

from sftstream.config import DataConfig
from sftstream.identity import Identity, accepted_changes, changed_versions, identify, with_full_digests
from sftstream.rebase import is_possible, rebase
from sftstream.sources import Corpus
from sftstream.sources.full_digests import FullDigests
from sftstream.state import DataState, StreamState, only_skips
from sftstream.state_checks import require_sound
from sftstream.streaming.assignment import PackAssignment, Shard
from sftstream.streaming.forecast import choose_streams
from sftstream.streaming.graph import build_stream
from sftstream.streaming.length_sample import TO_CHOOSE, sample_lengths
from sftstream.streaming.skip import require_known_rows
from sftstream.streaming.version_check import require_equal_tokens
from sftstream.tokenization.encoder import ChatEncoder


def first_state(
    config: DataConfig,
    corpus: Corpus,
    encoder: ChatEncoder,
    assignment: PackAssignment,
    shard: Shard,
    saved: DataState | None,
    digests: FullDigests,
) -> DataState:
    """Return the state in which a shard starts: a new state, or `saved` without other shards'
    streams.

    Raises ValueError if `config.skip` names a row that does not exist, if `saved` is damaged or
    lacks a stream of the shard, if changed libraries give the waiting rows other tokens, or if the
    data or settings differ from those of `saved` and `config.accept_changed` does not name the
    difference.
    """
    require_known_rows(config.skip, corpus)
    identity = identify(config, corpus, encoder)
    owned = assignment.streams_of(shard.index)
    if saved is None:
        streams = {stream: _new_stream(config, corpus, encoder, stream) for stream in owned}
        return DataState(identity=identity, packs=0, streams=streams)
    before, now = _with_full_digests(saved, identity, digests)
    versions = changed_versions(saved.identity, identity)
    possible = partial(is_possible, saved, identity, config, corpus)
    if changed := accepted_changes(before, now, config.accept_changed, possible):
        saved = rebase(saved, identity, config, corpus, encoder, changed)
        if not only_skips(changed):
            versions = []  # all waiting rows were read again
    require_sound(saved, config, corpus)
    _require_streams(saved, owned, config, assignment, shard)
    streams = {stream: saved.streams[stream] for stream in owned}
    if versions:
        require_equal_tokens(versions, streams, corpus, encoder)
    return msgspec.structs.replace(saved, identity=identity, streams=streams)


def _require_streams(
    saved: DataState, owned: range, config: DataConfig, assignment: PackAssignment, shard: Shard
) -> None:
    """Raise ValueError if a state lacks one of the streams `owned` by the shard.

    Also raises ValueError if the state was saved inside a step that the shards cannot share.
    """
    if missing := [stream for stream in owned if stream not in saved.streams]:
        raise ValueError(
            f"the state lacks {len(missing)} streams of this shard, the first is stream {missing[0]}; merge the states "
            "of all shards"
        )
    shared = assignment.even and saved.packs % shard.count == 0
    if shard.count > 1 and saved.packs % config.global_batch and not shared:
        raise ValueError(
            f"the state was saved after {saved.packs} packs, inside a step that {shard.count} "
            "shards cannot share evenly; save a state at the end of a step"
        )


def _with_full_digests(saved: DataState, identity: Identity, digests: FullDigests) -> tuple[Identity, Identity]:
    """Return the identity of a state and the identity of a loader, both with the SHA-256 of all
    bytes of each file for which the state has this digest."""
    files = {number: source.files for number, source in enumerate(saved.identity.sources)}
    now = digests.verify(saved.digests_in_full, files)
    before = {
        source: {number: saved.digests_in_full[source][number] for number in found} for source, found in now.items()
    }
    return with_full_digests(saved.identity, before), with_full_digests(identity, now)


def _new_stream(config: DataConfig, corpus: Corpus, encoder: ChatEncoder, stream: int) -> StreamState:
    node = build_stream(config, corpus, encoder, stream)
    node.reset()
    return node.state


def with_streams(
    config: DataConfig, saved: DataState | None, corpus: Corpus, encoder: ChatEncoder, shard: Shard
) -> DataConfig:
    """Return `config` with a number in place of `streams = "auto"`: the number in `saved`, or for a
    new run a number chosen from a sample of the rows."""
    if config.streams != "auto":
        return config
    if saved is not None:
        return msgspec.structs.replace(config, streams=saved.identity.streams)
    streams = choose_streams(config, corpus, sample_lengths(corpus, encoder, TO_CHOOSE), shard.count)
    return msgspec.structs.replace(config, streams=streams)


def open_encoder(config: DataConfig, saved: DataState | None, shard: Shard) -> ChatEncoder:
    """Open tokenizer and template.

    A template may print the date. The printed date is `tokenizer.date`, or else the date in
    `saved`, or else today in UTC.

    Raises ValueError if several shards would each print the day of their own start.
    """
    tokenizer = config.tokenizer
    date = tokenizer.date or (saved.identity.date if saved else None)
    today = datetime.now(UTC).date().isoformat()
    with _without_collector():
        encoder = ChatEncoder(
            tokenizer.path,
            tokenizer.template,
            date=date or today,
            variables=tokenizer.variables,
            policy=config,
            backend=tokenizer.backend,
        )
    if shard.count > 1 and date is None and encoder.template.date:
        raise ValueError(
            f"the template prints a date, and each of {shard.count} shards would print the day of its own start; "
            f'set data.tokenizer.date = "{today}"'
        )
    return encoder


@contextmanager
def _without_collector() -> Iterator[None]:
    """Suspend the garbage collector, which would scan a tokenizer's many objects several times and
    take a tenth of a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_topology(shard: Shard, workers: int) -> None:
    """Raise ValueError if the shard's index is not below its count, or if `workers` is negative."""
    if not 0 <= shard.index < shard.count:
        raise ValueError(f"shard {shard.index} of {shard.count} does not exist; give an index from 0 to count - 1")
    if workers < 0:
        raise ValueError(f"workers = {workers} must be 0 (load in this process) or more")
