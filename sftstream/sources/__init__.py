"""Read rows of files: by row number in any order, or from the beginning of a file to its end."""

from sftstream.sources.corpus import Bookmarks, Corpus, CorpusReader, FileSet
from sftstream.sources.rows import Bookmark, FileIdentity, ReadRow, RowFile
from sftstream.sources.streamed import StreamedSource
from sftstream.sources.streamed_reader import StreamedReader

__all__ = [
    "Bookmark",
    "Bookmarks",
    "Corpus",
    "CorpusReader",
    "FileIdentity",
    "FileSet",
    "ReadRow",
    "RowFile",
    "StreamedReader",
    "StreamedSource",
]
