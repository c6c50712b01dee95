"""Records of each stage from a row to a pack: RawRow, Conversation, Rendered, Example, Pack.

Records only: nothing here reads, decides or acts. `gc=False` keeps tens of thousands of live
records out of the garbage collector's scans; the records hold no reference cycles.
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

IGNORE_INDEX = -100
"""Label of an untrained token, as `torch.nn.functional.cross_entropy` expects."""


class Refused(ValueError):
    """A conversation that cannot be trained correctly.

    `reason` is a short phrase to count by, `detail` an explanation for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BrokenRow(ValueError):
    """A stored row that cannot be read or decoded, between rows that can.

    The message follows the row's location: "is not JSON: ..." becomes "a.jsonl:3 is not JSON: ...".
    """


UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of `msgspec.json.decode` on bytes that are not JSON, or on JSON nested deeper than
Python follows."""


class Unreadable(msgspec.Struct, frozen=True, gc=False):
    """Placeholder of a column's value that Python cannot hold, with the reason.

    A row is refused only if its layout reads the column.
    """

    reason: str


RawRow = bytes | Mapping[str, Any]
"""A stored row: JSON text, not yet decoded, or the columns of a table's row as Python values."""


class Ref(NamedTuple):
    """Reference to a drawn row: the source's index, the row's number in the source, the pass."""

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

    A separate type, so that msgspec hands tool calls to a hook that knows their many spellings.
    """

    __slots__ = ()


Role = Literal["system", "user", "assistant", "tool"]
"""Author of a message, as chat templates name roles."""


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of a message's reasoning. Datasets: the first name present counts. Chat templates: each
template reads one name."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A turn of a conversation. `content` is None only if the assistant just calls tools."""

    role: Role
    content: str | None = None
    reasoning: str | None = None
    tool_calls: ToolCalls = ToolCalls()
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None
    """Choice by the data to train this message or not; None leaves the choice to the role."""


class Conversation(msgspec.Struct, frozen=True, gc=False):
    """Messages and tool definitions, in one form for all dataset layouts."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    variables: dict[str, Any] = {}
    """Variables that the chat template gets for this conversation, by name."""


class Span(NamedTuple):
    """Range of characters `[start, end)` in a rendered text, stop token included."""

    start: int
    end: int


class Rendered(msgspec.Struct, frozen=True, gc=False):
    """A conversation as printed by the chat template, with the trained spans.

    `bounds` alternates the spans' starts and ends: `(3, 8, 20, 24)` is spans 3-8 and 20-24. `typed`
    are ranges of message content that spell a special token, to be tokenized as plain words.
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

    `targets` is the number of trained tokens that have a predecessor. `notes` counts treatments of
    the conversation by name, for example truncations.
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
    """An example's part of a pack, named by the row.

    A state keeps segments instead of tokens: reading `row` of `source` again gives the segment's
    `length` tokens again.
    """

    source: int
    row: int
    length: int
    epoch: int
    part: int = 0
    """Index of the example among the examples of its conversation; 0 unless a policy makes
    several."""

    @property
    def ref(self) -> Ref:
        """Reference to the segment's row."""
        return Ref(self.source, self.row, self.epoch)


class Refusal(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row that is not trained.

    `reason` is a short phrase to count by, `detail` an explanation for people.
    """

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
    """A micro-batch: whole segments side by side, padded to the capacity of `T` tokens.

    Two segments of 3 and 2 trained tokens in a capacity of 6:

        ids          = [7, 8, 9, 4, 5, 0]
        trained      = [0, 1, 1, 0, 1, 0]
        borders      = [0, 3, 5, 6]
        labels       = [8, 9, -100, 5, -100, -100]
        position_ids = [0, 1, 2, 0, 1, 0]

    The tensors of a model's input are computed on first use, and not sent between processes.
    """

    ids: NDArray[np.int32]
    """Token ids, int32 `(T,)`."""
    trained: NDArray[np.bool_]
    """True where the token is a target, bool `(T,)`; ignored at a segment's first token."""
    borders: NDArray[np.int32]
    """Borders of the segments, int32: `[0, l1, l1 + l2, ..., T]`. Padding, if any, is the last
    segment, and is never trained."""
    segments: tuple[Segment, ...] = ()
    """Segments of conversations, without padding."""
    refused: tuple[Refusal, ...] = ()
    """Rows that were read for this pack and refused."""
    exhausted: bool = False
    """True if the pack's logical stream has ended: all later packs of the stream are empty."""

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """Token ids, int64 `(T,)`."""
        return torch.from_numpy(self.ids.astype(np.int64))

    @cached_property
    def labels(self) -> torch.Tensor:
        """Targets, int64 `(T,)`: the segment's next token if trained, else `IGNORE_INDEX`.

        Labels are already shifted by one; a loss must not shift again.
        """
        labels = np.full(self.capacity, IGNORE_INDEX, np.int64)
        np.copyto(labels[:-1], self.ids[1:], where=self.trained[1:])
        labels[self.borders[1:] - 1] = IGNORE_INDEX  # nothing follows the last token of a segment
        return torch.from_numpy(labels)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """Positions, int64 `(T,)`, from 0 in each segment."""
        positions = np.arange(self.capacity, dtype=np.int32)
        positions -= self.borders[:-1].repeat(np.diff(self.borders))
        return torch.from_numpy(positions.astype(np.int64))

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Borders of the segments, int32 `(segments + 1,)`, for variable-length attention."""
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
        """Number of conversations; a split conversation counts in its first part's pack."""
        return [segment.part for segment in self.segments].count(0)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of ids, labels, positions and borders."""
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.labels, self.position_ids, self.cu_seqlens):
            digest.update(_narrow(tensor).tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor in a worker's queue costs a file descriptor and 3-4 ms a pack. A pipe takes 64 KB
        # at once; the rest of a larger pack would wait for its worker: send the mask as bits.
        return _unpacked, (
            self.ids,
            np.packbits(self.trained),
            self.borders,
            self.segments,
            self.refused,
            self.exhausted,
        )


def batch_digest(digests: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of a global batch, from its packs' digests in run order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _narrow(tensor: torch.Tensor) -> NDArray[np.int32]:
    return np.ascontiguousarray(tensor.numpy(), dtype="<i4")


def _unpacked(ids: NDArray[np.int32], trained: NDArray[np.uint8], *rest: Any) -> Pack:
    return Pack(ids, np.unpackbits(trained, count=len(ids)).view(bool), *rest)
