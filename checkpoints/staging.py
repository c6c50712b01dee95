"""Host memory for a copy of the state, saved while the run changes the original."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch

K = TypeVar("K", bound=Hashable)


class Staging:
    """Buffers kept from save to save: to allocate pinned memory takes longer than to copy."""

    def __init__(self) -> None:
        self._buffers: Mapping[Any, torch.Tensor] = {}

    def copy(self, tensors: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
        """Return copies of tensors in host memory, pinned for tensors on a device.

        Overwrites the copies of the last call.
        """
        copies = {key: self._buffer(key, tensor) for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            copies[key].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if not tensor.is_cpu}:
            torch.accelerator.current_stream(device).synchronize()
        self._buffers = copies
        return copies

    def _buffer(self, key: Hashable, like: torch.Tensor) -> torch.Tensor:
        kept = self._buffers.get(key)
        if kept is not None and (kept.shape, kept.dtype) == (like.shape, like.dtype):
            return kept
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=not like.is_cpu)
