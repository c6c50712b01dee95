"""Trainers on CPUs whose steps compute nothing: TRL, transformers, Lightning, each fed by its own
preparation and by sftstream."""

from __future__ import annotations

from typing import Any

import msgspec
from clock import Clock
from corpus import DAY, Job

ACCUMULATED = 8
"""Packs of a step."""


def timed(trainer_class: Any, clock: Clock) -> Any:
    """Return a class of trainer whose steps only read the clock."""
    import torch

    class Timed(trainer_class):
        def training_step(self, *_: Any, **__: Any) -> torch.Tensor:
            clock.step()
            return torch.zeros(())

    return Timed


def settings(job: Job, **more: Any) -> dict[str, Any]:
    """Return the training arguments that all systems share."""
    return {
        "output_dir": f"{job.directory}/out",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        **more,
    }


def model_and_tokenizer(job: Job) -> tuple[Any, Any]:
    """Return a minimal model, and the tokenizer with the template that tags the assistant's
    turns."""
    from peers import tokenizer_of
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of(job)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), use_cache=False, **shape)), tokenizer


def rows_of(job: Job) -> Any:
    """Return the conversations as a dataset of `datasets`, read and cached for the run."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(job.rows), split="train")


def trl_itself(job: Job, clock: Clock) -> None:
    """Train an epoch with TRL and its own packing."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = model_and_tokenizer(job)
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": job.capacity, "assistant_only_loss": True}
    config = SFTConfig(**settings(job, num_train_epochs=1, **packing))
    rows = rows_of(job)
    timed(SFTTrainer, clock)(model, config, train_dataset=rows, processing_class=tokenizer).train()


def trl_with_ours(job: Job, clock: Clock) -> None:
    """Train an epoch with TRL, fed by a PackDataset."""
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = model_and_tokenizer(job)
    config = SFTConfig(**settings(job, max_steps=10**6, dataset_kwargs={"skip_prepare_dataset": True}))
    timed(SFTTrainer, clock)(model, config, processing_class=tokenizer, **ours(job)).train()


def transformers_itself(job: Job, clock: Clock) -> None:
    """Train an epoch with transformers, with `map` and its collator without padding."""
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    model, tokenizer = model_and_tokenizer(job)
    more = {"per_device_train_batch_size": each(job), "num_train_epochs": 1, "remove_unused_columns": False}
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    arguments = TrainingArguments(**settings(job, **more))
    rows = labelled(job, tokenizer)
    timed(Trainer, clock)(model, arguments, train_dataset=rows, data_collator=collator).train()


def transformers_with_ours(job: Job, clock: Clock) -> None:
    """Train an epoch with transformers, fed by a PackDataset."""
    from transformers import Trainer, TrainingArguments

    model, _ = model_and_tokenizer(job)
    arguments = settings(job, max_steps=10**6, accelerator_config={"dispatch_batches": False})
    timed(Trainer, clock)(model, TrainingArguments(**arguments), **ours(job)).train()


def lightning_itself(job: Job, clock: Clock) -> None:
    """Train an epoch with Lightning on rows prepared by `map`, collated without padding."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithFlattening

    model, tokenizer = model_and_tokenizer(job)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = DataLoader(labelled(job, tokenizer), batch_size=each(job), shuffle=True, collate_fn=collator)
    fit(model, clock, train_dataloaders=rows)


def lightning_with_ours(job: Job, clock: Clock) -> None:
    """Train an epoch with Lightning, fed by a PackDataModule."""
    from sftstream.integrations.lightning_data import PackDataModule

    model, _ = model_and_tokenizer(job)
    fit(model, clock, datamodule=PackDataModule(data_config(job)))


def fit(model: Any, clock: Clock, **data: Any) -> None:
    """Train an epoch with Lightning; the steps compute nothing but the test of the model."""
    import torch
    from lightning.pytorch import LightningModule, Trainer

    from sftstream.integrations import hugging_face
    from sftstream.integrations.isolation import require_isolation

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def on_train_start(self) -> None:
            if "datamodule" in data:
                require_isolation(self.model, hugging_face)

        def training_step(self, *_: Any) -> torch.Tensor:
            clock.step()
            return self.weight * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.weight], lr=0.0)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATED,
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(Module(), **data)


def labelled(job: Job, tokenizer: Any) -> Any:
    """Return the rows with ids and labels, made by `map` with the template that tags the
    assistant's turns."""
    from peers import Templated

    templated = Templated(tokenizer)

    def label(row: dict[str, Any]) -> dict[str, Any]:
        encoded = templated(row)
        pairs = zip(encoded["input_ids"], encoded["mask"], strict=True)
        return {"input_ids": encoded["input_ids"], "labels": [token if bit else -100 for token, bit in pairs]}

    rows = rows_of(job)
    return rows.map(label, remove_columns=rows.column_names)


def each(job: Job) -> int:
    """Return the conversations of a batch that is collated without padding: as many as a pack holds
    on average."""
    return max(1, job.capacity * job.conversations // job.tokens)


def ours(job: Job) -> dict[str, Any]:
    """Return the arguments of a trainer fed by a PackDataset."""
    from sftstream.integrations import PackDataset
    from sftstream.integrations.transformers_trainer import PackCallback, one_pack

    dataset = PackDataset(data_config(job))
    return {"train_dataset": dataset, "data_collator": one_pack, "callbacks": [PackCallback()]}


def data_config(job: Job) -> Any:
    """Return the data of a run of sftstream: one pass over the rows, read in the training
    process."""
    from sftstream import DataConfig

    return msgspec.convert(data_table(job), DataConfig)


def data_table(job: Job) -> dict[str, Any]:
    """Return the `[data]` table of a run of sftstream."""
    return {
        "sources": [{"path": str(job.rows)}],
        "tokenizer": {"path": job.tokenizer, "date": DAY},
        "capacity": job.capacity,
        "global_batch": ACCUMULATED,
        "streams": 1,
        "workers": 0,
        "epochs": 1,
    }
