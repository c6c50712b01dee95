"""Choose the settings that a config leaves to "auto", once, before a model is loaded, and the
attention kernel beside the load.

The rules depend on the device, its memory and the installed packages alone, never on a measured
time, so that equal machines choose alike:

| setting                          | "auto" on a GPU                              | on a CPU  |
|----------------------------------|----------------------------------------------|-----------|
| `run.compile`                    | true                                         | false     |
| `run.attention`                  | the fastest kernel that passes `prove`       | "sdpa"    |
| `run.weights_dtype`              | float32, or bfloat16 if float32 does not     | "float32" |
|                                  | fit; under adapters that of the computation  |           |
| `run.recompute`                  | the least that fits: none, selective, full   | "none"    |
| `parallel.replicas`              | all data-parallel ranks, see `_replicas`,    | 1         |
|                                  | if this fits beside that recomputation       |           |
| `parallel.reshard_after_forward` | false if the gathered weights fit beside     | true      |
|                                  | that recomputation                           |           |

A resumed run uses the choices of its checkpoint, except for `parallel.reshard_after_forward`, which
changes no bit, and for `parallel.replicas` with another number of ranks. On a machine with less
memory, weights that do not fit are sharded, and compiled layers recompute more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from msgspec import UNSET

from sftstream import Beside
from trainer.checkpointing.settings import Settings
from trainer.config import RunConfig, TrainConfig
from trainer.distributed.mesh import Topology, check_ranks, device_of, named_dtype
from trainer.llama.attention import KERNELS, Kernel, KernelName, Shape, choose_kernel, keep_compiled_kernels
from trainer.llama.blocks import WAYS, Recompute
from trainer.llama.config import LlamaConfig
from trainer.llama.float8 import require_device, require_multiples
from trainer.memory import GPU, memory
from trainer.training.model import find_source

FILLED = 0.95
"""Share of a GPU's memory that a run may fill by the estimate."""
CROWDED = 0.85
"""Share of a GPU's memory that a run plans to fill, above which a start waits for the test of the
attention kernel before the model is loaded: the test needs up to 1.5 GiB for a pack of Llama 8B."""
STDERR = 2
"""Descriptor of the error output of a process."""


class Choices(NamedTuple):
    """The settings of a run, none of them "auto" but `run.attention`."""

    config: TrainConfig
    planned: tuple[int, int] | None
    """Bytes that the run is estimated to fill on each GPU, and bytes of the smallest GPU; None on
    CPUs."""

    @property
    def crowded(self) -> bool:
        """True if no other process should use the GPU beside the load of the model."""
        return self.planned is not None and self.planned[0] > CROWDED * self.planned[1]


class ChosenKernel(NamedTuple):
    """The attention kernel of a run."""

    kernel: Kernel
    passed: list[str]
    """A reason for each faster kernel that was passed over."""


def choose(
    config: TrainConfig,
    shape: LlamaConfig,
    topology: Topology,
    saved: Settings | None,
    saved_mesh: Mapping[str, int] | None = None,
) -> Choices:
    """Return the choices of a run; `saved` are the settings of the checkpoint of a resume, and
    `saved_mesh` the sizes of its mesh.

    Collective. Raises ValueError if GPU or model does not suit float8 or `run.attention`, if the
    package of `run.attention` is missing, or if the model does not fit the memory of the GPU.
    """
    if config.run.float8:
        require_device(topology.device)
        require_multiples(shape, topology.tp)
    least = "none" if saved is None or saved.recompute is UNSET else saved.recompute
    config = _with_run(config, _as_saved(config.run, saved))
    if config.run.attention != "auto":
        with _of_checkpoint(config, saved):
            kernel = KERNELS[config.run.attention]
            kernel.require(topology.device, named_dtype(config.run.compute_dtype, topology.device), shape.head_size)
            kernel.require_installed()
    before = _saved_replicas(topology, saved_mesh)
    size = _gpu_memory(topology)
    compiled = config.run.compile if config.run.compile != "auto" else topology.device.type == "cuda"
    settings = msgspec.structs.replace(config.run, compile=compiled)
    if size is None:
        (stored,) = _stored_dtypes(config, topology.device)
        way = least if settings.recompute == "auto" else settings.recompute
        chosen = _with_run(config, msgspec.structs.replace(settings, weights_dtype=stored, recompute=way))
        replicas = before or 1 if config.parallel.replicas == "auto" else config.parallel.replicas
        return Choices(_with_parallel(chosen, reshard_after_forward=config.parallel.reshards, replicas=replicas), None)
    gpus = dist.get_world_size()
    chosen = with_memory_settings(_with_run(config, settings), shape, gpus, size, least, before)
    _require_fit(chosen, shape, gpus, size)
    return Choices(chosen, (sum(memory(chosen, shape, gpus).values()), size))


