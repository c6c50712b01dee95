"""Train a tiny model with another project's trainer on several processes, killed or not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice, zip_longest
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import gloo_ranks
import msgspec
import numpy as np
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sftstream import DataConfig
from sftstream.integrations import (
    PackDataset,
    Shards,
    last_checkpoint,
    read_state_file,
    trained_tokens,
    write_state_file,
)
from sftstream.integrations.transformers_trainer import PackCallback, one_pack

transformers.utils.logging.disable_progress_bar()


NO_ARGUMENTS: dict[str, Any] = {}


class Job(NamedTuple):
    """A training run as its processes need it."""

    data: DataConfig
    directory: str
    kind: str = "transformers"
    """Trainer: "transformers", "trl" or "accelerate"."""
    workers: int = 0
    steps: int = 7
    save_every: int = 2
    kill: str = ""
    """Place at which a process kills itself: "step 3" (before the third update of the weights), "save 4" (in the
    save after the fourth step, before the data state), or "" for none."""
    arguments: dict[str, Any] = NO_ARGUMENTS
    """Further training arguments."""
    dropout: float = 0.1


class Result(NamedTuple):
    """What a process saw and made."""

    batches: list[str]
    """Digest of the token ids of each batch that the model was trained on, in order."""
    losses: list[float]
    weights: NDArray[np.float32]
    """All weights after the last step, one after the other."""


def model(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers, with dropout, so that random states matter."""
    fields: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1, "initializer_range": 0.2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**fields | heads | changes))


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def write_data_table(data: DataConfig, path: Path) -> None:
    """Write a config of a few keys as the `[data]` table of a TOML file."""
    table = msgspec.to_builtins(data)
    keys = ("capacity", "streams", "global_batch", "window", "workers", "epochs", "max_too_long")
    lines = [f"{key} = {json.dumps(table[key])}" for key in keys]
    source, tokenizer = json.dumps(table["sources"][0]["path"]), json.dumps(table["tokenizer"]["path"])
    lines += [f"sources = [{{ path = {source} }}]", f"tokenizer = {{ path = {tokenizer} }}"]
    path.write_text("\n".join(["[data]", *lines]))


def global_batches(results: list[Result]) -> list[str]:
    """The batches of all processes in the order of the run."""
    return [batch for batch in chain(*zip_longest(*(result.batches for result in results))) if batch]


