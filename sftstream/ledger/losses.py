"""Compute the losses of a pack's conversations with a model in the Hugging Face layout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from sftstream.door import Door
from sftstream.records import IGNORE_INDEX, Pack


class Model:
    """A causal language model, loaded in float32 from a directory with `config.json` and weights.

    Raises ValueError if the directory holds no model that transformers can load.
    """

    def __init__(self, directory: Path) -> None:
        disable_progress_bar()  # a bar of loaded weights would mix with the losses
        with Door(f"model {str(directory)!r} cannot be loaded"):
            self._model = AutoModelForCausalLM.from_pretrained(
                str(directory), dtype=torch.float32, trust_remote_code=False
            ).eval()

    @torch.no_grad()
    def losses(self, pack: Pack) -> NDArray[np.float32]:
        """Return the cross-entropy of each position in nats, float32 `(T,)`; 0 without a label.

        The model runs on each segment separately, because attention never crosses segments.
        """
        result = np.zeros(pack.capacity, np.float32)
        borders = pack.borders.tolist()
        for start, end in pairwise(borders):
            labels = pack.labels[start:end]
            if (labels == IGNORE_INDEX).all():
                continue
            logits = self._model(pack.input_ids[None, start:end]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
            result[start:end] = loss.numpy()
        return result


@contextmanager
def model_of(path: Path) -> Iterator[Model]:
    """Open a model directory, or a checkpoint after an export into a temporary directory.

    Raises ValueError for an adapter, and if the checkpoint cannot be exported.
    """
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path} is an adapter without its model; name a step-... directory of its run's checkpoints, or a merged export"
        )
    if (path / "config.json").exists():
        yield Model(path)
        return
    with TemporaryDirectory() as directory:
        target = Path(directory) / "model"
        # In another process, because sftstream does not import the package of checkpoints.
        command = [sys.executable, "-m", "checkpoints", "export", str(path), str(target)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = (ended.stderr.strip() or ended.stdout.strip()).removeprefix("error: ")
            raise ValueError(
                f"{path} is neither a model nor a checkpoint: {reason}; name a directory with config.json, or a step-... "
                "directory of a run's checkpoints"
            )
        yield Model(target)
