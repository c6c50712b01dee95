"""Only kernels that give the same bits each time; one that cannot is an error that names it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NO_FORM = re.compile(r"(\S+) does not have a deterministic implementation")


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """While it is entered, torch takes deterministic kernels only, where `wanted`.

    ValueError, naming the kernel, where one has no such form.
    """
    # Read by cuBLAS when it starts; without it deterministic mode refuses matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if (found := _NO_FORM.search(str(error))) is None:
            raise
        raise ValueError(
            f"run.deterministic = true, but the kernel {found[1]} has no deterministic form in torch {torch.__version__}; with "
            "run.deterministic = false two runs are equal to rounding only"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
