"""Look at data and hardware, and write a config that runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from transformers import AutoConfig

from sftstream.config import MOST, Policy, SourceConfig
from sftstream.door import Door
from sftstream.starter.axolotl import Translated, read_axolotl
from sftstream.starter.hardware import Hardware, Plan, find_hardware, plan
from sftstream.starter.look import Look, look
from sftstream.starter.propose import Proposal, choose_model, propose
from sftstream.starter.toml import toml, toml_of
from sftstream.tokenization.encoder import ChatEncoder

FILLED = 0.95
"""Share of a GPU's memory that a run may fill by the estimate."""


class Started(NamedTuple):
    """A written config, and what it was made from."""

    look: Look
    proposal: Proposal
    hardware: Hardware
    plan: Plan | None
    """None for a run on CPUs."""


def start(source: SourceConfig, model: str | None, out: Path, gpus: int | None, template: str | None = None) -> Started:
    """Write a config for the data of `source` to `out`.

    `template` is a chat template in place of the tokenizer's own, as in `ChatEncoder`.
    Raises ValueError if the data holds no row to train, or if the model does not fit the GPUs.
    """
    hardware = find_hardware(gpus)
    model = model or choose_model(hardware)
    shape = _shape(model)
    policy = Policy(capacity=MOST["capacity"])
    encoder = ChatEncoder(
        model, template, policy=policy, template_setting=lambda path: f"--template {shlex.quote(path)}"
    )
    found = look(source, encoder)
    context, width = getattr(shape, "max_position_embeddings", None), getattr(shape, "hidden_size", None)
    if not hardware.gpus:
        proposal = propose(found, model, context, width, hardware, 1)
        _write(out, toml(found, proposal, hardware, template))
        return Started(found, proposal, hardware, None)
    refused = ""
    for tp in (size for size in (1, 2, 4, 8) if hardware.gpus % size == 0):
        proposal = propose(found, model, context, width, hardware, tp)
        content = toml(found, proposal, hardware, template)
        with TemporaryDirectory() as directory:
            candidate = Path(directory) / "run.toml"
            _write(candidate, content)
            planned = plan(candidate, hardware.gpus)
        if isinstance(planned, Plan) and planned.memory <= FILLED * hardware.memory:
            _write(out, content)
            return Started(found, proposal, hardware, planned)
        refused = planned if isinstance(planned, str) else f"it needs {planned.memory / 2**30:.0f} GiB on each GPU"
    raise ValueError(f"{model} cannot be trained on {hardware.name}: {refused}; give a smaller --model, or more --gpus")


def move_in(axolotl: Path, out: Path, gpus: int | None) -> Translated:
    """Write a config to `out` that trains as the config of axolotl in `axolotl` does.

    `gpus` is the number of GPUs of that training; None for the GPUs of this machine. Raises
    ValueError for settings that would mean something else here.
    """
    hardware = find_hardware(gpus)
    found = read_axolotl(axolotl, hardware.gpus)
    comments = (
        f"From {axolotl}, for {max(hardware.gpus, 1)} GPUs.",
        *(f"Without a counterpart: {told}" for told in found.told),
    )
    _write(out, toml_of(found.tables, comments))
    return found


def _shape(model: str) -> Any:
    with Door(f"model {model!r} cannot be opened"):
        return AutoConfig.from_pretrained(model, trust_remote_code=False)  # unset, transformers would ask a person


def _write(path: Path, content: str) -> None:
    with Door(f"{path} cannot be written"):
        path.write_text(content, encoding="utf-8")
