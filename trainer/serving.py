"""The commands that use what came out of a run: generate, serve, convert, publish."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from trainer.config import TrainConfig


def serving_lines(config: TrainConfig, base: str | None) -> list[str]:
    """Return a line for each use of the exported model or adapter, to be pasted into a shell.

    `base` is the model under an adapter that was not merged, None for a whole model.
    """
    directory = config.run.export_directory if base is None else config.run.adapter_directory
    name, place = config.run.name, shlex.quote(str(directory))
    if base is None:
        serve = f"vllm serve {place} --served-model-name {shlex.quote(name)}"
        convert = "convert_hf_to_gguf.py"
    else:
        adapters = f"--enable-lora --lora-modules {shlex.quote(f'{name}={directory}')}"
        rank = "" if config.lora is None else f" --max-lora-rank {config.lora.rank}"
        serve = f"vllm serve {shlex.quote(base)} {adapters}{rank}"
        convert = "convert_lora_to_gguf.py"
    steps = shlex.quote(config.checkpoint.place or str(config.run.directory))
    return [
        f"generate {_generate(directory)}",
        f"serve    {serve}",
        f"GGUF     python llama.cpp/{convert} {place} --outfile {shlex.quote(f'{name}.gguf')}",
        f"publish  python -m checkpoints push {steps} ORGANISATION/NAME --license LICENSE",
    ]


def _generate(directory: Path) -> str:
    """Return a command that lets transformers answer a question with the model in `directory`."""
    messages = "[{'role': 'user', 'content': 'Hello'}]"
    made = f"pipeline('text-generation', {str(directory)!r})({messages}, max_new_tokens=64)"
    code = f"from transformers import pipeline; print({made}[0]['generated_text'][-1]['content'])"
    special = re.search(r"[\"$`!\\]", code)  # inside of double quotes
    return f"python -c {shlex.quote(code)}" if special else f'python -c "{code}"'