class KernelChoice:
    """The choice of a run's attention kernel, on a GPU in a process beside the start of the run.

    FlashAttention-4 compiles for 9 s at the first start on a machine, and stops all other threads
    of its process meanwhile. A KernelChoice is made before the process uses CUDA, which a process
    forked later cannot use.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._beside: Beside[tuple[KernelName, list[str]] | None] | None = None
        self._found: tuple[KernelName, list[str]] | None = None
        if config.run.device != "cpu" and torch.backends.cuda.is_built():
            keep_compiled_kernels()
            self._beside = Beside(partial(_choose_beside, config))

    def wait(self) -> None:
        """Wait for the process."""
        if self._beside:
            self._found = self._beside.result()
            self._beside = None

    def of(self, config: TrainConfig, shape: LlamaConfig, topology: Topology, saved: Settings | None) -> ChosenKernel:
        """Return the kernel of a run whose other choices are made.

        Raises ValueError if no kernel can be used.
        """
        self.wait()
        if self._found and config.run.attention in ("auto", self._found[0]):
            name, passed = self._found
            return ChosenKernel(KERNELS[name], passed)
        with _of_checkpoint(config, saved):
            return _choose_kernel(config, shape, topology.device)

    def close(self) -> None:
        """End the process."""
        if self._beside:
            self._beside.close()


@contextmanager
def _of_checkpoint(config: TrainConfig, saved: Settings | None) -> Iterator[None]:
    """Add a remedy to an error about an attention kernel that a checkpoint has chosen."""
    try:
        yield
    except ValueError as error:
        if saved is None or saved.attention != config.run.attention:
            raise
        raise ValueError(
            f'the checkpoint was made with attention "{saved.attention}", which cannot be used here: {error}; or set '
            'run.accept_changed = ["run.attention"] and name another kernel in run.attention, such as "torch" on a GPU'
        ) from error


def _choose_beside(config: TrainConfig) -> tuple[KernelName, list[str]] | None:
    """Return the name of the kernel, and why faster ones were passed over; None without a GPU."""
    device = device_of(config.run.device)
    if device.type == "cpu":
        return None
    shape = find_source(config.model, config.data.tokenizer.path, config.lora).shape
    # Compilers print warnings. `KernelChoice.of` meets an error again, where the error is printed.
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDERR)
    kernel, passed = _choose_kernel(config, shape, device)
    return kernel.name, passed


def _choose_kernel(config: TrainConfig, shape: LlamaConfig, device: torch.device) -> ChosenKernel:
    tp = config.parallel.tp
    queries, groups = shape.num_attention_heads // tp, shape.num_key_value_heads // tp
    heads = Shape(config.data.capacity, queries, groups, shape.head_size)
    return ChosenKernel(
        *choose_kernel(config.run.attention, heads, device, named_dtype(config.run.compute_dtype, device))
    )


def with_memory_settings(
    config: TrainConfig,
    shape: LlamaConfig,
    gpus: int,
    size: int,
    least: Recompute = "none",
    replicas: int | None = None,
) -> TrainConfig:
    """Return `config` with "auto" replaced in the settings that decide memory on a GPU.

    Takes the first `run.weights_dtype`, `run.recompute`, `parallel.replicas` and
    `parallel.reshard_after_forward` whose estimate fills at most `FILLED` of `size` bytes: float32
    before bfloat16, for each less recomputation first, from `least` on, for each `_replicas` in
    order, and for each gathered weights that are kept first. If none fits, takes the smallest.
    `replicas` is the number of a checkpoint of as many ranks.

    Raises ValueError as `memory` does.
    """
    run, parallel = config.run, config.parallel
    check_ranks(gpus, parallel)
    ways = WAYS[WAYS.index(least) :] if run.recompute == "auto" else (run.recompute,)
    freed = (False, True) if parallel.reshard_after_forward == "auto" else (parallel.reshard_after_forward,)
    for dtype in _stored_dtypes(config, GPU):
        for way, groups, frees in product(ways, _replicas(config, gpus, dtype, replicas), freed):
            chosen = _with_run(config, msgspec.structs.replace(run, weights_dtype=dtype, recompute=way))
            chosen = _with_parallel(chosen, replicas=groups, reshard_after_forward=frees)
            if sum(memory(chosen, shape, gpus).values()) <= FILLED * size:
                return chosen
    return chosen


def _replicas(config: TrainConfig, gpus: int, dtype: str, before: int | None) -> tuple[int, ...]:
    """Return the values of `parallel.replicas` to try, the preferred first.

    "auto" prefers whole weights on each data-parallel rank where this was measured to be faster:
    under adapters, whose gradients are small, and for two ranks of bfloat16 weights, whose
    gradients are exchanged in bfloat16. `before` is the number of a checkpoint.
    """
    parallel = config.parallel
    if parallel.replicas != "auto":
        return (parallel.replicas,)
    dp = gpus // parallel.tp
    faster = config.lora is not None or (dp == 2 and dtype == "bfloat16")
    whole = faster and parallel.tp == 1 and parallel.reduce_gradients == "step"
    return (dp, 1) if (whole if before is None else before == dp) else (1,)


def _stored_dtypes(config: TrainConfig, device: torch.device) -> tuple[Literal["float32", "bfloat16"], ...]:
    """Return the possible values of `run.weights_dtype` on `device`: several only for "auto".

    Frozen weights lose nothing in the format of the computation.
    """
    if config.run.weights_dtype != "auto":
        return (config.run.weights_dtype,)
    if config.lora is not None:
        return ("bfloat16",) if named_dtype(config.run.compute_dtype, device) == torch.bfloat16 else ("float32",)
    return ("float32", "bfloat16") if device.type == "cuda" else ("float32",)


def _with_run(config: TrainConfig, run: RunConfig) -> TrainConfig:
    return msgspec.structs.replace(config, run=run)


def _with_parallel(config: TrainConfig, **settings: Any) -> TrainConfig:
    return msgspec.structs.replace(config, parallel=msgspec.structs.replace(config.parallel, **settings))


def _saved_replicas(topology: Topology, saved_mesh: Mapping[str, int] | None) -> int | None:
    """Return the replicas of a checkpoint of as many ranks that "auto" can choose, else None."""
    if saved_mesh is None or any(saved_mesh.get(name) != topology.sizes[name] for name in ("dp", "tp")):
        return None
    before = saved_mesh.get("replicas", 1)
    return before if before in (1, topology.dp) else None


def _as_saved(run: RunConfig, saved: Settings | None) -> RunConfig:
    """Return `run` with the saved choices where it says "auto"."""
    if saved is None:
        return run
    stored = {"compile": saved.compile, "weights_dtype": saved.weights_dtype, "attention": saved.attention}
    return msgspec.structs.replace(
        run, **{name: value for name, value in stored.items() if getattr(run, name) == "auto" and value is not UNSET}
    )


def _gpu_memory(topology: Topology) -> int | None:
    """Return the bytes of the smallest GPU of the run, None on CPUs. Collective."""
    if topology.device.type != "cuda":
        return None
    size = torch.tensor(torch.cuda.get_device_properties(topology.device).total_memory)
    dist.all_reduce(size, op=dist.ReduceOp.MIN)
    return int(size.item())


def _require_fit(config: TrainConfig, shape: LlamaConfig, gpus: int, size: int) -> None:
    """Raise ValueError if the parts that are counted exactly exceed the memory of a GPU."""
    least = _least(config, shape, gpus)
    if least <= size:
        return
    run = config.run
    remedies = ['set run.weights_dtype = "bfloat16"'] if run.weights_dtype == "float32" else []
    # Each data-parallel coordinate needs a stream, and a pack of each step to be of use.
    streams = config.data.global_batch if config.data.streams == "auto" else config.data.streams
    most = streams * config.parallel.tp
    step = config.parallel.tp * config.parallel.groups
    more = (n for n in range(gpus + step, most + 1, step) if _least(config, shape, n) <= FITS * size)
    needed = next(more, None)
    remedies += [f"start {needed} GPUs or more"] if needed else []
    sharded = _with_parallel(config, replicas=1)
    if config.parallel.groups > 1 and _least(sharded, shape, gpus) <= FITS * size:
        remedies.insert(0, "set parallel.replicas = 1")
    raise ValueError(
        f"the model does not fit: weights, gradients and optimizer alone need {least / 2**30:.0f} GiB on each GPU, which "
        f"has {size / 2**30:.0f} GiB; {' or '.join([*remedies, 'use a smaller model'])}"
    )


FITS = 0.8
"""Share of a GPU's memory left to weights, gradients and optimizer in a remedy."""


