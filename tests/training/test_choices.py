"""The settings that a run leaves to "auto" are chosen by fixed rules, and a resume keeps them."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from gloo_ranks import run_ranks
from tiny_llama import CONFIG

from trainer.choices import choose
from trainer.config_file import parse_config
from trainer.distributed.mesh import Topology, data_and_tensor_mesh


def chosen(rank: int, tables: dict[str, Any], saved_mesh: dict[str, int] | None) -> int | str:
    config = parse_config(tables)
    topology = Topology(data_and_tensor_mesh("cpu", config.parallel), torch.device("cpu"), config.parallel)
    return choose(config, CONFIG, topology, None, saved_mesh).config.parallel.replicas


@pytest.mark.parametrize(
    ("given", "saved_mesh", "expected"),
    [
        ("auto", None, 1),
        ("auto", {"dp": 2, "tp": 1, "replicas": 2}, 2),
        ("auto", {"dp": 2, "tp": 1, "replicas": 1}, 1),
        ("auto", {"dp": 2, "tp": 1}, 1),  # of a version without replicas
        ("auto", {"dp": 4, "tp": 1, "replicas": 4}, 1),
        ("auto", {"dp": 1, "tp": 2, "replicas": 1}, 1),
        (2, {"dp": 2, "tp": 1, "replicas": 1}, 2),
    ],
)
def test_replicas_are_those_of_the_checkpoint_on_equal_ranks(
    given: int | str, saved_mesh: dict[str, int] | None, expected: int, tmp_path: Path, tokenizer: str
) -> None:
    tables = runs.run_config(tokenizer, runs.sources(tmp_path), parallel={"replicas": given})
    assert run_ranks(2, chosen, tables, saved_mesh) == [expected] * 2
