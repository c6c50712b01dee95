"""Records from a row to a pack, in this order: RawRow, Conversation, Rendered, Example, Pack.

This module only defines records; other modules make and change them. `gc=False` excludes a record
from the scans of the garbage collector, since tens of thousands of records exist at a time. This is
safe because the records contain no reference cycles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sftstream.refused import BrokenRow as BrokenRow
from sftstream.refused import Refused as Refused

IGNORE_INDEX = -100
"""Label of an untrained token, as `torch.nn.functional.cross_entropy` expects."""


UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of `msgspec.json.decode` for bytes that are not JSON, and for JSON that is nested too
deeply for Python."""


class Unreadable(msgspec.Struct, frozen=True, gc=False):
    """Placeholder for a column's value that Python cannot represent, with the reason.

    For example a date in the year 20000. The row is refused only if its layout reads the column.
    """

    reason: str


RawRow = bytes | Mapping[str, Any]
"""A stored row: undecoded JSON text, or column name -> Python value for a row of a table."""


class Ref(NamedTuple):
    """Reference to a drawn row: index of the source, number of the row in the source, epoch."""

    source: int
    row: int
    epoch: int


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A function call of an assistant message."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


class ToolCalls(tuple[ToolCall, ...]):
    """Tool calls of a message.

    A separate type lets msgspec decode tool calls with a hook that knows the spellings of various
    datasets.
    """

    __slots__ = ()


Role = Literal["system", "user", "assistant", "tool"]
"""Author of a message, as chat templates name roles."""


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys for the reasoning of a message. If a dataset has several of the keys, the first in this
order is used. A chat template reads one of the keys."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A turn of a conversation. `content` is None only if the assistant calls tools without
    text."""

    role: Role
    content: str | None = None
    reasoning: str | None = None
    tool_calls: ToolCalls = ToolCalls()
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None
    """True or False if the row says whether to train the message; None if the role decides."""


class Conversation(msgspec.Struct, frozen=True, gc=False):
    """Messages and tool definitions, in the same form for all dataset layouts."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    variables: dict[str, Any] = {}
    """Variables that the chat template gets for this conversation, by name."""


class Span(NamedTuple):
    """Range of characters `[start, end)` in a rendered text, stop token included."""

    start: int
    end: int


class Rendered(msgspec.Struct, frozen=True, gc=False):
    """A conversation as text, rendered by the chat template, with the trained spans.

    `bounds` holds start and end of each span in turn: `(3, 8, 20, 24)` is the spans 3-8 and 20-24.
    `typed` holds the ranges in which a message spells out a special token, for example a user who
    types "<|eot_id|>"; the tokenizer treats such a range as ordinary text.
    """

    text: str
    bounds: tuple[int, ...]
    typed: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """Trained spans, in text order."""
        return tuple(map(Span, self.bounds[::2], self.bounds[1::2]))


NO_NOTES: Mapping[str, int] = MappingProxyType({})


class Example(msgspec.Struct, frozen=True, gc=False):
    """A tokenized conversation: `tokens` int32 `(n,)`, `loss_mask` bool `(n,)`, True if trained.

    `targets` is the number of trained tokens without the first token of the example, which no token
    predicts: 2 for the loss mask `[1, 0, 1, 1]`. `notes` counts modifications of the conversation
    by name, such as truncations.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    targets: int
    notes: Mapping[str, int] = NO_NOTES


class Amount(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Counts of conversations, tokens and trained tokens."""

    conversations: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.conversations + other.conversations,
            self.tokens + other.tokens,
            self.trained_tokens + other.trained_tokens,
        )


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The place of an example in a pack, named by the row of the example.

    A state stores segments instead of tokens: if `row` of `source` is read again, its example has
    the same `length` tokens. Padding at the end of a pack is not a `Segment`, but has a border.
    """

    source: int
    row: int
    length: int
    epoch: int
    part: int = 0
    """Index of the example among the examples of its conversation; 0 unless the settings
    `overflow = "split"` or `history = "per_turn"` make several examples."""

    @property
    def ref(self) -> Ref:
        """Reference to the segment's row."""
        return Ref(self.source, self.row, self.epoch)


