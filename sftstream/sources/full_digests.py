"""Digests of all bytes of large files, computed beside the training.

The identity of a file above 256 MiB is a digest of samples, since the first pack should not wait
for a terabyte to be read. A thread then reads the files in full, and the next state holds the full
digests. A resume compares them, so an edit between the samples is found.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from sftstream.cache import Unwritable
from sftstream.sources.corpus import Corpus, FileSet
from sftstream.sources.rows import FileIdentity
from sftstream.sources.stored import Interrupted
from sftstream.sources.streamed import StreamedSource

logger = logging.getLogger(__name__)

Digests = Mapping[int, Mapping[int, str]]
"""Number of a source -> number of a file in the source -> SHA-256 of all bytes."""


class DigestedFile(Protocol):
    """A file with a digest of samples and, on demand, of all bytes."""

    @property
    def identity(self) -> FileIdentity: ...

    def digest_in_full(self, interrupted: Callable[[], bool], *, quiet: bool) -> str | None: ...


class FullDigests:
    """The known digests of all bytes of a corpus's sampled files."""

    def __init__(self, corpus: Corpus) -> None:
        self._files = {
            (source, number): file
            for source, opened in enumerate(corpus.sources)
            for number, file in _files_of(opened)
            if file.identity.sampled
        }
        self.known: Digests = {}
        """Replaced by each new digest, never modified: other threads read it."""
        self._interrupted = threading.Event()
        self._thread: threading.Thread | None = None

    def verify(self, before: Digests, files: Mapping[int, tuple[FileIdentity, ...]]) -> Digests:
        """Return the present digests of the files that a state has digests of, and keep them.

        `files` holds each source's identities in the state. A file whose identity differs is left
        out: its change is already known. Reads a file of another seal in full.
        """
        for (source, number), file in self._files.items():
            known = before.get(source, {}).get(number)
            if known is not None and files[source][number : number + 1] == (file.identity,):
                self._keep(source, number, file.digest_in_full(lambda: False, quiet=False))
        return self.known

    def start(self) -> None:
        """Compute the missing digests in a thread of low priority."""
        if self._thread is None and len(self._files) > sum(map(len, self.known.values())):
            self._interrupted = threading.Event()  # the event of an earlier thread remains set
            self._thread = threading.Thread(target=self._compute, name="full digests", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Let the thread end at the next block of the file."""
        self._interrupted.set()
        self._thread = None

    def _compute(self) -> None:
        interrupted = self._interrupted
        with suppress(OSError):  # some systems have one priority for all threads of a process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for (source, number), file in self._files.items():
            if number in self.known.get(source, {}):
                continue
            try:
                self._keep(source, number, file.digest_in_full(interrupted.is_set, quiet=True))
            except Interrupted:
                return
            except (OSError, RuntimeError, Unwritable) as error:
                logger.warning("the digest of all bytes of a file is left out: %s", error)

    def _keep(self, source: int, number: int, digest: str | None) -> None:
        if digest is not None:
            self.known = {**self.known, source: {**self.known.get(source, {}), number: digest}}


def _files_of(opened: FileSet | StreamedSource) -> list[tuple[int, DigestedFile]]:
    if isinstance(opened, FileSet):
        return list(enumerate(opened.files))
    return list(opened.local_files.items())
