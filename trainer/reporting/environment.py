"""Describe the machine and the libraries of a run."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from sftstream import __version__

LIBRARIES = ("torchdata", "transformers", "tokenizers")
"""Packages, beside torch and sftstream, whose version can change tokens, packs or weights."""


def library_versions() -> dict[str, str]:
    """Return the versions of sftstream, torch and the packages in `LIBRARIES`."""
    return {
        "sftstream": __version__,
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def environment(device: torch.device, workers: int) -> dict[str, str]:
    """Return host, device, number of loader workers and versions, by name."""
    is_gpu = device.type == "cuda"
    return {
        "host": os.uname().nodename,
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads",
        "loader workers": str(workers),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        **({"CUDA": str(torch.version.cuda)} if is_gpu else {}),
        **library_versions(),
    }