class Refusal(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Record of a row that is not trained, with the reason and the detail of a `Refused`."""

    source: int
    row: int
    epoch: int
    reason: str
    detail: str

    @classmethod
    def at(cls, ref: Ref, reason: str, detail: str) -> Refusal:
        """Return the refusal of row `ref`."""
        return cls(ref.source, ref.row, ref.epoch, reason, detail)


@dataclass(frozen=True, eq=False)
class Pack:
    """A micro-batch: segments side by side, padded to `T` tokens, the capacity.

    An example with a segment of 3 tokens, of which 2 are trained, and a segment of 2 tokens, of
    which 1 is trained. The capacity is 6:

        ids          = [7, 8, 9, 4, 5, 0]
        trained      = [0, 1, 1, 0, 1, 0]
        borders      = [0, 3, 5, 6]
        labels       = [8, 9, -100, 5, -100, -100]
        position_ids = [0, 1, 2, 0, 1, 0]

    Workers send only the arrays. The training process computes the tensors on first use.
    """

    ids: NDArray[np.int32]
    """Token ids, int32 `(T,)`."""
    trained: NDArray[np.bool_]
    """True if the token is trained, bool `(T,)`. Ignored at the first token of a segment, which no
    token predicts."""
    borders: NDArray[np.int32]
    """Borders of segments of `l1`, `l2`, ... tokens, int32: `[0, l1, l1 + l2, ..., T]`. Padding, if
    any, lies between the last two borders, and is never trained."""
    segments: tuple[Segment, ...] = ()
    """Segments of conversations, without padding."""
    refused: tuple[Refusal, ...] = ()
    """Rows that were refused since the stream's previous pack."""
    exhausted: bool = False
    """True if the pack's logical stream has ended: all later packs of the stream are empty."""
    skipped: tuple[Segment, ...] = ()
    """Segments that `data.skip` has left out of the pack."""

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """Token ids, int64 `(T,)`."""
        return torch.from_numpy(self.ids.astype(np.int64))

    @cached_property
    def labels(self) -> torch.Tensor:
        """Targets, int64 `(T,)`: the next token of the segment if trained, else `IGNORE_INDEX`.

        Labels are already shifted by one position; the loss function must not shift them again.
        """
        labels = np.full(self.capacity, IGNORE_INDEX, np.int64)
        np.copyto(labels[:-1], self.ids[1:], where=self.trained[1:])
        labels[self.borders[1:] - 1] = IGNORE_INDEX  # nothing follows the last token of a segment
        return torch.from_numpy(labels)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Position of each token in its segment, int64 `(T,)`, counted from 0."""
        positions = np.arange(self.capacity, dtype=np.int32)
        positions -= self.borders[:-1].repeat(np.diff(self.borders))
        return torch.from_numpy(positions.astype(np.int64))

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """`borders` as a tensor, int32, for variable-length attention."""
        return torch.from_numpy(self.borders)

    @property
    def max_seqlen(self) -> int:
        """Number of tokens of the longest segment."""
        return int(np.diff(self.borders).max())

    @property
    def trained_tokens(self) -> int:
        """Number of labels that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def capacity(self) -> int:
        """Number of tokens, padding included."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return sum([segment.length for segment in self.segments])

    @property
    def conversations(self) -> int:
        """Number of conversations; a conversation of several parts counts in the pack of part 0."""
        return [segment.part for segment in self.segments].count(0)

    @property
    def rows(self) -> int:
        """Number of conversations, refused rows and skipped rows; a row of several parts counts in
        the pack of part 0."""
        return self.conversations + len(self.refused) + [segment.part for segment in self.skipped].count(0)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of ids, labels, positions and borders."""
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.labels, self.position_ids, self.cu_seqlens):
            digest.update(_narrow(tensor).tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrays instead of tensors: sending a tensor costs a file descriptor and 3-4 ms per pack.
        # The mask as bits: a pipe accepts only 64 KB without waiting for the receiver.
        return _unpacked, (
            self.ids,
            np.packbits(self.trained),
            self.borders,
            self.segments,
            self.refused,
            self.exhausted,
            self.skipped,
        )


def batch_digest(digests: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of a global batch, from the digests of its packs in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _narrow(tensor: torch.Tensor) -> NDArray[np.int32]:
    return np.ascontiguousarray(tensor.numpy(), dtype="<i4")


def _unpacked(ids: NDArray[np.int32], trained: NDArray[np.uint8], *rest: Any) -> Pack:
    return Pack(ids, np.unpackbits(trained, count=len(ids)).view(bool), *rest)
