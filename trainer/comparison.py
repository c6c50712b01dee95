"""Compare a model in this trainer, packed and sharded over ranks, with the same model in
`transformers`.

The work of the command `trainer.parity`: a table of errors and limits; the exit code is 0 only if
every error is within its limit. The directory may hold a PEFT adapter: the model is then its base
model with the adapter, compared with `peft` (`pip install peft`).

Example: in bfloat16, if transformers' own bfloat16 gradient of a weight is 0.02 away from the
float32 gradient (relative, in 2-norm), the limit for this trainer's gradient of the weight is SLACK
* 0.02 = 0.06.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from sftstream import IGNORE_INDEX, Pack, Segment
from trainer.distributed.mesh import Topology
from trainer.llama.attention import Segments
from trainer.llama.hf_config import find_model, read_config
from trainer.llama.lora.files import (
    PREFIX,
    WEIGHTS,
    is_adapter,
    load_adapters,
    read_adapter_config,
    trained_layout,
)
from trainer.llama.lora.nf4 import quantized
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.weights import layout, load_weights, opened, opened_file, unfused_pieces
from trainer.training.step import accumulate_gradients

Tensors = dict[str, Tensor]

LENGTHS = (29, 1, 17, 3, 14)
"""Tokens of each conversation in a pack."""
CAPACITY = sum(LENGTHS)
NEW_TOKENS = 16
"""Length of the compared greedy continuation."""
SLACK = 3
"""Allowed multiple of transformers' own rounding error."""


class Rounding(NamedTuple):
    """Smallest limit of a relative error in a dtype."""

    step: float
    """Limit, relative to the norm of the expected tensor."""
    norm: float
    """Order of the vector norm; inf is the largest element."""


# float32 is judged by the largest error. In bfloat16 (8 bits of precision) the largest of many
# rounding errors is random, and the 2-norm is not.
ROUNDING = {torch.float32: Rounding(1e-5, math.inf), torch.bfloat16: Rounding(2.0**-8, 2.0)}


CPU = torch.device("cpu")


class Check(NamedTuple):
    """A line of the table."""

    subject: str
    """The compared quantity."""
    error: float
    """Relative error, or a count of differences."""
    limit: float
    tensor: str = ""
    """Name of the worst tensor."""

    @property
    def holds(self) -> bool:
        """True if the error is within the limit; False for NaN."""
        return self.error <= self.limit


class Answer(NamedTuple):
    """Outputs of a model for the packs."""

    logits: Tensor
    """float32 `(packs, capacity, vocabulary)`."""
    loss: Tensor
    """Mean cross-entropy over the trained tokens, in nats, a scalar."""
    gradients: Tensors
    """Gradient of the loss by the parameter's name in transformers."""
    greedy: list[int]
    """Greedy continuation of the first conversation, as token ids."""


def compare(
    model: Llama, directory: Path, topology: Topology, dtype: torch.dtype, adapter: Path | None = None
) -> list[Check]:
    """Compare `model`, loaded from `directory`, with transformers. Collective.

    With `adapter`, the directory of a PEFT adapter that was loaded into `model`, `peft` adds the
    adapter to the model of transformers, and only the gradients of trained weights are compared.

    Returns the checks on rank 0, [] on other ranks. The packs pass through the training step's
    code: trained positions only, gradients summed over packs and ranks. transformers computes each
    conversation alone, in float32 with its "eager" attention: the expected values. A second
    transformers model, in `dtype` with "sdpa" attention, measures the rounding error of `dtype`. A
    tensor's limit is `SLACK` times the rounding error, or `ROUNDING` if larger. Needs memory for
    three copies of the model on rank 0.
    """
    packs = [random_pack(model.config.vocab_size, seed) for seed in range(2 * topology.dp)]
    new_tokens = NEW_TOKENS if dtype == torch.float32 else 0  # in bfloat16, rounding decides between near-equal logits
    ours = _our_answer(model, packs, topology, new_tokens)
    weights = _weights_check(model, directory, topology, adapter)
    if not topology.first:
        return []
    quantize = None if model.lora is None else model.lora.quantize
    public = partial(_public_answer, directory, adapter, quantize, packs, topology.device)
    expected, rounded = public(torch.float32, "eager", new_tokens), public(dtype, "sdpa", 0)
    checks = _checks(ours, expected, rounded, ROUNDING[dtype])
    if new_tokens:
        different = sum(a != b for a, b in zip(ours.greedy, expected.greedy, strict=True))
        checks.append(Check(f"greedy tokens of {new_tokens} that differ", different, 0))
    return [*checks, weights]


