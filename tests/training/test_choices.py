"""The settings that a run leaves to "auto" are chosen by fixed rules, and a resume keeps them."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import runs
import torch
from gloo_ranks import run_ranks
from tiny_llama import CONFIG

from trainer import choices
from trainer.choices import Choices, KernelChoice, choose
from trainer.config_file import parse_config
from trainer.distributed.mesh import Topology, data_and_tensor_mesh, distributed


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


def not_found() -> None:
    raise RuntimeError


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        (lambda: ("torch", ["fa4 is missing"]), "auto", ("torch", ["fa4 is missing"])),
        (lambda: ("torch", []), "torch", ("torch", [])),
        (lambda: ("torch", []), "sdpa", ("sdpa", [])),  # of the checkpoint of a resume
        (lambda: None, "auto", ("sdpa", [])),
        (not_found, "auto", ("sdpa", [])),
    ],
)
def test_the_kernel_found_beside_the_start_is_used_if_it_is_wanted(
    found: Callable[[], Any],
    wanted: str,
    expected: tuple[str, list[str]],
    tmp_path: Path,
    tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(choices, "_choose_beside", lambda _: found())
    given = parse_config(runs.run_config(tokenizer, runs.sources(tmp_path), run={"device": "auto"}))
    config = msgspec.structs.replace(given, run=msgspec.structs.replace(given.run, attention=wanted))
    with closing(KernelChoice(given)) as choice, distributed("cpu", config.parallel) as topology:
        kernel, passed = choice.of(config, CONFIG, topology, None)
        assert (kernel.name, passed) == expected
        assert choice.of(config, CONFIG, topology, None).kernel.name == expected[0]


@pytest.mark.parametrize(("planned", "crowded"), [(None, False), ((85, 100), False), ((86, 100), True)])
def test_a_run_that_fills_its_gpu_waits_for_the_test_of_the_kernel(
    planned: tuple[int, int] | None, crowded: bool, tmp_path: Path, tokenizer: str
) -> None:
    config = parse_config(runs.run_config(tokenizer, runs.sources(tmp_path)))
    assert Choices(config, planned).crowded == crowded
