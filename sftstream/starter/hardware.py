"""Find the GPUs of this machine, and ask the trainer whether a run fits them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import torch


class Hardware(msgspec.Struct, frozen=True):
    """The GPUs that a run may use."""

    gpus: int
    """Number of GPUs; 0 for a run on CPUs."""
    memory: int
    """Bytes of the smallest GPU; 0 without GPUs."""
    name: str

    @property
    def total(self) -> int:
        """Bytes of all GPUs together."""
        return self.gpus * self.memory


def find_hardware(gpus: int | None) -> Hardware:
    """Return the GPUs of this machine, or `gpus` GPUs of 80 GB if the number is given."""
    if gpus is not None:
        return Hardware(gpus, 80 * 10**9 if gpus else 0, f"{gpus} GPUs of 80 GB" if gpus else "CPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Hardware(0, 0, "CPU")
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    name = f"{count} x {properties[0].name}"
    return Hardware(count, min(device.total_memory for device in properties), name)


class Plan(msgspec.Struct, frozen=True):
    """The trainer's estimate of a run."""

    parameters: int
    memory: int
    """Bytes on each GPU."""
    seconds_per_step: float
    steps: int | None
    recompute: str
    weights_dtype: str


def plan(config: Path, gpus: int) -> Plan | str:
    """Return the trainer's estimate of a run, or the line with which the trainer refuses it."""
    # In another process, because sftstream does not import the trainer.
    command = [sys.executable, "-m", "trainer.main", str(config), f"--plan={gpus}", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or ["the estimate ended without a message"])[-1]
    return msgspec.json.decode(ended.stdout, type=Plan)