def random_pack(vocab_size: int, seed: int) -> Pack:
    """Return a pack of random conversations of `LENGTHS` tokens, about half of them trained."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(vocab_size, size=CAPACITY, dtype=np.int32)
    borders = np.cumsum([0, *LENGTHS], dtype=np.int32)
    segments = tuple(Segment(0, row, length, 0) for row, length in enumerate(LENGTHS))
    return Pack(ids, draw.random(CAPACITY) < 0.5, borders, segments)


def _public_answer(
    directory: Path,
    adapter: Path | None,
    quantize: str | None,
    packs: list[Pack],
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    new_tokens: int,
) -> Answer:
    """Compute the packs' conversations one by one with transformers."""
    model = public_model(directory, adapter, dtype, attention, quantize, device).to(device)
    # transformers gives the row of a padding token no gradient; a packed run has no padding token.
    model.get_input_embeddings().padding_idx = None
    trained = sum(pack.trained_tokens for pack in packs)
    loss, logits = torch.zeros((), device=device), []
    for pack in packs:
        for ids, labels in zip(pack.input_ids.split(LENGTHS), pack.labels.split(LENGTHS), strict=True):
            scores = model(input_ids=ids[None].to(device)).logits[0].float()
            part = F.cross_entropy(scores, labels.to(device), ignore_index=IGNORE_INDEX, reduction="sum") / trained
            part.backward()
            logits.append(scores.detach())
            loss += part.detach()
    gradients = {public_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    greedy = _public_greedy(model, _prompt(packs).to(device), new_tokens) if new_tokens else []
    return Answer(torch.cat(logits).unflatten(0, (len(packs), -1)), loss, gradients, greedy)


def public_model(
    directory: Path,
    adapter: Path | None,
    dtype: torch.dtype,
    attention: str,
    quantize: str | None = None,
    device: torch.device = CPU,
) -> Any:
    """Return a model of transformers, with trainable adapters of `peft` if `adapter` is given.

    `quantize` "nf4" is the 4-bit quantization of bitsandbytes, made on `device`: the model computes
    with the restored weights.

    Raises ValueError if `peft` is needed and not installed.
    """
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    if quantize is not None:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        settings["device_map"] = {"": device}  # by default a GPU, if there is one
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **settings)
    if quantize is not None:
        # A product with codes is a kernel of its own, which on a CPU computes in bfloat16.
        model = model.dequantize().to(dtype)
        model.requires_grad_(False)
    if adapter is None:
        return model
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise ValueError("a comparison of adapters needs peft; run `pip install peft`") from None
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def public_name(name: str) -> str:
    """Return the name of a parameter in a model of `peft` as `trained_layout` spells it."""
    return name.removeprefix(PREFIX).replace(".default", "").replace(".modules_to_save", "")


def _public_greedy(model: Any, prompt: Tensor, new_tokens: int) -> list[int]:
    # Published generation settings may hold a repetition penalty and the like.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens)
    tokens: list[int] = model.generate(prompt[None])[0, len(prompt) :].tolist()
    return tokens


def _prompt(packs: list[Pack]) -> Tensor:
    return packs[0].input_ids[: LENGTHS[0]]


def _our_answer(model: Llama, packs: list[Pack], topology: Topology, new_tokens: int) -> Answer:
    device, shard = topology.device, topology.shard
    tokens = sum(pack.trained_tokens for pack in packs)
    loss = accumulate_gradients(model, packs[shard.index :: shard.count], topology, tokens)
    trained = {name: _gradient(p) for name, p in model.named_parameters() if p.requires_grad}
    gradients = dict(unfused_pieces(trained_layout(model.config, model.lora), trained))
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
    """Return the `new_tokens` likeliest tokens after `prompt`, without a cache.

    Each token recomputes the full pack; the unused tail of the pack is a segment of its own.
    """
    tokens = list(prompt)
    for _ in range(new_tokens):
        length = len(tokens)
        ids = torch.tensor(tokens + [0] * (CAPACITY - length), device=device)
        borders = torch.tensor([0, length, CAPACITY], dtype=torch.int32, device=device)
        positions = torch.arange(CAPACITY, device=device)
        last = torch.tensor([length - 1], device=device)
        tokens.append(int(_full(model(ids, positions, Segments(borders, CAPACITY), last)).argmax()))
    return tokens[len(prompt) :]


