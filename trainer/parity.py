"""Is a model, spread over ranks, packed and trained as here, the model that `transformers` computes?

`python -m trainer.parity DIRECTORY`, or `torchrun --nproc-per-node N -m trainer.parity DIRECTORY --tp N`; data parallelism is
what tensor parallelism leaves. Prints a table; the exit code is 0 only where every line holds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from sftstream import IGNORE_INDEX, Pack, Segment
from trainer.distributed.mesh import ParallelConfig, Topology, distributed, exit_process, named_dtype, print_error
from trainer.llama.attention import Segments
from trainer.llama.hf_config import find_model, read_config
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.weights import load_weights, opened, unfused
from trainer.training.step import accumulate_gradients

Tensors = dict[str, Tensor]

LENGTHS = (29, 1, 17, 3, 14)
"""Tokens of a pack's conversations."""
CAPACITY = sum(LENGTHS)
NEW_TOKENS = 16
SLACK = 3


class Rounding(NamedTuple):
    """What two orders of the same sums may differ in: `step`, as a share of the expected tensor's vector norm `norm`."""

    step: float
    norm: float


# In float32 no single number may be off. In bfloat16 (a step of the format is 2^-8) the largest of many roundings is chance,
# their sum of squares is not.
ROUNDING = {torch.float32: Rounding(1e-5, math.inf), torch.bfloat16: Rounding(2.0**-8, 2.0)}


class Check(NamedTuple):
    """One line of the table: a relative `error`, its `limit`, and the tensor whose they are."""

    what: str
    error: float
    limit: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """NaN does not hold."""
        return self.error <= self.limit


class Answer(NamedTuple):
    """What a model makes of the packs: logits `(packs, T, vocabulary)`, mean loss, gradients and greedy tokens."""

    logits: Tensor
    loss: Tensor
    gradients: Tensors
    greedy: list[int]


def compare(model: Llama, directory: Path, topology: Topology, dtype: torch.dtype) -> list[Check]:
    """`model`, loaded from `directory` and computing in `dtype`, against transformers; the result is rank 0's.

    The packs go through the training step's own code: trained positions only, gradients summed over packs and ranks.
    transformers gets each conversation by itself, in float32 and with its plainest attention. How far it is from that in
    `dtype` and with torch's attention is its own rounding; `SLACK` times as far is a tensor's limit, where that is above
    `ROUNDING`. Needs memory for the model three times on rank 0.
    """
    packs = [random_pack(model.config.vocab_size, seed) for seed in range(2 * topology.dp)]
    new_tokens = NEW_TOKENS if dtype == torch.float32 else 0  # in bfloat16 rounding picks between equals
    found = _our_answer(model, packs, topology, new_tokens)
    weights = _weights_check(model, directory, topology)
    if not topology.first:
        return []
    expected = _public_answer(directory, packs, topology.device, torch.float32, "eager", new_tokens)
    rounded = _public_answer(directory, packs, topology.device, dtype, "sdpa", new_tokens=0)
    checks = _checks(found, expected, rounded, ROUNDING[dtype])
    if new_tokens:
        different = sum(a != b for a, b in zip(found.greedy, expected.greedy, strict=True))
        checks.append(Check(f"greedy tokens of {new_tokens} that differ", different, 0))
    return [*checks, weights]


def random_pack(vocab_size: int, seed: int) -> Pack:
    """Random conversations of `LENGTHS`; half of their tokens are trained."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(vocab_size, size=CAPACITY, dtype=np.int32)
    borders = np.cumsum([0, *LENGTHS], dtype=np.int32)
    segments = tuple(Segment(0, row, length, 0) for row, length in enumerate(LENGTHS))
    return Pack(ids, draw.random(CAPACITY) < 0.5, borders, segments)


def _public_answer(
    directory: Path, packs: list[Pack], device: torch.device, dtype: torch.dtype, attention: str, new_tokens: int
) -> Answer:
    """What transformers makes of the packs' conversations, one by one."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).to(device)
    trained = sum(pack.trained_tokens for pack in packs)
    loss, logits = torch.zeros((), device=device), []
    for pack in packs:
        for ids, labels in zip(pack.input_ids.split(LENGTHS), pack.labels.split(LENGTHS), strict=True):
            scores = model(input_ids=ids[None].to(device)).logits[0].float()
            part = F.cross_entropy(scores, labels.to(device), ignore_index=IGNORE_INDEX, reduction="sum") / trained
            part.backward()
            logits.append(scores.detach())
            loss += part.detach()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    greedy = _public_greedy(model, _prompt(packs).to(device), new_tokens) if new_tokens else []
    return Answer(torch.cat(logits).unflatten(0, (len(packs), -1)), loss, gradients, greedy)


def _public_greedy(model: Any, prompt: Tensor, new_tokens: int) -> list[int]:
    # Nothing but the argument: published settings have penalties for repetition and the like.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens)
    tokens: list[int] = model.generate(prompt[None])[0, len(prompt) :].tolist()
    return tokens


def _prompt(packs: list[Pack]) -> Tensor:
    return packs[0].input_ids[: LENGTHS[0]]


