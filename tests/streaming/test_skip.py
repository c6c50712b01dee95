"""Skipped rows and steps are left out of packs; every other conversation keeps its place."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny

from sftstream import DataConfig, Pack, PackLoader, Shard, merge

SEED = int(os.environ.get("SFTSTREAM_SEED") or random.randrange(10**9))
DRAWS = int(os.environ.get("SFTSTREAM_DRAWS") or 2)
NO_LONGER = ("data.skip",)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny.rows(60))


def _config(tokenizer: str, path: str, skip: dict[str, Any], **changes: Any) -> DataConfig:
    return tiny.data_config(tokenizer, path, skip=skip, **changes)


def _expected(packs: list[Pack], rows: set[tuple[int, int]], steps: range, batch: int = 4) -> list[tuple[Any, Any]]:
    """Segments left in each pack and segments skipped, from the packs of a run without `skip`."""
    result = []
    for number, pack in enumerate(packs):
        out = [number // batch + 1 in steps or (s.source, s.row) in rows for s in pack.segments]
        pairs = list(zip(pack.segments, out, strict=True))
        result.append((tuple(s for s, o in pairs if not o), tuple(s for s, o in pairs if o)))
    return result


def test_a_skipped_row_leaves_its_pack_and_all_other_tokens_stay(tokenizer: str, path: str) -> None:
    whole = list(PackLoader(_config(tokenizer, path, {})))
    packs = list(PackLoader(_config(tokenizer, path, {"rows": [[0, 17], [0, 3]]})))
    assert [(p.segments, p.skipped) for p in packs] == _expected(whole, {(0, 17), (0, 3)}, range(0))
    assert sorted((s.row, s.epoch) for p in packs for s in p.skipped) == [(3, 0), (3, 1), (17, 0), (17, 1)]
    assert sum(p.rows for p in packs) == sum(p.rows for p in whole) == 120
    assert sum(p.conversations for p in packs) == 116
    for before, after in zip(whole, packs, strict=True):
        if not after.skipped:
            assert before.digest() == after.digest()
            continue
        kept = [s not in after.skipped for s in before.segments]
        borders = before.borders.tolist()
        cuts = [slice(*bounds) for bounds, keep in zip(pairwise(borders), kept, strict=False) if keep]
        assert after.ids[: after.tokens].tolist() == [t for cut in cuts for t in before.ids[cut].tolist()]
        assert after.trained[: after.tokens].tolist() == [t for cut in cuts for t in before.trained[cut].tolist()]
        assert not after.trained[after.tokens :].any()
        assert after.capacity == before.capacity


def test_the_packs_of_a_skipped_step_are_empty_and_the_next_steps_stay(tokenizer: str, path: str) -> None:
    whole = list(PackLoader(_config(tokenizer, path, {})))
    packs = list(PackLoader(_config(tokenizer, path, {"steps": [[2, 3]]})))
    assert tiny.digests(packs[:4] + packs[12:]) == tiny.digests(whole[:4] + whole[12:])
    assert [(p.segments, p.trained_tokens, p.skipped) for p in packs[4:12]] == [
        ((), 0, p.segments) for p in whole[4:12]
    ]


def test_a_resume_needs_the_skip_of_its_state_or_an_accepted_change(tokenizer: str, path: str) -> None:
    config = _config(tokenizer, path, {"steps": [[4, 4]]})
    loader = PackLoader(config)
    tiny.take(loader, 8)
    state = loader.state_dict()
    assert state["identity"]["skip"] == {"rows": [], "steps": [[4, 4]]}
    assert tiny.digests(PackLoader(config, state=state)) == tiny.digests(loader)
    for skip, named in (
        ({}, "data.skip: {'rows': (), 'steps': ((4, 4),)} -> None"),
        ({"steps": [[4, 5]]}, "data.skip.steps[0][1]: 4 -> 5"),
    ):
        other = _config(tokenizer, path, skip)
        with pytest.raises(ValueError, match="would not be exact: ") as error:
            PackLoader(other, state=state)
        assert f"would not be exact: {named}. Restore them" in str(error.value)
        accepted = msgspec.structs.replace(other, accept_changed=(named.split(":")[0],))
        resumed = PackLoader(accepted, state=state)
        (change,) = resumed.state.history
        assert (change.packs, change.differences) == (8, (named,))
        assert tiny.digests(resumed) == tiny.digests(list(PackLoader(other))[8:])


def test_a_skip_after_a_rewind_changes_no_waiting_row(tokenizer: str, path: str) -> None:
    loader = PackLoader(_config(tokenizer, path, {}))
    tiny.take(loader, 8)
    state = loader.state
    skipping = _config(tokenizer, path, {"rows": [[0, 5]], "steps": [[3, 4]]}, accept_changed=NO_LONGER)
    resumed = PackLoader(skipping, state=state)
    assert resumed.state.streams == state.streams
    # The skip is now part of the run: no later resume needs to accept it again.
    again = PackLoader(msgspec.structs.replace(skipping, accept_changed=()), state=resumed.state_dict())
    rest = list(loader)
    assert [(p.segments, p.skipped) for p in again] == _expected(rest, {(0, 5)}, range(1, 3))


def test_steps_that_are_done_cannot_be_skipped(tokenizer: str, path: str) -> None:
    loader = PackLoader(_config(tokenizer, path, {}))
    tiny.take(loader, 12)
    state = loader.state_dict()
    accepted = _config(tokenizer, path, {"steps": [[3, 5]]}, accept_changed=NO_LONGER)
    message = (
        r"^skip.steps holds \[3, 5\], but the state was saved after step 3, and step 3 was trained; resume from a state "
        r"before step 3, or skip steps from 4 on$"
    )
    with pytest.raises(ValueError, match=message):
        PackLoader(accepted, state=state)
    with pytest.raises(ValueError, match=r"or start a new run$"):  # no advice to accept the change
        PackLoader(_config(tokenizer, path, {"steps": [[3, 5]]}), state=state)
    PackLoader(_config(tokenizer, path, {"steps": [[4, 5]]}, accept_changed=NO_LONGER), state=state)


def test_a_span_of_skipped_steps_may_grow_at_its_end(tokenizer: str, path: str) -> None:
    loader = PackLoader(_config(tokenizer, path, {"steps": [[2, 3], [3, 3]]}))
    tiny.take(loader, 12)
    state = loader.state_dict()
    grown = _config(tokenizer, path, {"steps": [[2, 4]]}, accept_changed=NO_LONGER)
    packs = list(PackLoader(grown, state=state))
    assert [len(pack.segments) for pack in packs[:4]] == [0] * 4
    with pytest.raises(ValueError, match="and step 1 was trained"):
        PackLoader(_config(tokenizer, path, {"steps": [[1, 4]]}, accept_changed=NO_LONGER), state=state)


def test_rows_and_sources_that_do_not_exist_are_errors(tokenizer: str, path: str) -> None:
    with pytest.raises(ValueError, match=r"skip.rows holds \[0, 60\], but source 0 has 60 rows, counted from 0"):
        PackLoader(_config(tokenizer, path, {"rows": [[0, 60]]}))
    with pytest.raises(ValueError, match=r"skip.rows holds \[1, 0\], but there are 1 sources, counted from 0"):
        _config(tokenizer, path, {"rows": [[1, 0]]})
    with pytest.raises(ValueError, match=r"rows holds \[0, -1\]; give numbers of sources and rows, counted from 0"):
        _config(tokenizer, path, {"rows": [[0, -1]]})
    for steps in ([0, 3], [4, 3], [1, 10**13]):
        with pytest.raises(
            ValueError, match=rf"steps holds \[{steps[0]}, {steps[1]}\]; give the first and the last step"
        ):
            _config(tokenizer, path, {"steps": [steps]})


def test_a_skip_goes_along_with_a_change_that_reads_rows_again(tokenizer: str, path: str) -> None:
    loader = PackLoader(_config(tokenizer, path, {}))
    tiny.take(loader, 8)
    skip = {"rows": [[0, row] for row in range(0, 60, 7)]}
    accepted = _config(tokenizer, path, skip, capacity=192, accept_changed=("data.capacity", "data.skip"))
    packs = list(PackLoader(accepted, state=loader.state_dict()))
    rest = sorted((s.row, s.epoch) for pack in loader for s in pack.segments)
    assert sorted((s.row, s.epoch) for p in packs for s in (*p.segments, *p.skipped)) == rest
    assert {s.row % 7 for p in packs for s in p.skipped} == {0}
    assert 0 not in {s.row % 7 for p in packs for s in p.segments}


@pytest.mark.parametrize("number", range(DRAWS))
def test_random_skips_are_the_same_on_any_topology_and_over_any_resumes(
    number: int, tokenizer: str, tmp_path: Path
) -> None:
    print(f"seed {SEED}, draw {number}")
    draw = random.Random(f"{SEED}/{number}")
    sources: list[dict[str, Any]] = [
        {"path": tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.rows(draw.randint(20, 50), n)), "weight": 1.0}
        for n in range(2)
    ]
    if draw.random() < 0.5:
        sources[0] |= {"streaming": True, "shuffle": "shards"}
    first = draw.randint(1, 5)
    skip = {
        "rows": [[draw.randrange(2), draw.randrange(20)] for _ in range(draw.randint(0, 8))],
        "steps": [[first, first + draw.randint(0, 2)]] if draw.random() < 0.7 else [],
    }
    # Most of these rows are longer than 64 tokens.
    settings = {
        "streams": 6,
        "overflow": draw.choice(["drop", "split"]),
        "capacity": draw.choice([64, 256]),
        "max_too_long": 1.0,
    }
    whole = list(PackLoader(tiny.data_config(tokenizer, sources=sources, **settings)))
    config = tiny.data_config(tokenizer, sources=sources, skip=skip, **settings)
    steps = range(first, skip["steps"][0][1] + 1) if skip["steps"] else range(0)
    expected = _expected(whole, {(s, r) for s, r in skip["rows"]}, steps)
    found: list[tuple[Any, Any]] = []
    state: dict[str, Any] | None = None
    while len(found) < len(expected):
        shards = draw.choice([1, 2])
        loaders = [
            PackLoader(config, shard=Shard(r, shards), workers=draw.choice([0, 0, 1]), state=state)
            for r in range(shards)
        ]
        for _ in range(draw.randint(1, 4)):
            packs = [loader.next_step() for loader in loaders]
            found += [(p.segments, p.skipped) for group in zip(*packs, strict=True) for p in group]
        state = merge([loader.state for loader in loaders])
        for loader in loaders:
            loader.close()
    assert found[: len(expected)] == expected
    assert not any(segments or skipped for segments, skipped in found[len(expected) :])
