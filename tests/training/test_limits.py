"""Each limit that a message about a config names is true: the limit passes, and the next value is refused."""

from __future__ import annotations

import copy
import math
import re
import runpy
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
import runs

from sftstream import Shard
from sftstream.start import check_topology
from trainer.config import TrainConfig
from trainer.config_file import load_config, parse_config

GENERATOR = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs/generate_errors.py"))
CONFIGS = (
    *(
        "sftstream/config.py",
        "sftstream/start.py",
        "checkpoints/retention.py",
        "trainer/config.py",
        "trainer/config_file.py",
    ),
    *("trainer/distributed/mesh.py", "trainer/llama/config.py", "trainer/llama/lora/layers.py"),
    *("trainer/duration.py", "trainer/training/optimizer.py", "trainer/training/schedule.py"),
)
"""Files whose messages are about values of a config."""
Place = tuple[str | int, ...]
"""Keys from the config down to a value."""
RELATION = re.compile(r"multiple|even|exceed|first meet|not given|counted from|a state|decays")
"""A message about two settings that do not go together: the value is within its own limits."""


def table() -> dict[str, Any]:
    """Return a config with every table that holds a number."""
    config = runs.run_config("words", "rows.jsonl", run={"epochs": 2})
    config["data"]["sources"][0] |= {"weight": 1.0, "repeat": 1.0}
    scaling = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["model"]["rope_scaling"] = {**scaling, "original_max_position_embeddings": 64}
    config["optimizer"]["betas"] = [0.5, 0.5]
    config["schedule"] = {"kind": "wsd", "decay": 1}
    config["data"]["stages"] = [{"after": 5, "weights": [1.0]}]
    config["checkpoint"] |= {"keep": 1, "keep_every": 2}
    config["validation"] = {"sources": [{"path": "rows.jsonl"}], "every": 2, "global_batches": 1}
    config["evaluation"] = {"path": "rows.jsonl"}
    return config


def with_lora() -> dict[str, Any]:
    return table() | {"model": {"init_from": "model"}, "lora": {"rank": 2}}


def numbers(struct: Any, path: Place = ()) -> Iterator[tuple[Place, type]]:
    """Yield the place and the type of each number in a config; a list stands for its first element."""
    for name, hint in get_type_hints(struct).items():
        if name not in struct.__struct_fields__:
            continue
        place: Place = path if (struct.__name__, name) == ("ModelConfig", "shape") else (*path, name)
        kinds = [part for part in (hint, *get_args(hint)) if isinstance(part, type)]
        if structs := [part for part in kinds if issubclass(part, msgspec.Struct)]:
            yield from numbers(structs[0], (*place, 0) if get_origin(hint) is tuple else place)
        elif found := [part for part in kinds if part in (int, float)]:
            yield from (((*place, 0) if get_origin(hint) is tuple else place, kind) for kind in found)


EXCLUDED = re.compile(r"above 0|between 0 and 1|\[0, 1\)|positive|[^>]> |0 <")
"""A message about a limit that is no allowed value itself."""
MOVED = {"data.seed", "data.epochs"}
"""Keys of a training run's [run] table."""
PLACES = {
    f"{name}: {kind.__name__}": (place, kind)
    for place, kind in numbers(TrainConfig)
    if (name := ".".join(map(str, place))) not in MOVED
}


def whole_refusal(place: Place, value: object) -> str | None:
    """Return the message that refuses a config with a value; None if the config is valid."""
    config = with_lora() if place[0] == "lora" else copy.deepcopy(table())
    node: Any = config
    for name in place[:-1]:
        node = node.setdefault(name, {}) if isinstance(node, dict) else node[name]
    node[place[-1]] = value
    try:
        parse_config(config)
    except ValueError as error:
        return str(error)
    return None


def refusal(place: Place, value: object) -> str | None:
    """Return the message that refuses a value by itself; None within its limits."""
    message = whole_refusal(place, value)
    return None if message is None or RELATION.search(message) else message


def border(is_allowed: Callable[[Any], bool], inside: Any, outside: Any) -> tuple[Any, Any]:
    """Return the last allowed and the first refused value on the way from `inside` to `outside`."""
    while True:
        between = (inside + outside) // 2 if isinstance(inside, int) else (inside + outside) / 2
        if between in (inside, outside):
            return inside, outside
        if isinstance(between, int) and abs(inside - outside) == 1:
            return inside, outside
        inside, outside = (between, outside) if is_allowed(between) else (inside, between)


