"""Print steps as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from checkpoints.errors import CorruptCheckpoint, printable
from checkpoints.manifest import About, Manifest
from checkpoints.store import CheckpointStore

LONG = 2000
"""Bytes from which on only the size of a value is shown."""
MANY = 12
"""Number of entries from which on only their count is shown, unless all are asked for."""


def listed_steps(store: CheckpointStore) -> list[dict[str, Any]]:
    """Return the facts about each step for programs, oldest first; `damage` is None for a readable
    manifest."""
    listed: list[dict[str, Any]] = []
    for step in store.steps():
        try:
            manifest = store.manifest(step)
        except CorruptCheckpoint as error:
            listed.append({"step": step, "damage": str(error)})
            continue
        facts = {"step": step, "damage": None, "saved": store.saved(step).isoformat(), "bytes": _bytes(manifest)}
        facts |= {"ranks": manifest.world_size, "tensors": len(manifest.tensors)}
        listed.append(facts | {"validation_loss": manifest.about.validation_loss})
    return listed


def describe_step(store: CheckpointStore, step: int) -> dict[str, Any]:
    """Return the facts and values of a step for programs; the sizes of values that hold bytes."""
    manifest = store.manifest(step)
    values = {
        key: {"bytes": len(msgspec.msgpack.encode(value))} if _holds_bytes(value) else value
        for key, value in store.values(step).items()
    }
    return {
        "step": step,
        "saved": store.saved(step).isoformat(),
        "ranks": manifest.world_size,
        **msgspec.to_builtins(manifest.about),
        "files": {name: file.size for name, file in manifest.files.items()},
        "bytes": _bytes(manifest),
        "tensors": len(manifest.tensors),
        "values": values,
    }


def show_steps(store: CheckpointStore, console: Console) -> None:
    """Print a line for each step, oldest first, from the manifests."""
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "saved", "size", "ranks", "tensors", "validation loss"):
        table.add_column(heading, justify="left" if heading == "saved" else "right", no_wrap=True)
    damaged = []
    for step in store.steps():
        try:
            manifest = store.manifest(step)
        except CorruptCheckpoint as error:
            damaged.append(f"step {step} is damaged: {error}")
            continue
        saved = store.saved(step).isoformat(" ", "seconds")
        loss = manifest.about.validation_loss
        counts = (str(manifest.world_size), str(len(manifest.tensors)))
        table.add_row(str(step), saved, _size(manifest), *counts, "" if loss is None else f"{loss:.4f}")
    console.print(table)
    for line in damaged:
        console.print(printable(line), soft_wrap=True)


def show_step(store: CheckpointStore, step: int, console: Console, *, everything: bool = False) -> None:
    """Print the facts, values, files and tensors of a step.

    Values with many entries, such as settings, are printed as their number unless `everything`.
    """
    manifest = store.manifest(step)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "step": f"{step}, written by {manifest.world_size} ranks",
        "saved": store.saved(step).isoformat(" ", "seconds"),
        "validation loss": "" if manifest.about.validation_loss is None else repr(manifest.about.validation_loss),
        **dict(_values(store.values(step), everything=everything)),
        **_about(manifest.about),
        "files": f"{len(manifest.files)}, {_size(manifest)}",
        **_tensors(manifest),
    }
    rows = {name: row for name, row in rows.items() if row}
    for name, value in rows.items():
        table.add_row(printable(name), printable(value))
    console.print(table)


def _about(about: About) -> dict[str, str]:
    rows = {
        "mesh": ", ".join(f"{name} {size}" for name, size in about.mesh.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in about.versions.items()),
        **{f"digest of {name}": digest for name, digest in about.digests.items()},
    }
    return {name: row for name, row in rows.items() if row}


def _size(manifest: Manifest) -> str:
    return decimal(_bytes(manifest))


def _bytes(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())


def _tensors(manifest: Manifest) -> dict[str, str]:
    """Return number and size of tensors by the first word of the key."""
    count, size = Counter[str](), Counter[str]()
    for key, tensor in manifest.tensors.items():
        name = key.split(".")[0]
        count[name] += 1
        size[name] += sum(chunk.span.end - chunk.span.begin for chunk in tensor.chunks)
    return {f"tensors of {name}": f"{number}, {decimal(size[name])}" for name, number in count.items()}


def _values(values: Mapping[str, Any], *, everything: bool) -> Iterator[tuple[str, str]]:
    """Yield short values in full, the shortest first, then long values and bytes by size.

    Long values with a common prefix, such as `data/stream/`, share a line.
    """
    count, size = Counter[str](), Counter[str]()
    sizes = {key: len(msgspec.msgpack.encode(value)) for key, value in values.items()}
    for key, encoded in sorted(sizes.items(), key=lambda item: item[1]):
        value = values[key]
        if isinstance(value, bytes) or encoded > LONG or _holds_bytes(value):
            name = key[: key.rfind("/") + 1] or key
            count[name] += 1
            size[name] += encoded
        elif isinstance(value, dict):
            leaves = list(_leaves(value))
            if everything or len(leaves) < MANY:
                yield from ((f"{key}.{path}", repr(leaf)) for path, leaf in leaves)
            else:
                yield key, f"{len(leaves)} entries; --all prints them"
        else:
            yield key, repr(value)
    for name, number in count.items():
        yield name, f"{number} values, {decimal(size[name])}" if name.endswith("/") else decimal(size[name])


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    return isinstance(value, bytes) or (isinstance(value, list) and any(map(_holds_bytes, value)))


def _leaves(value: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from ((f"{key}.{path}", leaf) for path, leaf in _leaves(item))
        else:
            yield str(key), item
