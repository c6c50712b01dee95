"""Where conversations come from: rows of files, any of them by number, or one after the other where a source is streamed."""

from sftstream.sources.corpus import Corpus, FileSet, Reading
from sftstream.sources.rows import BrokenRow, FileIdentity, RowFile
from sftstream.sources.shard_reader import Tape
from sftstream.sources.streamed import Streamed

__all__ = ["BrokenRow", "Corpus", "FileIdentity", "FileSet", "Reading", "RowFile", "Streamed", "Tape"]
