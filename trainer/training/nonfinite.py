"""Find the cause of a step whose loss or gradient is not finite: parameters and conversations."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from sftstream import Ref, Segments, Unapplied
from trainer.distributed.mesh import Topology
from trainer.llama.model import Llama
from trainer.llama.sharding import local
from trainer.training.optimizer import GradientNorms
from trainer.training.step import StepResult
from trainer.training.step_reader import StepReader

MOST_NAMED = 5
"""Parameters, and conversations, that a message names."""
MOST_IN_A_ROW = 10
"""Updates in a row that `run.on_nonfinite = "skip"` leaves out before the run stops."""


class Cause(NamedTuple):
    """The cause of a step whose update is not applied, equal on every rank."""

    record: Unapplied
    text: str
    """The record in words, for the user."""


def find_cause(
    step: int, result: StepResult, model: Llama, step_reader: StepReader, segments: Segments, topology: Topology
) -> Cause:
    """Return the cause of a loss or a gradient that is not finite. Collective.

    `step` is counted from 1. `segments` are those of the step, on the first rank. The conversations
    are those of the packs whose loss is not finite; if every pack's loss is finite, those of the
    whole step.
    """
    parameters = _broken_parameters(model, result.norms)
    packs = _broken_packs(step, result, step_reader, topology)
    box: list[Cause | None] = [None]
    if topology.first:
        given = segments[segments["trained_tokens"] >= 0]
        chosen = given[np.isin(given["pack"], packs)] if packs else given
        columns = (chosen[name].tolist() for name in Ref._fields)
        refs = tuple(dict.fromkeys(map(Ref._make, zip(*columns, strict=True))))
        record = Unapplied(
            step=step,
            loss=str(result.loss),
            grad_norm=str(result.grad_norm),
            parameters=parameters,
            packs=packs,
            conversations=refs,
        )
        box = [Cause(record, _in_words(record, len(result.norms.parameters), step_reader))]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def broken_weights(model: Llama) -> list[str]:
    """Return the names of the trained parameters that hold a number that is not finite. Collective.

    Waits for the device.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [local(parameter.detach()) for _, parameter in trained]
    held = [number for number, part in enumerate(parts) if part.numel()]  # an empty part has no largest number
    flags = torch.zeros(len(trained), dtype=torch.int32)
    if held:
        largest = torch._foreach_norm([parts[number] for number in held], math.inf, dtype=torch.float32)
        flags[held] = torch.stack(largest).cpu().isfinite().logical_not().int()
    dist.all_reduce(flags)
    return [name for (name, _), flag in zip(trained, flags.tolist(), strict=True) if flag]


def _broken_parameters(model: Llama, norms: GradientNorms) -> tuple[str, ...]:
    """Return the parameters whose gradient has a norm that is not finite on any rank."""
    names = [name for name, _ in model.named_parameters()]
    flags = torch.zeros(len(names), dtype=torch.int32)
    for numbers, values in norms.parts:
        for number, value in zip(numbers, values.tolist(), strict=True):
            flags[number] = not math.isfinite(value)
    dist.all_reduce(flags)
    return tuple(name for name, flag in zip(names, flags.tolist(), strict=True) if flag)


def _broken_packs(step: int, result: StepResult, step_reader: StepReader, topology: Topology) -> tuple[int, ...]:
    """Return the places in the step of the packs whose loss is not finite."""
    shards = step_reader.assignment.shards_of_step(step - 1)
    places = [place for place, shard in enumerate(shards) if shard == topology.shard.index]
    flags = torch.zeros(len(shards), dtype=torch.int32)
    for place, loss in zip(places, result.pack_losses, strict=True):
        flags[place] = not math.isfinite(loss)
    dist.all_reduce(flags)
    return tuple(place for place, flag in enumerate(flags.tolist()) if flag)


def _in_words(record: Unapplied, parameters: int, step_reader: StepReader) -> str:
    loader = step_reader.loader
    assert loader is not None
    where = f"pack {_listed(list(map(str, record.packs)))}" if record.packs else "the whole step"
    rows = [f"row {ref.row} of source {ref.source} ({loader.locate_row(ref)})" for ref in record.conversations]
    if not record.parameters:
        norms = "the norm of every parameter alone is finite"
    elif len(record.parameters) == parameters:
        norms = f"the norms of all {parameters} parameters are not finite"
    else:
        broken = f"{len(record.parameters)} of {parameters} parameters"
        norms = f"the norms of {broken} are not finite ({_listed(list(record.parameters))})"
    return (
        f"step {record.step}: the loss is {record.loss} and the gradient's norm {record.grad_norm}; {norms}; the "
        f"conversations of {where}: {_listed(rows)}"
    )


def _listed(names: list[str]) -> str:
    """Return the first `MOST_NAMED` names, and the number of further names."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
