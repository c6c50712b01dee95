"""The public names of the library, in the modules that define them.

Importing this module imports torch, transformers and pyarrow. The package imports this module when
one of the names is first used, so that `sftstream --help` loads none of these libraries.
"""

from sftstream import pages
from sftstream.cache import directory as cache_directory
from sftstream.cache import keep, kept
from sftstream.cli.results import show_result, write_page
from sftstream.config import MOST_STEPS, DataConfig, Policy, SkipConfig, SourceConfig, TokenizerConfig
from sftstream.door import Door
from sftstream.excerpt import one_line, printable
from sftstream.identity import differences
from sftstream.inspection.stored import read_state
from sftstream.inspection.summary import StateSummary, summarize
from sftstream.inspection.text import describe, diff
from sftstream.ledger.files import in_order
from sftstream.ledger.records import Session, Unapplied
from sftstream.ledger.segments import NO_SEGMENTS, SEGMENT, Segments, segments_of
from sftstream.ledger.writer import LedgerWriter
from sftstream.loader import LoaderPosition, PackLoader
from sftstream.records import (
    IGNORE_INDEX,
    UNDECODABLE,
    Conversation,
    Example,
    Message,
    Pack,
    Ref,
    Refusal,
    Refused,
    Segment,
    ToolCall,
    ToolCalls,
    batch_digest,
)
from sftstream.regular_files import require_files
from sftstream.sources.rows import identify as identify_file
from sftstream.state import DataState, StreamState, merge
from sftstream.streaming.assignment import PackAssignment, Shard
from sftstream.streaming.beside import Beside
from sftstream.streaming.example_reader import read_conversations
from sftstream.streaming.forecast import Forecast
from sftstream.streaming.order import rows_in_all_epochs
from sftstream.streaming.refusals import TOO_LONG, RowCounts, exceeded_limits, require_few_refused, sum_row_counts
from sftstream.tokenization.encoder import ChatEncoder
from sftstream.tokenization.saved_tokenizer import SavedTokenizer
from sftstream.tokenization.vocabulary import count_token_ids
from sftstream.toml_file import read_toml

__all__ = [
    "IGNORE_INDEX",
    "MOST_STEPS",
    "NO_SEGMENTS",
    "SEGMENT",
    "TOO_LONG",
    "UNDECODABLE",
    "Beside",
    "ChatEncoder",
    "Conversation",
    "DataConfig",
    "DataState",
    "Door",
    "Example",
    "Forecast",
    "LedgerWriter",
    "LoaderPosition",
    "Message",
    "Pack",
    "PackAssignment",
    "PackLoader",
    "Policy",
    "Ref",
    "Refusal",
    "Refused",
    "RowCounts",
    "SavedTokenizer",
    "Segment",
    "Segments",
    "Session",
    "Shard",
    "SkipConfig",
    "SourceConfig",
    "StateSummary",
    "StreamState",
    "TokenizerConfig",
    "ToolCall",
    "ToolCalls",
    "Unapplied",
    "batch_digest",
    "cache_directory",
    "count_token_ids",
    "describe",
    "diff",
    "differences",
    "exceeded_limits",
    "identify_file",
    "in_order",
    "keep",
    "kept",
    "merge",
    "one_line",
    "pages",
    "printable",
    "read_conversations",
    "read_state",
    "read_toml",
    "require_few_refused",
    "require_files",
    "rows_in_all_epochs",
    "segments_of",
    "show_result",
    "sum_row_counts",
    "summarize",
    "write_page",
]
