"""The measured training step of other trainers."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from step_job import LORA, PACKS, WARM_UP, Job, Result, measured, packs, sizes

from sftstream import Pack


def public_model(config: Any, device: str, weights: torch.dtype) -> Any:
    """Return a Llama of transformers with random weights."""
    from transformers import LlamaForCausalLM

    with torch.device(device):
        torch.set_default_dtype(weights)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model


def _liger_model(job: Job, weights: torch.dtype = torch.bfloat16) -> Any:
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import LlamaConfig as HuggingFaceConfig

    config = HuggingFaceConfig(**sizes(job.shape, job.layers), attn_implementation=job.attention, dtype=weights)
    model = public_model(config, "cuda", weights)
    apply_liger_kernel_to_llama(model=model)
    if job.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _peft_config() -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules="all-linear", task_type="CAUSAL_LM")


def _adapted(model: Any) -> Any:
    """Return a model of transformers with trainable adapters on frozen weights."""
    from peft import get_peft_model

    model.enable_input_require_grads()  # for recomputation, which needs an input with a gradient
    return get_peft_model(model, _peft_config())


def _unshifted_labels(pack: Pack) -> torch.Tensor:
    """Return labels as transformers expects: the token itself at trained positions, else -100."""
    labels = np.where(pack.trained, pack.ids, -100).astype(np.int64)
    labels[pack.borders[:-1]] = -100
    return torch.from_numpy(labels)


def hugging_face(job: Job) -> Result:
    """Measure a plain loop over a transformers model with Liger, under FSDP2 on several GPUs."""
    rank = _joined()
    weights = torch.float32 if job.system == "hf-liger-fp32" else torch.bfloat16
    model = _liger_model(job, weights)
    if "lora" in job.system:
        model = _adapted(model)
    if job.dp > 1:
        _shard(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    batches = [
        {
            "input_ids": pack.input_ids.cuda()[None],
            "position_ids": pack.position_ids.cuda()[None],
            "labels": _unshifted_labels(pack).cuda()[None],
            "cu_seq_lens_q": pack.cu_seqlens.cuda(),
            "cu_seq_lens_k": pack.cu_seqlens.cuda(),
            "max_length_q": pack.max_seqlen,
            "max_length_k": pack.max_seqlen,
        }
        for pack in packs(job, rank)
    ]

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        # Adapters are float32, as peft makes them.
        with torch.autocast("cuda", torch.bfloat16, enabled=weights == torch.float32 or "lora" in job.system):
            loss = model(**batches[number % PACKS], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return measured(step, job.steps, job.attention)


def _joined() -> int:
    """Join torchrun's process group, if there is one; return the rank."""
    if "RANK" not in os.environ:
        return 0
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    return dist.get_rank()


def _shard(model: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def trl(job: Job) -> Result:
    """Measure TRL's SFTTrainer with Liger on packed rows, under FSDP2 on several GPUs."""
    import datasets
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Clock(TrainerCallback):
        """Records the end of each step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            model=_liger_model(job),
            args=_trl_config(job, directory),
            train_dataset=datasets.Dataset.from_list(_rows(job) * (1 + (WARM_UP + job.steps) // PACKS)),
            processing_class=_tokenizer(),
            callbacks=[clock],
            peft_config=_peft_config() if "lora" in job.system else None,
        )
        trainer.train()
    seconds = statistics.median(np.diff(clock.ends)[WARM_UP - 1 :])
    return Result(seconds, torch.cuda.max_memory_allocated(), job.attention)


def _rows(job: Job) -> list[dict[str, list[int]]]:
    """Return the packs of all ranks as TRL's packed rows."""
    return [
        {
            "input_ids": pack.ids.tolist(),
            "labels": _unshifted_labels(pack).tolist(),
            "seq_lengths": [segment.length for segment in pack.segments],
        }
        for rank in range(job.dp)
        for pack in packs(job, rank)
    ]


def _tokenizer() -> Any:
    """Return a tokenizer of one word, which TRL asks for and packed rows do not need."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def _trl_config(job: Job, directory: str) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=directory,
        max_steps=WARM_UP + job.steps,
        per_device_train_batch_size=1,
        learning_rate=1e-5,
        max_grad_norm=1.0,
        padding_free=True,
        max_length=None,
        bf16=True,
        gradient_checkpointing=job.recompute == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **_fsdp(job),
    )


def _fsdp(job: Job) -> dict[str, Any]:
    if job.dp == 1:
        return {}
    layers = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": layers}