class Hosts:
    """A process that has imported the trainers, and forks the processes of one job after another.

    A process of its own, since importing the trainers takes 5 s, and since a process that has
    computed gradients cannot fork processes that compute gradients.
    """

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,))
        self._process.start()

    def ranks(self, size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Return `work(rank, *args)` of each of `size` processes."""
        return self._call(gloo_ranks.run_ranks, size, work, *args)

    def run(self, size: int, job: Job) -> list[Result]:
        """Run a job on `size` processes to its end."""
        return self.ranks(size, _train, size, job)

    def kill(self, size: int, job: Job) -> None:
        """Run a job on `size` processes until one kills itself, and kill the others."""
        self._call(_killed, size, job)

    def example(self, name: str, directory: str, steps: int) -> None:
        """Run the file `examples/NAME.py` in a process."""
        self.ranks(1, _example, name, directory, steps)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def _call(self, *call: Any) -> Any:
        self._pipe.send(call)
        error, result = self._pipe.recv()
        assert not error, error
        return result


def _serve(pipe: Connection) -> None:
    gloo_ranks.processes = multiprocessing.get_context("fork")  # type: ignore[assignment]
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    while True:
        try:
            work, *args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, work(*args)))
        except (AssertionError, ValueError, RuntimeError, EOFError):
            pipe.send((traceback.format_exc(), None))


def _killed(size: int, job: Job) -> None:
    """Wait until a process has killed itself, then kill the others, as a scheduler does."""
    with tempfile.TemporaryDirectory() as meeting:
        started = [gloo_ranks._start(rank, size, meeting, _train, (size, job)) for rank in range(size)]
        ended = wait([process.sentinel for process, _ in started], timeout=240)
        for process, _ in started:
            process.kill()
            process.join()
    assert ended, "no process has killed itself"
    codes = [process.exitcode for process, _ in started]
    errors = [pipe.recv()[0] for process, pipe in started if process.exitcode == 1 and pipe.poll()]
    assert set(codes) <= {-signal.SIGKILL, 1}, codes
    assert all("Connection closed by peer" in error for error in errors), errors


class KillAt(TrainerCallback):
    """Kill this process at a place: see `Job.kill`."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _kill(self.job, f"step {state.global_step + 1}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _kill(self.job, f"save {state.global_step}")


def arguments(job: Job, size: int) -> dict[str, Any]:
    """The arguments that a trainer of this job gets."""
    return {
        "output_dir": job.directory,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": job.data.global_batch // size,
        "max_steps": job.steps,
        "save_steps": job.save_every,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "ddp_find_unused_parameters": True,  # False: other buckets of gradients after a launch's first step
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "accelerator_config": {"dispatch_batches": False},
        **job.arguments,
    }


def trainer(job: Job, size: int, net: Any) -> Trainer:
    """A trainer of `net`, with the kill of the job before the callback that saves the data state."""
    dataset = PackDataset(job.data, workers=job.workers)
    shared = {"train_dataset": dataset, "data_collator": one_pack, "callbacks": [KillAt(job), PackCallback()]}
    if job.kind == "transformers":
        return Trainer(net, TrainingArguments(**arguments(job, size)), **shared)
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(**arguments(job, size), dataset_kwargs={"skip_prepare_dataset": True})
    tokenizer = AutoTokenizer.from_pretrained(job.data.tokenizer.path)
    return SFTTrainer(net, settings, processing_class=tokenizer, **shared)


@contextmanager
def recorded(net: Any) -> Iterator[list[str]]:
    """Collect a digest of each batch that the model gets in training."""
    batches: list[str] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            batches.append(digest(kwargs["input_ids"]))

    hook = net.register_forward_pre_hook(record, with_kwargs=True)
    yield batches
    hook.remove()


def _accelerated(job: Job, size: int, net: Any) -> list[float]:
    """Train with a loop over accelerate's loader, which requests a batch ahead. Return the losses."""
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # as in `arguments`
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    # A generator of its own: without it, each start of a loader would draw from the random state.
    loader = DataLoader(PackDataset(job.data, workers=job.workers), batch_size=None, generator=torch.Generator())
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    dataset = loader.dataset
    if checkpoint := last_checkpoint(job.directory):
        accelerator.load_state(checkpoint)
        dataset.load_state_dict(read_state_file(checkpoint))
    shards, batches, packs, losses = Shards(dataset), iter(loader), dataset.loader.packs, []
    for step in range(packs // job.data.global_batch + 1, job.steps + 1):
        micro = list(islice(batches, dataset.micro_batches))
        tokens = accelerator.gather(sum(map(trained_tokens, micro))).sum()
        total = torch.zeros(())
        for number, batch in enumerate(micro):
            _kill(job, f"step {step}", number == len(micro) - 1)
            with nullcontext() if number == len(micro) - 1 else accelerator.no_sync(net):
                loss = net(**batch, num_items_in_batch=tokens).loss * size
                accelerator.backward(loss)
                total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(total).mean()))
        packs += job.data.global_batch
        ended = shards.finished(packs)
        if step % job.save_every == 0 or ended:
            directory = Path(job.directory) / f"checkpoint-{step}"
            accelerator.save_state(directory)
            _kill(job, f"save {step}")
            state = shards.state_dict(packs)
            if accelerator.is_main_process:
                write_state_file(directory, state)
        if ended:
            break
    return losses


def _kill(job: Job, place: str, reached: bool = True) -> None:
    if reached and place == job.kill:
        os.kill(os.getpid(), signal.SIGKILL)


def _example(rank: int, name: str, directory: str, steps: int) -> None:
    multiprocessing.current_process()._config["daemon"] = False
    torch.distributed.destroy_process_group()
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / f"{name}.py"))["main"]
    main(directory, steps)


def _train(rank: int, size: int, job: Job) -> Result:
    multiprocessing.current_process()._config["daemon"] = False  # loaders have child processes
    if size == 1:
        torch.distributed.destroy_process_group()
    else:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, but never bound: the ranks are joined
    net = model(attention_dropout=job.dropout)
    with recorded(net) as batches:
        if job.kind == "accelerate":
            losses = _accelerated(job, size, net)
        else:
            host = trainer(job, size, net)
            host.train(resume_from_checkpoint=last_checkpoint(job.directory))
            losses = [line["loss"] for line in host.state.log_history if "loss" in line]
    return Result(batches, losses, torch.cat([weight.flatten() for weight in net.state_dict().values()]).numpy())
