"""Everything that flows from a row to a pack. Records only: nothing here reads, decides or acts.

`gc=False`: they hold values that hold nothing in turn, and a collector that looks through tens of thousands of them is slow.
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
"""The label of a token that is not trained, as `torch.nn.functional.cross_entropy` expects it."""


class Refused(ValueError):
    """This one conversation cannot be trained truly. `reason` is a few words to count by, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BrokenRow(ValueError):
    """A stored row that cannot be read or decoded; the rows around it can.

    The message names the fault and begins with a verb, so that it follows the row's location: "is not JSON: ...".
    """


UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of `msgspec.json.decode` on bytes that are not JSON, or on JSON nested deeper than Python follows."""

RawRow = bytes | Mapping[str, Any]
"""A row as its file stores it: JSON text, not yet decoded, or the columns of a table's row."""


class Ref(NamedTuple):
    """Where a conversation stands: `row` of the config's `source`-th source, drawn in its `epoch`-th pass."""

    source: int
    row: int
    epoch: int


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """One function call of an assistant message."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


class ToolCalls(tuple[ToolCall, ...]):
    """Those of one message. A type of its own, since datasets spell them in ways that need a hand to decode."""

    __slots__ = ()


Role = Literal["system", "user", "assistant", "tool"]
"""Who says a message, as chat templates know it."""


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of a message's reasoning in datasets, in order of precedence, and in chat templates, each of which knows one."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One turn. `content` is None only where the assistant just calls tools."""

    role: Role
    content: str | None = None
    reasoning: str | None = None
    tool_calls: ToolCalls = ToolCalls()
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None
    """What the data says of training this message; None leaves it to its role."""


class Conversation(msgspec.Struct, frozen=True, gc=False):
    """One dialogue, whatever layout it was stored in."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Span(NamedTuple):
    """Characters `[start, end)` of a rendered text that the assistant said, stop token included."""

    start: int
    end: int


class Rendered(msgspec.Struct, frozen=True, gc=False):
    """A conversation as the chat template prints it, and where the spans of it that are trained begin and end, by turns.

    `typed` are special tokens' text that somebody typed: words, not tokens.
    """

    text: str
    bounds: tuple[int, ...]
    typed: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans that are trained, in order."""
        return tuple(map(Span, self.bounds[::2], self.bounds[1::2]))


NO_NOTES: Mapping[str, int] = MappingProxyType({})


class Example(msgspec.Struct, frozen=True, gc=False):
    """A tokenized conversation: `tokens` int32 `(n,)`, `loss_mask` bool `(n,)`, true where the token is trained.

    `targets` is how many of these something comes before, so that they can be. `notes` counts what was done to get there, by
    what it was.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    targets: int
    notes: Mapping[str, int] = NO_NOTES


class Amount(msgspec.Struct, frozen=True, array_like=True):
    """How much of something there is."""

    conversations: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.conversations + other.conversations,
            self.tokens + other.tokens,
            self.trained_tokens + other.trained_tokens,
        )


class Segment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One conversation's stretch inside a pack, named by where it came from.

    The same record is the reference that a state keeps instead of tokens: reading `row` of `source`
    again gives the segment's tokens again.
    """

    source: int
    row: int
    length: int
    epoch: int
    part: int = 0
    """Which of the conversation's examples, where a policy makes several of one."""

    @property
    def ref(self) -> Ref:
        """Where the conversation stands."""
        return Ref(self.source, self.row, self.epoch)


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A row that is not trained on, and why. `reason` is one of a few words to count by, `detail` is for people."""

    source: int
    row: int
    epoch: int
    reason: str
    detail: str

    @classmethod
    def at(cls, ref: Ref, reason: str, detail: str) -> Refusal:
        """The refusal of the row at `ref`."""
        return cls(ref.source, ref.row, ref.epoch, reason, detail)


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch: whole conversations side by side in a row of fixed capacity `T`.

    `ids` int32 `(T,)`; `trained` bool `(T,)`, true for tokens that are to be learnt, which of a segment's first says nothing;
    `borders` int32, where segments begin and end: `[0, l1, l1+l2, ..., T]`. Where conversations leave a tail free, the padding
    is the last of these segments and is never trained. `segments` names the conversations, padding not among them. `refused`
    are the rows that were read for this pack and not taken. `last` says that the pack's logical stream has run dry: whatever
    comes from it later is empty.

    What a model takes is made of these when it is first asked for, and not sent from one process to another.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    borders: NDArray[np.int32]
    segments: tuple[Segment, ...] = ()
    refused: tuple[Refusal, ...] = ()
    exhausted: bool = False

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """int64 `(T,)`."""
        return torch.from_numpy(self.ids.astype(np.int64))

    @cached_property
    def labels(self) -> torch.Tensor:
        """int64 `(T,)`: the token that follows in the same conversation where that one is trained, else `IGNORE_INDEX`. The shift
        by one has been done, here and nowhere else."""
        labels = np.full(self.capacity, IGNORE_INDEX, np.int64)
        np.copyto(labels[:-1], self.ids[1:], where=self.trained[1:])
        labels[self.borders[1:] - 1] = IGNORE_INDEX  # nothing follows the last token of a segment
        return torch.from_numpy(labels)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """int64 `(T,)`: restart at 0 with every segment."""
        places = np.arange(self.capacity, dtype=np.int32)
        places -= self.borders[:-1].repeat(np.diff(self.borders))
        return torch.from_numpy(places.astype(np.int64))

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """int32: `borders`, as variable-length attention takes them."""
        return torch.from_numpy(self.borders)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""
        return int(np.diff(self.borders).max())

    @property
    def trained_tokens(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def capacity(self) -> int:
        """Slots of the pack, padding included."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens of conversations, padding excluded."""
        return sum([segment.length for segment in self.segments])

    @property
    def conversations(self) -> int:
        """Conversations that begin here: of one that was split, the first part counts."""
        return [segment.part for segment in self.segments].count(0)

    def digest(self) -> str:
        """SHA-256 (hex) of what the trainer computes with: ids, labels, positions and borders."""
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.labels, self.position_ids, self.cu_seqlens):
            digest.update(_narrow(tensor).tobytes())
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor through a worker's queue costs a file descriptor and 3-4 ms a pack. A pipe takes 64 KB at once, and the rest of
        # a larger pack waits until its worker has a moment for it.
        return _unpacked, (
            self.ids,
            np.packbits(self.trained),
            self.borders,
            self.segments,
            self.refused,
            self.exhausted,
        )


def batch_digest(digests: Iterable[str]) -> str:
    """SHA-256 (hex) of a step's packs, given their digests in the order of the run."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _narrow(tensor: torch.Tensor) -> NDArray[np.int32]:
    return np.ascontiguousarray(tensor.numpy(), dtype="<i4")


def _unpacked(ids: NDArray[np.int32], trained: NDArray[np.uint8], *rest: Any) -> Pack:
    return Pack(ids, np.unpackbits(trained, count=len(ids)).view(bool), *rest)
