"""The model card of an exported step: license, base model, digests of data and config, command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from checkpoints.errors import CorruptCheckpoint, one_line, printable
from checkpoints.manifest import Manifest

ORIGIN = "origin"
"""The key of the origin among the values of a step."""
UNKNOWN = "unknown"
"""The hub's name of a license that is not stated."""


class Origin(Struct, frozen=True, omit_defaults=True):
    """How a step came to be, for its model card. Saved among the values of the step."""

    command: str
    """The command line that trained the step."""
    base_model: str | None = None
    """Hub name of the model that the run started from; None for random weights or a directory."""
    adapter: bool = False
    """True if the step holds adapters of the base model."""

    def builtins(self) -> dict[str, Any]:
        """Return the origin as a plain value for `CheckpointStore.save`."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        return value


def parse_origin(value: Any) -> Origin:
    """Return the origin in a value made by `Origin.builtins`, or raise CorruptCheckpoint."""
    try:
        return msgspec.convert(value, Origin)
    except msgspec.ValidationError as error:
        raise CorruptCheckpoint(f"the value {ORIGIN!r} is not the origin of a step: {one_line(error)}") from error


def hub_name(model: str | None) -> str | None:
    """Return `model` if it is the name of a model on the hub and no directory, else None."""
    is_name = model is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()
    return model if is_name else None


class License(NamedTuple):
    """The license fields of a model card, as the hub defines them."""

    license: str = UNKNOWN
    """Identifier such as "apache-2.0" or "llama3.2"; "other" for a license with its own name."""
    name: str | None = None
    """Name of an "other" license."""
    link: str | None = None
    """URL, or file of the repository, with the text of an "other" license."""


def model_card(title: str, manifest: Manifest, origin: Origin | None, license: License) -> str:
    """Return the text of README.md for a model: YAML fields for the hub, and a page for people."""
    about = manifest.about
    adapter = origin is not None and origin.adapter
    fields: dict[str, Any] = {
        "license": license.license,
        "license_name": license.name,
        "license_link": license.link,
        "base_model": None if origin is None else origin.base_model,
        "base_model_relation": ("adapter" if adapter else "finetune") if origin and origin.base_model else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sftstream"],
    }
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items() if value is not None)
    rows = {
        "step": f"{manifest.step:,}",
        "validation loss": "" if about.validation_loss is None else f"{about.validation_loss:.4f}",
        **{f"SHA-256 of the {name}": f"`{digest}`" for name, digest in about.digests.items()},
        "ranks": ", ".join(f"{name} {size}" for name, size in about.mesh.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in about.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    made = "" if origin is None else f"\nTrained by this command:\n\n{_fenced(origin.command)}\n"
    return f"---\n{head}\n---\n\n# {title}\n\nFine-tuned with sftstream.\n\n| | |\n|---|---|\n{table}\n{made}"


def _fenced(text: str) -> str:
    """Return a text as a block of code, in a fence longer than the rows of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{printable(text)}\n{fence}"
