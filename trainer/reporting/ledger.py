"""Gather the data states for the ledger of a run."""

from __future__ import annotations

import torch.distributed as dist

from sftstream import LoaderPosition
from trainer.distributed.mesh import Topology


def gather_streams(position: LoaderPosition | None, topology: Topology) -> dict[int, bytes]:
    """Return the encoded states of all streams on the first rank, and {} elsewhere. Collective.

    `position` is None on ranks without a loader.
    """
    local = dict(position.encoded_streams) if position else {}
    everyone: list[dict[int, bytes]] | None = [{}] * dist.get_world_size() if topology.first else None
    dist.gather_object(local, everyone)
    return {stream: state for streams in everyone or () for stream, state in streams.items()}
