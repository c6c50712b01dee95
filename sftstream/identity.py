"""What a stream was made from. A state resumes on exactly this or not at all."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from sftstream.config import DataConfig, Policy, Shuffle, SourceConfig, StageConfig
from sftstream.excerpt import excerpt
from sftstream.rendering.turns import TurnFormat
from sftstream.sources import Corpus, FileIdentity, FileSet, StreamedSource
from sftstream.tokenization.encoder import ChatEncoder

FORMAT = 3
"""Version of the state and of everything that decides the packs. A change of either that alters a stream raises it."""


class SourceIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A source's files, in order, and its share."""

    files: tuple[FileIdentity, ...]
    rows: int | None
    """None where it is streamed."""
    weight: float | None
    repeat: float
    columns: dict[str, str] | None = None
    shuffle: Shuffle | None = None
    shards: int | None = None
    """What streams take turns in, where it is streamed."""


class Identity(Policy, frozen=True, kw_only=True):
    """Everything that decides which packs a stream gives. Where the files lie and who reads them is no part of it."""

    format: int
    sources: tuple[SourceIdentity, ...]
    tokenizer_sha256: str
    fast_tokenizer: str | None
    """What may have computed ids in the place of `tokenizers`."""
    template_sha256: str
    date: str | None
    """The day that the template prints, None where it prints none."""
    turn_format: TurnFormat = msgspec.field(name="form")
    """How the assistant's turns were found to look in the template."""
    streams: int
    global_batch: int
    window: int
    shuffle: Shuffle
    seed: int
    epochs: int | None
    mix_by: str
    stages: tuple[StageConfig, ...]
    ends_with: str


def identify(config: DataConfig, corpus: Corpus, encoder: ChatEncoder) -> Identity:
    """What a config comes to."""
    date = encoder.template.date
    return Identity(
        format=FORMAT,
        sources=tuple(map(_source, config.sources, corpus.sources)),
        tokenizer_sha256=encoder.tokenizer.vocabulary.sha256,
        fast_tokenizer=encoder.tokenizer.fast,
        template_sha256=_sha256(encoder.template.text),
        date=date.isoformat() if date else None,
        turn_format=encoder.report.turn_format,
        **{field: getattr(config, field) for field in Policy.__struct_fields__},
        streams=config.streams,
        global_batch=config.global_batch,
        window=config.window,
        shuffle=config.shuffle,
        seed=config.seed,
        epochs=config.epochs,
        mix_by=config.mix_by,
        stages=config.stages,
        ends_with=config.ends_with,
    )


def _source(source: SourceConfig, opened: FileSet | StreamedSource) -> SourceIdentity:
    return SourceIdentity(
        files=opened.identities,
        rows=None if isinstance(opened, StreamedSource) else len(opened),
        weight=source.weight,
        repeat=source.repeat,
        columns=source.columns,
        shuffle=source.shuffle,
        shards=opened.shards if isinstance(opened, StreamedSource) else None,
    )


def differences(before: Any, after: Any, path: str = "data") -> list[str]:
    """Each field that differs, as `path: before -> after`. Takes builtins, as `msgspec.to_builtins` gives them."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return _flat(differences(before.get(key), after.get(key), f"{path}.{key}") for key in keys)
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        pairs = itertools.zip_longest(before, after)
        return _flat(differences(b, a, f"{path}[{i}]") for i, (b, a) in enumerate(pairs))
    return [] if before == after else [f"{path}: {excerpt(before, 72)} -> {excerpt(after, 72)}"]


def accepted_changes(saved: Identity, now: Identity, accepted: Sequence[str]) -> list[str]:
    """The differences, each of which `accepted` names by its path; raises ValueError naming the first ten that it does not."""
    changed = differences(msgspec.to_builtins(saved), msgspec.to_builtins(now))
    others = [difference for difference in changed if not any(_is_named(difference, name) for name in accepted)]
    if others:
        more = f"; and {len(others) - 10} more" if len(others) > 10 else ""
        raise ValueError(
            "the state was taken from other data or settings, and resuming on these would not be exact: "
            f"{'; '.join(others[:10])}{more}. Restore them, or start a new run; data.accept_changed = "
            f"[{others[0].split(':')[0]!r}] would go on from here all the same, and is put on record"
        )
    return changed


def _is_named(difference: str, name: str) -> bool:
    path = difference.split(":")[0]
    return path == name or path.startswith((f"{name}.", f"{name}["))


def _flat(lists: Iterable[list[str]]) -> list[str]:
    return [item for part in lists for item in part]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
