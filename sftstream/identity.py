"""Identify the data and settings that decide the packs, and compare them before a resume.

An identity holds digests of files, tokenizer and template, and settings such as `capacity`. A run
resumes from a state only if the state's identity is the same as the identity of the run's config.

A field that was added after `FORMAT` was last raised has the default UNSET, and is left out of the
identity if the setting has its default. So states from before the field was added still resume. The
default of such a setting must never change; `tests/streaming/test_identity.py` checks the defaults.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

import msgspec

from sftstream.config import DataConfig, Policy, Shuffle, SkipConfig, SourceConfig, StageConfig
from sftstream.excerpt import excerpt
from sftstream.records import Role
from sftstream.rendering.turn_format import TurnFormat
from sftstream.sources import Corpus, FileIdentity, FileSet, StreamedSource
from sftstream.sources.full_digests import Digests
from sftstream.tokenization.encoder import ChatEncoder

FORMAT = 4
"""Version of the stored state and of the code that decides packs. Raise the number if a config
produces other packs than before, or if a field of the state changes its meaning."""

IN_OTHER_FORM = {
    DataConfig: {"sources", "tokenizer"},
    SourceConfig: {"path", "split", "subset", "revision", "streaming"},
}
"""Config fields that decide packs, but are stored in the identity in another form: as digests of
the content, or as numbers of rows."""

FIXED = re.compile(r"data\.(seed|(sources\[\d+\]\.)?(shuffle|shards))")
"""Paths of settings that decide the order of rows. A change cannot be accepted, because the rows
drawn before the change and the rows left after it would overlap or have gaps."""

LIBRARIES = ("tokenizers", "transformers", "jinja2")
"""Libraries that render and tokenize."""

WITHOUT_EFFECT = {
    DataConfig: {"workers", "prefetch", "accept_changed", "max_refused", "max_too_long"},
    SourceConfig: {"digest"},
}
"""Config fields that do not affect packs, so a resume may change them."""


class SourceIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files, number of rows, and settings of a source."""

    files: tuple[FileIdentity, ...]
    rows: int | None
    """Number of rows of all files; None for a streamed source."""
    weight: float | None
    repeat: float
    columns: dict[str, str] | None = None
    shuffle: Shuffle | None = None
    shards: int | None = None
    """Number of files of a streamed source; None for a source that is not streamed."""
    ignore: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    roles: dict[str, Role] | msgspec.UnsetType | None = msgspec.UNSET
    max_row_bytes: int | msgspec.UnsetType = msgspec.UNSET
    verified: bool | msgspec.UnsetType = msgspec.UNSET


class Identity(Policy, frozen=True, kw_only=True):
    """All data and settings that decide packs. It has no paths: files may be moved."""

    format: int
    sources: tuple[SourceIdentity, ...]
    tokenizer_sha256: str
    fast_tokenizer: str | None
    """Name of the library used instead of `tokenizers`; None for `tokenizers`."""
    versions: dict[str, str]
    """Versions of the libraries that render and tokenize, by name. Another version is no
    difference: a resume then compares the tokens of the waiting rows."""
    template_sha256: str
    date: str | None
    """The date printed by the template (YYYY-MM-DD); None if the template prints no date."""
    turn_format: TurnFormat = msgspec.field(name="form")
    """Format of assistant turns, found by rendering test conversations with the template."""
    streams: int
    global_batch: int
    window: int
    shuffle: Shuffle
    seed: int
    epochs: int | None
    mix_by: str
    stages: tuple[StageConfig, ...]
    ends_with: str
    variables: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """Variables of the chat template given by `tokenizer.variables`."""
    skip: SkipConfig | msgspec.UnsetType = msgspec.UNSET


def identify(config: DataConfig, corpus: Corpus, encoder: ChatEncoder) -> Identity:
    """Return the identity of a config, its opened sources and its tokenizer."""
    date = encoder.template.date
    return Identity(
        format=FORMAT,
        sources=tuple(map(_identify_source, config.sources, corpus.sources)),
        tokenizer_sha256=encoder.tokenizer.vocabulary.sha256,
        fast_tokenizer=encoder.tokenizer.fast and encoder.tokenizer.fast.split()[0],
        versions=_versions(encoder.tokenizer.fast),
        template_sha256=hashlib.sha256(encoder.template.text.encode()).hexdigest(),
        date=date.isoformat() if date else None,
        turn_format=encoder.report.turn_format,
        variables=config.tokenizer.variables or msgspec.UNSET,
        **_compared_fields(config, Identity),
    )