def _checks(ours: Answer, expected: Answer, rounded: Answer, rounding: Rounding) -> list[Check]:
    return [
        _worst(subject, part(ours), part(expected), part(rounded), rounding)
        for subject, part in (("logits of packed conversations", _logits), ("loss", _loss), ("gradients", _gradients))
    ]


def _worst(subject: str, ours: Tensors, expected: Tensors, rounded: Tensors, rounding: Rounding) -> Check:
    """Return the check of the tensor with the largest ratio of error to limit."""
    assert ours.keys() == expected.keys() == rounded.keys()
    checks = []
    for name, tensor in expected.items():
        limit = max(rounding.step, SLACK * _error(rounded[name], tensor, rounding.norm))
        checks.append(Check(subject, _error(ours[name], tensor, rounding.norm), limit, name))
    return max(checks, key=lambda check: check.error / check.limit)


def _logits(answer: Answer) -> Tensors:
    return {"": answer.logits}


def _loss(answer: Answer) -> Tensors:
    return {"": answer.loss}


def _gradients(answer: Answer) -> Tensors:
    return answer.gradients


def _error(actual: Tensor, expected: Tensor, norm: float) -> float:
    difference = vector_norm(actual.double() - expected.double(), norm).item()
    if not math.isfinite(difference):
        return math.inf
    return float(difference and difference / vector_norm(expected.double(), norm).item())


@torch.no_grad()
def _weights_check(model: Llama, directory: Path, topology: Topology, adapter: Path | None) -> Check:
    """Compare every weight, gathered from the ranks and unfused, with its file, bit for bit."""
    different = 0
    parameters = dict(model.named_parameters())
    trained = {} if adapter is None else trained_layout(model.config, model.lora)
    compared_elsewhere = trained.keys() | quantized(model).keys()
    frozen = {name: pieces for name, pieces in layout(model.config).items() if name not in compared_elsewhere}
    with opened(directory) as files:
        for name, weight in unfused_pieces(frozen, parameters):
            different += topology.first and not _equal(weight, files[name].get_tensor(name))
    if adapter is not None:
        with opened_file(adapter / WEIGHTS) as file:
            for name, weight in unfused_pieces(trained, parameters):
                different += topology.first and not _equal(weight, file.get_tensor(PREFIX + name))
    return Check("weights read and gathered that differ", different, 0)


def _equal(weight: Tensor, stored: Tensor) -> bool:
    return torch.equal(weight, stored.to(weight.device, weight.dtype))


def table(checks: list[Check], title: str) -> Table:
    """Return the checks as a table."""
    shown = Table(title=title)
    for column in ("", "error", "limit", "holds", "worst in"):
        shown.add_column(column, overflow="fold")
    for check in checks:
        holds = "yes" if check.holds else "NO"
        shown.add_row(check.subject, f"{check.error:.2g}", f"{check.limit:.2g}", holds, check.tensor)
    return shown


def report(checks: list[Check], title: str, console: Console) -> int:
    """Print the checks and return the exit code: 0 if every check holds, else 1."""
    console.print(table(checks, title))
    return 0 if all(check.holds for check in checks) else 1


def report_json(checks: list[Check], console: Console) -> int:
    """Print the checks as one JSON document and return the exit code, as `report` does."""
    listed = [{**check._asdict(), "holds": check.holds} for check in checks]
    console.print_json(msgspec.json.encode({"holds": all(check.holds for check in checks), "checks": listed}).decode())
    return 0 if all(check.holds for check in checks) else 1


def verdict(name: str, topology: Topology, dtype: torch.dtype, *, as_json: bool = False) -> int:
    """Load, compare, print; return the exit code on every rank. Collective."""
    directory, lora, adapter = find_model(name), None, None
    if is_adapter(directory):
        lora, base = read_adapter_config(adapter := directory)
        directory = find_model(base)
    shape = read_config(directory)
    model = build(shape, topology.mesh, topology.device, capacity=CAPACITY, compute_dtype=dtype, lora=lora)
    load_weights(model, directory)
    if adapter is not None:
        load_adapters(model, adapter)
    checks = compare(model, directory, topology, dtype, adapter)
    box = [1]
    if topology.first:
        title = f"{name}, {topology.describe()}, {dtype}"
        box = [report_json(checks, Console()) if as_json else report(checks, title, Console())]
    dist.broadcast_object_list(box)
    return box[0]
