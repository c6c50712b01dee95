"""Run the data service of a training run without a model, and write ledger, metrics and states.

The directory has the files that a training run writes, so the ledger commands can read the
directory. A killed run, started again on any topology, continues from its newest saved state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from sftstream.config import DataConfig
from sftstream.ledger.files import publish
from sftstream.ledger.records import RefusedLine, Session, StepLine
from sftstream.ledger.segments import segments_of
from sftstream.ledger.writer import LedgerWriter
from sftstream.loader import PackLoader
from sftstream.records import Pack, batch_digest
from sftstream.state import DataState, merge
from sftstream.streaming.assignment import PackAssignment, Shard


def run_data(config: DataConfig, directory: Path, steps: int, every: int, shards: int = 1, workers: int = 0) -> int:
    """Run up to step number `steps`, or to the end of the data; return the number of the last step.

    A state is saved at each multiple of `every` steps, and at the end. Raises ValueError or OSError
    like `PackLoader`.
    """
    states = directory / "states"
    states.mkdir(parents=True, exist_ok=True)
    saved = max(states.glob("step-*.json"), default=None)
    step = int(saved.stem.removeprefix("step-")) if saved else 0
    state = msgspec.json.decode(saved.read_bytes()) if saved else None
    loaders = [PackLoader(config, shard=Shard(r, shards), workers=workers, state=state) for r in range(shards)]
    assignment = PackAssignment(loaders[0].position().header.identity.streams, config.global_batch, shards)
    rows = _cut_back(directory, step)
    ledger = LedgerWriter(directory / "ledger", step)
    ledger.begin(Session.of(loaders[0], {"dp": shards}, step, metadata.version("sftstream")))
    with (directory / "metrics.jsonl").open("ab", 0) as metrics, (directory / "refused.jsonl").open("ab", 0) as refused:
        while step < steps and not all(loader.exhausted for loader in loaders):
            step += 1
            packs = _in_order([loader.next_step() for loader in loaders], assignment.shards_of_step(step - 1))
            line = _line(step, packs, rows)
            rows = line.rows
            ledger.add(step, segments_of(packs))
            refused.write(b"".join(_refused(step, packs, loaders[0])))
            metrics.write(msgspec.json.encode(line) + b"\n")
            if step % every == 0 or step == steps or all(loader.exhausted for loader in loaders):
                _save(loaders, ledger, states / f"step-{step:08d}.json")
    for loader in loaders:
        loader.close()
    ledger.end()
    return step


def _in_order(packs: Sequence[Sequence[Pack]], shards: Sequence[int]) -> list[Pack]:
    """Return the packs of a step in the order of the run.

    `packs` holds the packs of each shard, `shards` the shard of each pack.
    """
    taken = Counter[int]()
    result = []
    for shard in shards:
        result.append(packs[shard][taken[shard]])
        taken[shard] += 1
    return result


def _line(step: int, packs: Sequence[Pack], rows: int) -> StepLine:
    refused = sum(len(pack.refused) for pack in packs)
    return StepLine(
        step,
        sum(pack.tokens for pack in packs),
        sum(pack.trained_tokens for pack in packs),
        rows + sum(pack.rows for pack in packs),
        refused,
        batch_digest(pack.digest() for pack in packs),
    )


def _refused(step: int, packs: Sequence[Pack], loader: PackLoader) -> list[bytes]:
    return [
        msgspec.json.encode(RefusedLine(step, loader.locate_row(r), r.source, r.row, r.epoch, r.reason, r.detail))
        + b"\n"
        for pack in packs
        for r in pack.refused
    ]


def _save(loaders: Sequence[PackLoader], ledger: LedgerWriter, path: Path) -> None:
    positions = [loader.position() for loader in loaders]
    streams = {stream: state for position in positions for stream, state in position.encoded_streams.items()}
    ledger.keep_state(positions[0].header, streams)
    ledger.close()
    state = merge([DataState.parse(loader.state) for loader in loaders])
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(msgspec.json.encode(state))
    publish(partial, path)


class _Numbered(msgspec.Struct):
    step: int
    rows: int = 0


def _cut_back(directory: Path, step: int) -> int:
    """Remove the metrics and refused rows after `step`; return the field `rows` of the last line
    left in `metrics.jsonl`, or 0."""
    rows = 0
    for name in ("refused.jsonl", "metrics.jsonl"):
        path = directory / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        numbered = [(line, msgspec.json.decode(line, type=_Numbered)) for line in lines if line.endswith(b"\n")]
        kept = [(line, number) for line, number in numbered if number.step <= step]
        path.write_bytes(b"".join(line for line, _ in kept))
        rows = kept[-1][1].rows if kept else 0
    return rows
