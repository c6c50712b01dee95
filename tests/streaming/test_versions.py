"""With other versions of libraries a resume goes on if the waiting rows give the same tokens, and stops if not."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny

from sftstream import DataConfig, DataState, PackLoader
from sftstream.streaming.version_check import require_equal_tokens

OLD = {"tokenizers": "0.1.0", "transformers": "1.2.3", "jinja2": "2.0"}


@pytest.fixture
def config(tokenizer: str, tmp_path: Path) -> DataConfig:
    (tmp_path / "shards").mkdir()
    for number in range(3):
        tiny.write_jsonl(tmp_path / "shards" / f"{number}.jsonl", tiny.rows(9, seed=number))
    sources = [
        {"path": tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(40)), "weight": 1},
        {"path": str(tmp_path / "shards"), "streaming": True, "shuffle": "shards", "weight": 1},
    ]
    return tiny.data_config({"path": tokenizer, "backend": "huggingface"}, sources=sources, capacity=128)


def _of_old_versions(loader: PackLoader) -> dict[str, Any]:
    state = loader.state.builtins()
    state["identity"]["versions"] = OLD
    return tiny.resealed(state)


@pytest.mark.parametrize("packs", [0, 3, 8, 17])
def test_equal_tokens_go_on_and_the_state_notes_the_new_versions(config: DataConfig, packs: int) -> None:
    loader = PackLoader(config)
    tiny.take(loader, packs)
    state = _of_old_versions(loader)
    resumed = PackLoader(config, state=state)
    assert resumed.state == loader.state
    assert tiny.digests(resumed) == tiny.digests(loader)


def test_other_tokens_are_an_error_that_names_both_versions_and_the_row(config: DataConfig) -> None:
    loader = PackLoader(config)
    tiny.take(loader, 8)
    state = _of_old_versions(loader)
    stream = next(s for s in state["streams"].values() if s["leftovers"])
    last = stream["leftovers"][-1][0]
    stream["digests"][-1] ^= 1
    with pytest.raises(ValueError, match=r"^the libraries changed ") as error:
        PackLoader(config, state=tiny.resealed(state))
    message = str(error.value)
    versions = ", ".join(f"{name} {old} -> {metadata.version(name)}" for name, old in OLD.items())
    assert message.startswith(f"the libraries changed ({versions}), and the rows planned together give other tokens ")
    assert f"than before (row {last[1]} of source {last[0]})" in message
    assert message.endswith("data.accept_changed = ['data.versions']")
    accepting = msgspec.structs.replace(config, accept_changed=("data.versions",))
    accepted = PackLoader(accepting, state=tiny.resealed(state))
    assert "data.versions.tokenizers: '0.1.0' -> " in str(accepted.state.history)
    given = [(s.source, s.row, s.epoch) for pack in accepted for s in pack.segments]
    assert sorted(given) == sorted((s.source, s.row, s.epoch) for pack in loader for s in pack.segments)


def test_another_mask_of_equal_length_is_found(config: DataConfig) -> None:
    loader = PackLoader(config)
    tiny.take(loader, 5)
    state = _of_old_versions(loader)
    state["identity"]["train_on"] = ["user"]
    user = msgspec.structs.replace(config, train_on=("user",))
    with pytest.raises(ValueError, match=r"the libraries changed .* give other tokens or trained spans"):
        PackLoader(user, state=tiny.resealed(state))


def test_a_state_without_digests_is_compared_by_lengths(config: DataConfig) -> None:
    loader = PackLoader(config)
    tiny.take(loader, 9)
    state = _of_old_versions(loader)
    for stream in state["streams"].values():
        del stream["digests"]  # as in a state of format 3
    assert tiny.digests(PackLoader(config, state=tiny.resealed(state))) == tiny.digests(loader)
    stream = next(s for s in state["streams"].values() if s["leftovers"])
    first = stream["leftovers"][0][0]
    first[2] += 1
    row = f"row {first[1]} of source {first[0]} gave {first[2]} tokens before and gives {first[2] - 1} now"
    with pytest.raises(ValueError, match=row):
        require_equal_tokens(["x 1 -> 2"], DataState.parse(tiny.resealed(state)).streams, loader.corpus, loader.encoder)
