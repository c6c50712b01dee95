"""A stored row of any known dataset layout -> Conversation.

The words of this package, on the row `{"messages": [{"role": "user", "content": "hi"}, ...]}`:

    row       one stored conversation: JSON text, or the columns of a table's row
    column    a key at the top of a row: "messages"
    layout    the columns that a row must have, and the way to read the messages: "messages" is one
              layout, "instruction" with "output" is another
    turn      one item in a column of messages, as stored: `{"role": "user", "content": "hi"}`
    message   a turn that has been read: `Message("user", "hi")`
    part      one item of a content that is a list: `{"type": "text", "text": "hi"}`
    item      a turn of the Responses API: `{"type": "reasoning", "summary": [...]}`
    round     a user's turn with its answer: `{"input": "hi", "output": "hello"}`
    mark      a key of a turn, item or round that trains or excludes it: `"weight": 0`
    path      the place of a value in a row, for error messages: "messages[0].content"

The layout is recognised for each row, because rows of one file may differ. Each of these rows
becomes Conversation((Message("user", "hi"), Message("assistant", "hello"))):

    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"instruction": "hi", "output": "hello"}
    {"prompt": "hi", "completion": "hello"}
"""

from sftstream.formats.layouts import LAYOUTS
from sftstream.formats.roles import ROLES
from sftstream.formats.rows import decode_row, parse_row, unread_columns
from sftstream.formats.unverified import Unverified, parse_unverified

__all__ = ["LAYOUTS", "ROLES", "Unverified", "decode_row", "parse_row", "parse_unverified", "unread_columns"]
