"""Look at a sample of a source: layouts, turns, lengths, refused rows."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable

import msgspec
import numpy as np

from sftstream.config import NamedRole, SourceConfig
from sftstream.formats.fields import spellings
from sftstream.formats.layouts import find_layout
from sftstream.formats.rows import row_fields
from sftstream.records import REASONING_KEYS, BrokenRow, Conversation, Example, RawRow, Ref, Refused
from sftstream.sources import Corpus, FileSet
from sftstream.streaming.example_reader import ExampleReader
from sftstream.streaming.order import permute, round_keys
from sftstream.tokenization.encoder import ChatEncoder

ROWS = 512
"""Rows of a sample."""
ROWS_AT_ONCE = 32
USUAL = {
    "question": ("question", "prompt", "query", "instruction", "problem", "input", "inputs", "user", "human"),
    "response": (
        *(
            "response",
            "answer",
            "completion",
            "output",
            "chosen",
            "solution",
            "generated_solution",
            "target",
            "targets",
        ),
        *("content", "reply", "llm_response", "assistant"),
    ),
    "reasoning": (*REASONING_KEYS, "complex_cot", "cot", "chain_of_thought", "thought", "thoughts", "rationale"),
}
"""Known name of a column -> usual names of such a column in datasets, the likeliest first."""


class RefusedRow(msgspec.Struct, frozen=True):
    """A row of the sample that would not be trained."""

    place: str
    reason: str
    detail: str


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """The sample of a source."""

    path: str
    verified: bool
    """False if the rows are plain text or token ids, of which nothing can be proved."""
    columns: dict[str, str] | None
    ignore: tuple[str, ...]
    named_roles: dict[str, NamedRole] | None
    """The setting `roles` of the source."""
    files: int
    rows: int
    sampled: int
    layouts: dict[str, int]
    """Layout -> rows of the sample."""
    messages: tuple[int, ...]
    """Number of messages of each conversation, in rising order."""
    roles: dict[str, int]
    """Role -> conversations of the sample with a message of the role."""
    lengths: tuple[int, ...]
    """Tokens of each conversation, in rising order."""
    trained: int
    """Trained tokens of all sampled conversations."""
    refused: tuple[RefusedRow, ...]

    @property
    def tokens(self) -> int:
        """Estimated tokens of the whole source."""
        return sum(self.lengths) * self.rows // max(self.sampled, 1)

    def length(self, share: float) -> int:
        """Return the length below which a share of the sampled conversations is."""
        return self.lengths[min(len(self.lengths) - 1, int(share * len(self.lengths)))]


def look(source: SourceConfig, encoder: ChatEncoder) -> Look:
    """Return the sample of a source; rows of plain text are read if there are no others.

    `encoder` should have the largest capacity, so that no row is refused for its length. Raises
    ValueError if every sampled row is refused.
    """
    found = _look(source, encoder)
    if not found.lengths and found.refused and source.verified:
        plain = _look(msgspec.structs.replace(source, verified=False), encoder)
        found = plain if plain.lengths else found
    if not found.lengths:
        row = found.refused[0]
        raise ValueError(
            f"no row of {source.path!r} can be trained; the first of {found.sampled} sampled rows: {row.place}: "
            f"{row.reason}: {row.detail}; correct the data, or give the settings of its source as options: "
            f"{_options(source)}, --ignore NAME, --roles NAME=ROLE"
        )
    return found


def propose_columns(names: Iterable[str]) -> dict[str, str]:
    """Return known name -> column for columns that hold a question, an answer and its reasoning.

    `["Problem", "Complex_CoT", "Solution"]` gives `{"question": "Problem", "response": "Solution",
    "reasoning": "Complex_CoT"}`. Return nothing without a question and an answer.
    """
    columns = {spelled: name for name in names for spelled in spellings(name)}
    found = {
        known: columns[usual[0]]
        for known, given in USUAL.items()
        if (usual := [name for name in given if name in columns])
    }
    return found if {"question", "response"} <= found.keys() else {}


def _options(source: SourceConfig) -> str:
    """Return options of `init` that name the columns of the first row, or examples."""
    opened = Corpus((source,)).sources[0]
    try:
        proposed = propose_columns(row_fields(opened.read(0), source)) if isinstance(opened, FileSet) else {}
    except (Refused, BrokenRow):
        proposed = {}
    columns = proposed or {"prompt": "COLUMN", "completion": "COLUMN"}
    return " ".join(f"--columns {shlex.quote(f'{name}={column}')}" for name, column in columns.items())


def _look(source: SourceConfig, encoder: ChatEncoder) -> Look:
    corpus = Corpus((source,))
    opened = corpus.sources[0]
    if not isinstance(opened, FileSet):
        raise ValueError(f"source {source.path!r} is streamed, so no sample can be drawn; leave streaming out")
    rows = permute(np.arange(min(ROWS, len(opened))), len(opened), round_keys("init", 0)).tolist()
    reader = ExampleReader.of(corpus, encoder)
    layouts, roles = Counter[str](), Counter[str]()
    messages: list[int] = []
    lengths: list[int] = []
    refused: list[RefusedRow] = []
    trained = 0
    for first in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[first : first + ROWS_AT_ONCE]
        for row, loaded in zip(batch, reader.load([Ref(0, row, 0) for row in batch]), strict=True):
            try:
                examples = [] if isinstance(loaded, Refused) else _examples(encoder, loaded)
                if isinstance(loaded, Refused):
                    raise loaded
            except Refused as refusal:
                refused.append(RefusedRow(opened.locate_row(row), refusal.reason, refusal.detail))
                continue
            layouts[_layout(opened.read(row), source)] += 1
            if isinstance(loaded, Conversation):
                messages.append(len(loaded.messages))
                roles.update({message.role for message in loaded.messages})
            lengths += [len(example.tokens) for example in examples]
            trained += sum(example.targets for example in examples)
    return Look(
        path=source.path,
        verified=source.verified,
        columns=source.columns,
        ignore=source.ignore,
        named_roles=source.roles,
        files=len(opened.files),
        rows=len(opened),
        sampled=len(rows),
        layouts=dict(layouts.most_common()),
        messages=tuple(sorted(messages)),
        roles=dict(roles.most_common()),
        lengths=tuple(sorted(lengths)),
        trained=trained,
        refused=tuple(refused),
    )


def _examples(encoder: ChatEncoder, loaded: Conversation | list[Example]) -> list[Example]:
    return encoder.encode_conversation(loaded) if isinstance(loaded, Conversation) else loaded


def _layout(row: RawRow, source: SourceConfig) -> str:
    """Return the columns that a row was read from."""
    try:
        return str(find_layout(row_fields(row, source)))
    except (Refused, BrokenRow):
        return "plain text or token ids"
