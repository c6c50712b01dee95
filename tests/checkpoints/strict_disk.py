"""A file system in memory: a power cut loses all that POSIX allows to be lost."""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Iterator
from typing import Any

Tree = dict[str, bytes | None]
"""Content of files by path; None for a directory."""


class Disk:
    """A strict POSIX file system.

    Until forced, any part of the changed names and data may be lost, in any order.
    """

    def __init__(self, top: str) -> None:
        self.inodes = itertools.count()
        self.at = {top: "top"}
        self.names: dict[str, dict[str, str]] = {"top": {}}  # of directories, as forced
        self.loose: list[tuple[str, str | None, str | None, str]] = []  # directory, name gone, name come, inode
        self.data: dict[str, bytes] = {}
        self.forced: dict[str, bytes] = {}

    def apply(self, operation: str, path: str, detail: Any) -> None:
        parent, name = os.path.split(path)
        if operation in ("mkdir", "create"):
            inode = self.at[path] = str(next(self.inodes))
            if operation == "mkdir":
                self.names[inode] = {}
            else:
                self.data[inode] = self.forced[inode] = b""
            self.loose.append((self.at[parent], None, name, inode))
        elif operation == "write":
            self.data[self.at[path]] += detail
        elif operation == "remove":
            self.loose.append((self.at[parent], name, None, self.at.pop(path)))
        elif operation == "rename":
            self.loose.append((self.at[parent], name, os.path.basename(detail), self.at[path]))
            moved = [old for old in self.at if old == path or old.startswith(path + "/")]
            self.at |= {detail + old.removeprefix(path): self.at.pop(old) for old in moved}
        elif operation == "fsync" and path in self.at:
            inode = self.at[path]
            if inode in self.data:
                self.forced[inode] = self.data[inode]
            else:
                self.settle([change for change in self.loose if change[0] == inode])
                self.loose = [change for change in self.loose if change[0] != inode]

    def settle(self, changes: list[tuple[str, str | None, str | None, str]]) -> None:
        for directory, gone, come, inode in changes:
            if gone is not None and self.names[directory].get(gone) == inode:
                del self.names[directory][gone]
            if come is not None:
                self.names[directory][come] = inode

    def crashes(self, choice: random.Random, limit: int = 60) -> Iterator[Tree]:
        """Yield possible states after a power cut now.

        All combinations if at most `limit`, else `limit` random combinations and the two extremes.
        """
        dirty = [inode for inode, data in self.data.items() if data != self.forced[inode]]
        options = [(False, True)] * len(self.loose) + [("old", "half", "zeros", "new")] * len(dirty)
        combinations = itertools.product(*options)
        if len(self.loose) + 2 * len(dirty) > 6:
            extremes = [[option[0] for option in options], [option[-1] for option in options]]
            combinations = itertools.chain(extremes, ([choice.choice(o) for o in options] for _ in range(limit)))
        for picked in combinations:
            found = copy.deepcopy(self)
            found.settle([change for change, kept in zip(self.loose, picked, strict=False) if kept])
            for inode, kept in zip(dirty, picked[len(self.loose) :], strict=True):
                data = self.data[inode]
                versions = {"half": data[: len(data) // 2], "zeros": bytes(len(data)), "new": data}
                found.forced[inode] = versions.get(kept, self.forced[inode])
            yield found.tree("top", "")

    def tree(self, directory: str, prefix: str) -> Tree:
        tree: Tree = {}
        for name, inode in self.names[directory].items():
            path = prefix + name
            tree[path] = self.forced.get(inode)
            if inode in self.names:
                tree |= self.tree(inode, path + "/")
        return tree
