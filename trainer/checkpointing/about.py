"""Describe a run in the manifests of its checkpoints."""

from __future__ import annotations

import hashlib

import msgspec

from checkpoints import About
from sftstream import DataState
from trainer.config import TrainConfig
from trainer.distributed.mesh import Topology
from trainer.reporting.environment import library_versions


def about(config: TrainConfig, topology: Topology, data: DataState, held_out: dict[str, str]) -> About:
    """Return the manifest entry of a run's checkpoints, without a validation loss.

    Holds the mesh sizes, library versions and SHA-256 digests of the config and of the identity of
    `data`, and those of the held-out data in `held_out`, empty in a run without validation.
    """
    digests = {"config": _sha256(config), "data": _sha256(data.identity)}
    return About(
        mesh=topology.sizes,
        digests=digests | held_out,
        versions=library_versions(),
    )


def _sha256(record: msgspec.Struct) -> str:
    return hashlib.sha256(msgspec.json.encode(record, order="deterministic")).hexdigest()