def _our_answer(model: Llama, packs: list[Pack], topology: Topology, new_tokens: int) -> Answer:
    device, shard = topology.device, topology.shard
    trained = sum(pack.trained_tokens for pack in packs)
    loss = accumulate_gradients(model, packs[shard.index :: shard.count], topology, trained)
    gradients = dict(unfused(model.config, {name: _gradient(p) for name, p in model.named_parameters()}))
    with torch.no_grad():
        logits = [_full(model(*_inputs(pack, device))).float() for pack in packs]
        greedy = _greedy(model, _prompt(packs).tolist(), device, new_tokens)
    return Answer(torch.stack(logits), loss, gradients, greedy)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _inputs(pack: Pack, device: torch.device) -> tuple[Tensor, Tensor, Segments]:
    segments = Segments(pack.cu_seqlens.to(device), pack.max_seqlen)
    return pack.input_ids.to(device), pack.position_ids.to(device), segments


def _full(logits: Tensor) -> Tensor:
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def _greedy(model: Llama, prompt: list[int], device: torch.device, new_tokens: int) -> list[int]:
    """The likeliest next tokens, the whole row computed anew for each: what follows the text is a segment of its own."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        length = len(tokens)
        ids = torch.tensor(tokens + [0] * (CAPACITY - length), device=device)
        borders = torch.tensor([0, length, CAPACITY], dtype=torch.int32, device=device)
        places = torch.arange(CAPACITY, device=device)
        last = torch.tensor([length - 1], device=device)
        tokens.append(int(_full(model(ids, places, Segments(borders, CAPACITY), last)).argmax()))
    return tokens[len(prompt) :]


def _checks(found: Answer, expected: Answer, rounded: Answer, rounding: Rounding) -> list[Check]:
    return [
        _worst(what, part(found), part(expected), part(rounded), rounding)
        for what, part in (("logits of packed conversations", _logits), ("loss", _loss), ("gradients", _gradients))
    ]


def _worst(what: str, found: Tensors, expected: Tensors, rounded: Tensors, rounding: Rounding) -> Check:
    """The tensor that is nearest to its limit, or farthest beyond it."""
    assert found.keys() == expected.keys() == rounded.keys()
    checks = []
    for name, tensor in expected.items():
        own = _error(rounded[name], tensor, rounding.norm)
        checks.append(Check(what, _error(found[name], tensor, rounding.norm), max(rounding.step, SLACK * own), name))
    return max(checks, key=lambda check: check.error / check.limit)


def _logits(answer: Answer) -> Tensors:
    return {"": answer.logits}


def _loss(answer: Answer) -> Tensors:
    return {"": answer.loss}


def _gradients(answer: Answer) -> Tensors:
    return answer.gradients


def _error(found: Tensor, expected: Tensor, norm: float) -> float:
    difference = vector_norm(found.double() - expected.double(), norm).item()
    if not math.isfinite(difference):
        return math.inf
    return float(difference and difference / vector_norm(expected.double(), norm).item())


@torch.no_grad()
def _weights_check(model: Llama, directory: Path, topology: Topology) -> Check:
    """Every weight, gathered and taken apart again, against the file that it came from."""
    different = 0
    with opened(directory) as files:
        for name, weight in unfused(model.config, dict(model.named_parameters())):
            if topology.first:
                stored = files[name].get_tensor(name).to(weight.device, weight.dtype)
                different += int(not torch.equal(weight, stored))
    return Check("weights read and gathered that differ", different, 0)


def table(checks: list[Check], title: str) -> Table:
    """The checks for people."""
    shown = Table(title=title)
    for column in ("", "error", "limit", "holds", "worst in"):
        shown.add_column(column, overflow="fold")
    for check in checks:
        holds = "yes" if check.holds else "NO"
        shown.add_row(check.what, f"{check.error:.2g}", f"{check.limit:.2g}", holds, check.where)
    return shown


def report(checks: list[Check], title: str, console: Console) -> int:
    """Print the table; 0 where every check holds."""
    console.print(table(checks, title))
    return 0 if all(check.holds for check in checks) else 1


def verdict(name: str, topology: Topology, dtype: torch.dtype) -> int:
    """Load the model, compare, print; the exit code on every rank."""
    directory = find_model(name)
    model = build(read_config(directory), topology.mesh, topology.device, capacity=CAPACITY, compute_dtype=dtype)
    load_weights(model, directory)
    checks = compare(model, directory, topology, dtype)
    box = [report(checks, f"{name}, {topology.describe()}, {dtype}", Console()) if topology.first else 1]
    dist.broadcast_object_list(box)
    return box[0]


def main(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or hub name.")],
    tp: Annotated[int, typer.Option(help="Ranks that share each layer.")] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
) -> None:
    """Compare a model as this trainer computes it with transformers; exit code 0 only where they agree."""
    disable_progress_bar()
    try:
        with distributed(device, ParallelConfig(tp=tp)) as topology:
            code = verdict(model, topology, named_dtype(dtype, topology.device))
    except ValueError as error:
        code = print_error(error)
    exit_process(code)


if __name__ == "__main__":
    typer.run(main)