def _least(config: TrainConfig, shape: LlamaConfig, gpus: int) -> int:
    parts = memory(config, shape, gpus)
    return sum(parts[name] for name in ("weights", "optimizer", "gradients", "working weights"))


def choices_line(choices: Choices, attention: ChosenKernel, topology: Topology, saved: Settings | None) -> str:
    """Return a line with the choices, and why faster attention kernels were passed over."""
    config, run, (kernel, passed) = choices.config, choices.config.run, attention
    weights = "weights" if config.lora is None else "frozen weights, float32 adapters"
    compiled = "compiled" if run.compile else "not compiled"
    same = "deterministic" if run.deterministic else "not deterministic"
    dtype = named_dtype(run.compute_dtype, topology.device)
    computed = str(dtype).removeprefix("torch.") + (" and float8" if run.float8 else "")
    line = (
        f'layers {compiled}, attention "{kernel.name}", {run.weights_dtype} {weights}, computation in '
        f"{computed}, recompute {run.recompute}, {same}"
    )
    if topology.dp > 1 and config.parallel.groups == topology.dp:
        line += f", {topology.dp} replicas without shards"
    if choices.planned is not None:
        planned, size = choices.planned
        line += f"; about {planned / 2**30:.0f} of {size / 2**30:.0f} GiB on each GPU"
    return line + (f"; passed over: {'; '.join(passed)}" if passed else "") + _change(config, saved)


def _change(config: TrainConfig, saved: Settings | None) -> str:
    """Return words about another recomputation of compiled layers than the checkpoint's, or ""."""
    before = saved.recompute if saved else UNSET
    if before is UNSET or before == config.run.recompute:
        return ""
    return f"; before with recompute {before}, from which compiled layers differ by rounding"
