"""A stored row of any known dataset layout -> Conversation.

The layout is recognised for each row, since rows of one file may differ. All of these rows become
Conversation((Message("user", "hi"), Message("assistant", "hello"))):

    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    {"instruction": "hi", "output": "hello"}
    {"prompt": "hi", "completion": "hello"}
"""

from sftstream.formats.layouts import LAYOUTS
from sftstream.formats.messages import ROLES
from sftstream.formats.rows import decode_row, parse_row, unread_columns

__all__ = ["LAYOUTS", "ROLES", "decode_row", "parse_row", "unread_columns"]
