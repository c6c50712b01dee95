"""Read rows of files: by row number in any order, or from the beginning of a file to its end."""

from sftstream.sources.corpus import Corpus, CorpusReader, FileSet
from sftstream.sources.rows import FileIdentity, ReadRow, RowFile
from sftstream.sources.streamed import StreamedSource
from sftstream.sources.streamed_reader import StreamedReader

__all__ = [
    "Corpus",
    "CorpusReader",
    "FileIdentity",
    "FileSet",
    "ReadRow",
    "RowFile",
    "StreamedReader",
    "StreamedSource",
]
