"""Errors for data that cannot be trained. This module imports nothing, for processes that must
start fast."""

from __future__ import annotations


class Refused(ValueError):
    """Error for a conversation that cannot be trained correctly. A `Refusal` records the row.

    `reason` is a short phrase for counting, such as "longer than capacity". `detail` is an
    explanation for people, such as "9000 tokens do not fit into a pack of 8192".
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BrokenRow(ValueError):
    """Error for a single stored row that cannot be read or decoded; other rows are readable.

    Callers put the row's location before the message: "is not JSON: ..." becomes
    "a.jsonl:3 is not JSON: ...".
    """
