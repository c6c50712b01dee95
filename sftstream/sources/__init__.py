"""Where conversations come from: rows of files, any of them by number, or one after the other where a source is streamed."""

from sftstream.sources.corpus import Corpus, CorpusReader, FileSet
from sftstream.sources.rows import FileIdentity, RowFile
from sftstream.sources.shard_reader import ShardReader
from sftstream.sources.streamed import StreamedSource

__all__ = ["Corpus", "CorpusReader", "FileIdentity", "FileSet", "RowFile", "ShardReader", "StreamedSource"]
