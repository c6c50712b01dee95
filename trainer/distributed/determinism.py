"""Restrict torch to deterministic kernels, and name a kernel that is not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Restrict torch to deterministic kernels inside the `with` block, if `wanted`.

    Raises ValueError, with the kernel's name, for an operation without a deterministic kernel.
    """
    # cuBLAS reads the variable at its start; deterministic mode refuses matrix products without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if (match := _NOT_DETERMINISTIC.search(str(error))) is None:
            raise
        raise ValueError(
            f"run.deterministic = true, but the kernel {match[1]} has no deterministic form in torch {torch.__version__}; set "
            "run.deterministic = false for runs that are equal up to rounding"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
