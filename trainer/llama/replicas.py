"""Sum gradients over replicas: ranks that each hold all weights, beside the backward pass.

Every sum is computed in float32 and rounded once to the dtype of the weight. Two bfloat16 numbers
are added in bfloat16, which moves half of the bytes and gives the same bits; with more ranks, each
partial sum would be rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 2**20
"""Elements below which gradients wait for the end of the backward pass, and go in one exchange."""


class ReplicaSums:
    """Sums of gradients over the ranks of a process group.

    Every rank must hand over gradients of the same shapes in the same order. On a GPU the exchanges
    run on a stream of their own.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._small: list[tuple[Tensor, Tensor]] = []
        """Small gradients, each with the tensor for its sum."""
        self._stream: torch.cuda.Stream | None = None

    def begin(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """Begin to sum `gradient`; return the tensor that holds the sum in `dtype` after `finish`.

        This may be `gradient` itself. Collective.
        """
        total = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
        if gradient.numel() < SMALL:
            self._small.append((gradient, total))
        else:
            with self._beside(gradient.device):
                self._sum(gradient, total)
            if self._stream is not None:
                gradient.record_stream(self._stream)  # the caller may free it before it is read
        return total

    def finish(self) -> None:
        """Complete all sums. Collective; does not wait for the device."""
        if self._small:
            gradients, totals = zip(*self._small, strict=True)
            self._small = []
            with self._beside(gradients[0].device):
                together = torch.cat([gradient.flatten().float() for gradient in gradients])
                self._sum(together, together)
                sums = together.split([total.numel() for total in totals])
                torch._foreach_copy_(totals, [part.view_as(total) for part, total in zip(sums, totals, strict=True)])
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[None]:
        """Run the operations of the `with` block after all operations so far, beside later ones."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _sum(self, gradient: Tensor, total: Tensor) -> None:
        """Write the sum of `gradient` over all ranks to `total`; they may share memory."""
        rounds_once = self._group.size() == 2 and gradient.dtype == total.dtype
        if gradient.dtype == torch.float32 or rounds_once:
            exact = gradient
        else:
            exact = total.copy_(gradient) if total.dtype == torch.float32 else gradient.float()
        dist.all_reduce(exact, group=self._group)
        if exact is not total:
            total.copy_(exact)
