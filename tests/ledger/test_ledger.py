"""The files of a ledger hold each step once, after a kill at any moment, in few bytes."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import gloo_ranks
import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from sftstream import SEGMENT, DataConfig, LedgerWriter, Pack, PackAssignment, PackLoader, Segments, segments_of
from sftstream.ledger.files import closed_files, frame, read_closed, read_journal, write_closed
from sftstream.ledger.reader import Ledger
from sftstream.ledger.records import StepSegments
from sftstream.ledger.segments import SKIPPED
from sftstream.records import Segment
from trainer.distributed.mesh import Topology
from trainer.training.segment_gather import SegmentGather
from trainer.training.step_reader import StepReader, reduce_totals


def _step(number: int, count: int = 3) -> Segments:
    """Return `count` segments whose rows tell the step: 40, 41, 42 for step 4."""
    segments = np.zeros(count, SEGMENT)
    segments["row"] = 10 * number + np.arange(count)
    segments["tokens"], segments["trained_tokens"] = 7, 3
    return segments


def _write(directory: Path, after: int, *groups: list[int]) -> LedgerWriter:
    """Write groups of steps, and close each group but the last."""
    writer = LedgerWriter(directory, after)
    for index, group in enumerate(groups):
        for step in group:
            writer.add(step, _step(step))
        if index < len(groups) - 1:
            writer.close()
    writer.end()
    return writer


def _rows(directory: Path) -> dict[int, list[int]]:
    """Return the rows of each step, read as a reader reads them; fails if a step is there twice."""
    closed = [step for file in closed_files(directory) for step in read_closed(file)]
    last = closed[-1].step if closed else 0
    steps = [*closed, *(step for step in read_journal(directory) if step.step > last)]
    assert len({step.step for step in steps}) == len(steps)
    return {step.step: step.segments["row"].tolist() for step in steps}


def test_segments_name_the_rows_of_packs_and_count_their_labels(config: DataConfig) -> None:
    packs = PackLoader(config).next_step()
    segments = segments_of(packs)
    assert [(s["pack"], s["row"], s["tokens"]) for s in segments] == [
        (index, segment.row, segment.length) for index, pack in enumerate(packs) for segment in pack.segments
    ]
    for index, pack in enumerate(packs):
        assert segments["trained_tokens"][segments["pack"] == index].sum() == pack.trained_tokens


def test_segments_are_described_by_place_with_skipped_segments_last() -> None:
    trained = np.array([0, 1, 1, 1, 1, 0, 0, 0], bool)
    second, first = Segment(1, 7, 3, 2, 1), Segment(0, 9, 4, 0)
    pack = Pack(
        np.zeros(8, np.int32),
        trained,
        np.array([0, 3, 7, 8], np.int32),
        (second, first),
        skipped=(Segment(2, 5, 6, 0),),
    )
    empty = Pack(np.zeros(8, np.int32), np.zeros(8, bool), np.array([0, 8], np.int32))
    segments = segments_of([empty, pack, empty], [1, 4])
    assert segments.dtype == SEGMENT
    assert segments.tolist() == [(7, 4, 1, 2, 1, 3, 2), (9, 4, 0, 0, 0, 4, 1), (5, 4, 2, 0, 0, 6, SKIPPED)]
    assert segments_of([empty]).tolist() == []


def test_steps_are_read_from_closed_files_and_from_the_journal(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1, 2], [3])
    assert [file.path.name for file in closed_files(tmp_path)] == ["steps-00000001-00000002.parquet"]
    assert _rows(tmp_path) == {1: [10, 11, 12], 2: [20, 21, 22], 3: [30, 31, 32]}


def test_a_step_without_a_conversation_stays_a_step(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, 0)
    for step in (1, 2):
        writer.add(step, _step(step, 0))
    writer.close()
    writer.add(3, _step(3, 0))
    writer.end()
    assert _rows(tmp_path) == {1: [], 2: [], 3: []}


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_a_resumed_run_has_each_step_once_wherever_it_resumes(after: int, tmp_path: Path) -> None:
    _write(tmp_path, 0, [1, 2], [3, 4], [5])
    _write(tmp_path, after, [*range(after + 1, 7)])
    assert _rows(tmp_path) == {step: _step(step)["row"].tolist() for step in range(1, 7)}


def test_a_frame_torn_by_a_kill_is_written_again(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1], [2])
    journal = tmp_path / "journal"
    whole = journal.read_bytes() + frame(StepSegments(3, _step(3)))
    for size in range(len(journal.read_bytes()), len(whole)):
        journal.write_bytes(whole[:size])
        assert list(_rows(tmp_path)) == [1, 2]
    _write(tmp_path, 2, [3])
    assert list(_rows(tmp_path)) == [1, 2, 3]


def test_a_kill_between_closing_and_emptying_the_journal_repeats_no_step(tmp_path: Path) -> None:
    _write(tmp_path, 0, [1, 2])
    journal = (tmp_path / "journal").read_bytes()
    _write(tmp_path, 2, [], [])
    (tmp_path / "journal").write_bytes(journal)
    (tmp_path / ".steps-00000003-00000004.parquet").write_bytes(b"half")
    assert list(_rows(tmp_path)) == [1, 2]
    _write(tmp_path, 2, [3])
    assert list(_rows(tmp_path)) == [1, 2, 3]
    assert not list(tmp_path.glob(".*"))


def test_equal_steps_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_closed(tmp_path / name, 1, [StepSegments(1, _step(1)), StepSegments(2, _step(2))])
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


def test_a_flipped_bit_that_changes_a_closed_file_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    steps = [StepSegments(step, _step(step, 100)) for step in range(1, 50)]
    file = write_closed(tmp_path, 1, steps)
    content = bytearray(file.path.read_bytes())
    found = right = 0
    for at in range(0, len(content), 3):
        content[at] ^= 1
        file.path.write_bytes(content)
        try:
            read = read_closed(file)
        except ValueError as error:
            found += "steps-00000001-00000049.parquet is damaged" in str(error)
        else:  # statistics and names of writers, which no reader uses
            right += [step.segments.tolist() for step in read] == [step.segments.tolist() for step in steps]
        content[at] ^= 1
    assert found + right == len(range(0, len(content), 3))
    assert found > len(content) // 6


def test_steps_refused_by_a_full_disk_are_written_once_there_is_room(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = LedgerWriter(tmp_path, 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        for step in range(1, 6):
            writer.add(step, _step(step))
        with pytest.raises(OSError, match="File too large"):
            writer.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.end()
    assert list(_rows(tmp_path)) == [1, 2, 3, 4, 5]


def test_a_conversation_takes_at_most_12_bytes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    writer = LedgerWriter(tmp_path, 0)
    rows = draw.permutation(2_000_000)
    count = 0
    for step in range(1, 41):
        segments = np.zeros(64 * 20, SEGMENT)
        segments["pack"] = np.repeat(np.arange(64), 20)
        segments["row"] = rows[count : count + len(segments)]
        segments["source"] = draw.integers(0, 4, len(segments))
        segments["tokens"] = draw.integers(20, 8192, len(segments))
        segments["trained_tokens"] = segments["tokens"] * draw.uniform(0.1, 0.9, len(segments))
        writer.add(step, segments)
        count += len(segments)
    writer.close()
    writer.end()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) / count <= 12


def _gathered(rank: int, config: DataConfig, dp: int, tp: int, room: int) -> tuple[list[Segments], int]:
    topology = Topology(init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp")), torch.device("cpu"))
    loader = PackLoader(config, shard=topology.shard) if topology.leads else None
    assignment = PackAssignment(config.streams, config.global_batch, dp)
    step_reader = StepReader(loader, assignment, config.capacity, topology.tp_group)
    step_reader.gather = SegmentGather(room)
    result = []
    for step in range(6):
        packs = step_reader.packs(step)
        result.append(reduce_totals(step, packs, step_reader, topology, stop=False).segments)
    return result, step_reader.gather.room


@pytest.mark.parametrize(("dp", "tp", "room"), [(2, 2, 64), (2, 1, 1), (3, 1, 5)])
def test_the_first_rank_gets_the_segments_of_all_ranks_in_order(
    dp: int, tp: int, room: int, config: DataConfig
) -> None:
    alone = PackLoader(config)
    expected = [segments_of(alone.next_step()) for _ in range(6)]
    (first, first_room), *others = gloo_ranks.run_ranks(dp * tp, _gathered, config, dp, tp, room)
    for found, segments in zip(first, expected, strict=True):
        assert found.tolist() == segments.tolist()
    for segments, other_room in others:
        assert other_room == first_room  # rows of another length could not be gathered
        assert all(len(found) == 0 for found in segments)


def test_steps_are_closed_before_any_checkpoint_once_the_journal_holds_a_million_segments(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path, 0)
    half = np.zeros(1 << 19, SEGMENT)
    ledger.add(1, half)
    assert closed_files(tmp_path) == []
    ledger.add(2, half)
    assert [file.path.name for file in closed_files(tmp_path)] == ["steps-00000001-00000002.parquet"]
    ledger.add(3, half)
    ledger.sync()
    assert [step.step for step in read_journal(tmp_path)] == [3]
    assert len(closed_files(tmp_path)) == 1


def test_a_ledger_without_the_session_of_a_step_says_so(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    sessions = tmp_path / "ledger" / "sessions.jsonl"
    sessions.write_text('{"a torn')
    with pytest.raises(ValueError, match=r"sessions\.jsonl holds no session, .*; restore the file"):
        _ = Ledger(tmp_path).sessions
    sessions.unlink()
    os.mkfifo(sessions)
    with pytest.raises(ValueError, match=r"sessions\.jsonl is a pipe, a socket or a device; put a file in its place"):
        Ledger(tmp_path)