def _versions(fast_tokenizer: str | None) -> dict[str, str]:
    """Return the version of each library; `fast_tokenizer` is a name with version, or None."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return versions if fast_tokenizer is None else versions | dict([fast_tokenizer.split(" ", 1)])


def changed_versions(saved: Identity, now: Identity) -> list[str]:
    """Return each library with another version, as `tokenizers 0.21.0 -> 0.22.0`."""
    names = dict.fromkeys([*saved.versions, *now.versions])
    versions = {name: (saved.versions.get(name, "unknown"), now.versions.get(name, "unknown")) for name in names}
    return [f"{name} {before} -> {after}" for name, (before, after) in versions.items() if before != after]


def _identify_source(source: SourceConfig, opened: FileSet | StreamedSource) -> SourceIdentity:
    return SourceIdentity(
        files=opened.identities,
        rows=None if isinstance(opened, StreamedSource) else len(opened),
        shards=opened.file_count if isinstance(opened, StreamedSource) else None,
        **_compared_fields(source, SourceIdentity),
    )


def _compared_fields(config: DataConfig | SourceConfig, identity: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the config fields that a resume compares, as name -> value.

    A field that has the default UNSET in `identity` is left out if the config has its default.
    """
    left_out = IN_OTHER_FORM[type(config)] | WITHOUT_EFFECT[type(config)]
    younger = {field.name for field in msgspec.structs.fields(identity) if field.default is msgspec.UNSET}
    return {
        field.name: value
        for field in msgspec.structs.fields(config)
        if field.name not in left_out
        and not ((value := getattr(config, field.name)) == field.default and field.name in younger)
    }


def with_full_digests(identity: Identity, digests: Digests) -> Identity:
    """Return the identity with `digests` in place of the digests of samples."""
    sources = list(identity.sources)
    for number, of_files in digests.items():
        files = list(sources[number].files)
        for index, digest in of_files.items():
            files[index] = msgspec.structs.replace(files[index], sha256=digest, sampled=False)
        sources[number] = msgspec.structs.replace(sources[number], files=tuple(files))
    return msgspec.structs.replace(identity, sources=tuple(sources))


def differences(before: Any, after: Any, path: str = "data") -> list[str]:
    """Return each differing field as `path: before -> after`.

    Both arguments are dicts, lists and plain values, as returned by `msgspec.to_builtins`.
    `differences({"seed": 0}, {"seed": 1})` returns `["data.seed: 0 -> 1"]`.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return _flat(differences(before.get(key), after.get(key), f"{path}.{key}") for key in keys)
    if isinstance(before, list | tuple) and isinstance(after, list | tuple):
        pairs = itertools.zip_longest(before, after)
        return _flat(differences(b, a, f"{path}[{i}]") for i, (b, a) in enumerate(pairs))
    return [] if before == after else [f"{path}: {excerpt(before, 72)} -> {excerpt(after, 72)}"]


def accepted_changes(
    saved: Identity, now: Identity, accepted: Sequence[str], is_possible: Callable[[Sequence[str]], bool]
) -> list[str]:
    """Return the differences between two identities if all are accepted.

    `accepted` holds names such as "data.capacity"; "data.sources[2]" also accepts all differences
    inside the source. Another version of a library is a difference only if accepted. Raises
    ValueError naming the first ten differences that are not accepted, with advice to accept them if
    `is_possible` returns True for all differences; also for an accepted name of no setting.
    """
    require_settings(accepted)
    changed = [
        change
        for change in differences(msgspec.to_builtins(saved), msgspec.to_builtins(now))
        if not change.startswith("data.versions") or _is_covered(change, accepted)
    ]
    refused = [change for change in changed if not _is_covered(change, accepted)]
    if refused:
        advice = _advice(refused, accepted) if is_possible(changed) else ""
        more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise ValueError(
            "the state was taken from other data or settings, and a resume would not be exact: "
            f"{'; '.join(refused[:10])}{more}. Restore them, or start a new run{advice}"
        )
    return changed


def require_settings(accepted: Sequence[str]) -> None:
    """Raise ValueError if a name of `data.accept_changed` is no setting that a resume compares."""
    settings = {field.encode_name for field in msgspec.structs.fields(Identity)}
    for name in accepted:
        found = re.fullmatch(r"data(\.(\w+)((\.|\[\d+\]).*)?)?", name)
        if not found or (found[2] and found[2] not in settings):
            raise ValueError(
                f"data.accept_changed holds {name!r}, but a resume compares no such setting; write the name as a refused "
                "resume prints it, for example data.capacity or data.sources[0], or remove it"
            )


def _advice(refused: Sequence[str], accepted: Sequence[str]) -> str:
    """Return the advice to accept all differences, each by the name of its setting or source."""
    names = [match[0] for change in refused if (match := _SETTING.match(change))]
    return (
        f"; data.accept_changed = {[*dict.fromkeys([*accepted, *names])]} accepts the change, goes on from here, and "
        "records the change in the state"
    )


_SETTING = re.compile(r"data\.sources\[\d+\]|data\.\w+")


def _is_covered(change: str, accepted: Sequence[str]) -> bool:
    path = change.split(":")[0]
    return any(path == name or path.startswith((f"{name}.", f"{name}[")) for name in accepted)


def _flat(lists: Iterable[list[str]]) -> list[str]:
    return [item for part in lists for item in part]
