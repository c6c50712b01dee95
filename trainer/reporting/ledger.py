"""Tell the ledger of a run about its sessions and its data states."""

from __future__ import annotations

import os

import torch.distributed as dist

from sftstream import LoaderPosition, PackLoader, Session, __version__
from trainer.distributed.mesh import Topology


def session(loader: PackLoader, topology: Topology, step: int) -> Session:
    """Return the record of a start of the run after `step` steps."""
    header = loader.position().header
    return Session(
        after=step,
        mesh=topology.sizes,
        workers=loader.workers,
        version=__version__,
        directory=os.getcwd(),
        data=loader.config,
        identity=header.identity,
        accepted=tuple(difference for change in header.history for difference in change.differences),
    )


def gather_streams(position: LoaderPosition | None, topology: Topology) -> dict[int, bytes]:
    """Return the encoded states of all streams on the first rank, and {} elsewhere. Collective.

    `position` is None on ranks without a loader.
    """
    local = dict(position.encoded_streams) if position else {}
    everyone: list[dict[int, bytes]] | None = [{}] * dist.get_world_size() if topology.first else None
    dist.gather_object(local, everyone)
    return {stream: state for streams in everyone or () for stream, state in streams.items()}
