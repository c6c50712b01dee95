"""Where conversations come from: any row of any file, by number."""

from sftstream.sources.corpus import Corpus
from sftstream.sources.rows import BrokenRow, FileIdentity, RowFile

__all__ = ["BrokenRow", "Corpus", "FileIdentity", "RowFile"]