@lru_cache
def refusals(name: str) -> tuple[str, ...]:
    """Return the messages at the limits of a number, which name the limits."""
    place, kind = PLACES[name]
    inside = next(kind(v) for v in (4, 2, 1, 0.5, 0) if kind(v) == v and refusal(place, kind(v)) is None)
    messages = []
    for outside in (-(10**30), 10**30) if kind is int else (-1e300, 1e300):
        if refusal(place, outside) is not None:
            last, first = border(lambda value: refusal(place, value) is None, inside, outside)
            message = refusal(place, first)
            assert message is not None
            limits = {float(last)} | ({float(first)} if EXCLUDED.search(message) else set())
            assert limits & named(message), f"{first} is refused and {last} is not: {message}"
            messages.append(message)
    return tuple(messages)


def named(message: str) -> set[float]:
    """Return the numbers in a message, also those in words."""
    for words, number in (
        ("2**63 - 1", str(2**63 - 1)),
        ("-2**63", str(-(2**63))),
        ("not negative", "0"),
        ("positive", "0"),
    ):
        message = message.replace(words, number)
    return {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?\b", message)}


@pytest.mark.parametrize("name", PLACES)
def test_the_limits_of_a_number_are_those_in_its_message(name: str) -> None:
    assert refusals(name)


@pytest.mark.parametrize("name", [name for name, (_, kind) in PLACES.items() if kind is float])
def test_a_number_is_finite(name: str) -> None:
    assert refusal(PLACES[name][0], math.nan)
    assert refusal(PLACES[name][0], math.inf) or name == "optimizer.clip: float"


OTHERS = [
    ("profile = [3, 2] must be a first and a last step", "run.profile", [3, 2], [2, 3]),
    ("profile = [0, 2] must be a first and a last step", "run.profile", [0, 2], [1, 2]),
    ("name = 'a/b' must be a plain directory name", "run.name", "a/b", "b"),
    (
        "steps 1 must exceed warmup 1",
        "schedule",
        {"warmup": 1, "steps": 1, "kind": "cosine"},
        {"warmup": 1, "steps": 2},
    ),
    ("must be at most 1000d", "parallel.timeout", "1001d", "1000d"),
    ("stop_after = '1000d1s' must be at most 1000d", "run.stop_after", "1000d1s", "999d24h"),
    ("must be a multiple of num_attention_heads 5", "model.num_attention_heads", 5, 8),
    ("must be a multiple of num_key_value_heads 3", "model.num_key_value_heads", 3, 4),
    ("head_dim 7 must be even", "model.head_dim", 7, 8),
    ("rows holds [0, -1]", "run.skip", {"rows": [[0, -1]]}, {"rows": [[0, 0]]}),
    (
        "skip.rows holds [1, 0], but there are 1 sources, counted from 0",
        "run.skip",
        {"rows": [[1, 0]]},
        {"rows": [[0, 0]]},
    ),
]
"""Part of a message, a key, a refused value, and an allowed value by the message."""


@pytest.mark.parametrize(("message", "key", "refused", "allowed"), OTHERS, ids=[other[0] for other in OTHERS])
def test_a_value_within_the_limit_of_another_message_passes(message: str, key: str, refused: Any, allowed: Any) -> None:
    place = tuple(key.split("."))
    assert message in str(whole_refusal(place, refused))
    assert whole_refusal(place, allowed) is None


def test_workers_of_a_loader_are_0_or_more() -> None:
    with pytest.raises(ValueError, match=r"workers = -1 must be 0 \(load in this process\) or more"):
        check_topology(Shard(0, 1), -1)
    check_topology(Shard(0, 1), 0)


def test_an_override_of_a_list_counts_from_0(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("".join(f"{name} = {runs.toml(value)}\n" for name, value in table().items()))
    with pytest.raises(ValueError, match="'1' is not an index into a list of 1 elements, counted from 0"):
        load_config(path, ["data.sources.1.weight=2.0"])
    assert load_config(path, ["data.sources.0.weight=2.0"]).data.sources[0].weight == 2


def test_every_limit_of_a_config_is_tried() -> None:
    """A message without a remedy of its own says: stay within the limit."""
    tried = [message for name in PLACES for message in refusals(name)]
    tried += [str(whole_refusal(tuple(key.split(".")), refused)) for _, key, refused, _ in OTHERS]
    tried += ["workers = -1 must be 0 (load in this process) or more"]
    tried += ["override 'data.sources.1.weight': '1' is not an index into a list of 1 elements, counted from 0"]
    of_configs = [message for message in GENERATOR["messages"]() if message.place in CONFIGS]
    limits = [message for message in of_configs if not message.parts[1] and GENERATOR["LIMIT"].search(message.text)]
    assert len(limits) > 25
    patterns = [re.compile(re.sub(r"<[^>]*>", ".*", re.escape(m.text).replace(r"\ ", " "))) for m in limits]
    assert [p.pattern for p in patterns if not any(p.search(message) for message in tried)] == []
