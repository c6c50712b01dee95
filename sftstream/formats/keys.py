"""The keys of an object inside a conversation: a turn, an item, a part, a call, a round.

No words are lost silently: a key that is known to hold words is read, or the row is refused. The
same holds for two keys with different values of one meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sftstream.excerpt import excerpt
from sftstream.formats.exclusions import MARKS, refuse_marks
from sftstream.formats.fields import ANSWERS, QUESTIONS, SYSTEM, TOOLS, carries_words, in_turns, spellings
from sftstream.records import REASONING_KEYS, Refused

CONTENT = ("content", "value", "text")
"""Keys of a turn's content."""
ARGUMENTS = ("arguments", "parameters", "input")
"""Keys of the arguments of a call."""
KEEP_ONE = "keep one of the keys"
"""Remedy for keys of a part, a call or a definition, which `ignore` does not leave out."""
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Names of columns and keys with pictures, films and sounds, which no model here can read."""
REASONINGS = frozenset(
    {*REASONING_KEYS, "thought", "thoughts", "chain_of_thought", "cot", "rationale", "reasoning_trace"}
)
"""Names of columns and keys with reasoning."""
COMMON_WORDS = frozenset(
    {*REASONINGS, *MEDIA}
    | {"sys", "sys_prompt", "system_instruction", "system_instructions", "instructions", "developer", "preamble"}
    | {"function", "function_list", "tool_schema", "tool_descriptions", "apis", "api_list", "available_apis"}
    | {"history", "chat_history", "conversation_history", "dialogue_history", "previous_turns", "previous_messages"}
    | {"dialogue", "dialog", "chat", "turns", "utterances"}
    | {"context", "contexts", "document", "documents", "passage", "passages", "paragraph", "paragraphs", "article"}
    | {"knowledge", "background", "persona", "personas", "evidence"}
)
"""Names known for words of a conversation, of a row's column and of a key inside a conversation."""
WORDS = COMMON_WORDS | frozenset(
    {*CONTENT, *ARGUMENTS, "output", "output_text", "messages", "conversation", "conversations", "refusal", "parts"}
    | {"instruction", *QUESTIONS, *ANSWERS, *SYSTEM, *TOOLS}
    | {"think", "thinking_content", "thinking_blocks", "reasoning_text", "reasoning_details", "analysis", "tool_plan"}
    | {"tool_call", "tool_calls", "function_call", "function_calls", "tool_use", "tool_uses", "calls", "invocations"}
    | {"tool_result", "tool_results", "tool_response", "tool_responses", "tool_output", "tool_outputs"}
    | {"function_response", "function_responses", "observation", "observations", "action", "actions", "steps", "code"}
    | {"image_url", "image_urls", "images_url", "audio_url", "video_url", "file", "files", "attachment", "attachments"}
)
"""Keys inside a conversation that are known to hold words. More keys than columns are known: a
message's `action` or `text` is a part of what was said, a row's is often a note or a copy."""
NOTES = frozenset(
    {"action", "actions", "code", "file", "files", "steps", "developer", "answer", "query", "prompt", "function"}
)
"""Keys of `WORDS` whose value, if it is a single word, is a note: "reply", "en", "a.py", "B".

Only names that are also usual for kinds, languages, paths and choices are here. A single word under
another name, such as `refusal` or `function_call`, may be all that was said."""


def respelled(fields: Mapping[str, Any], known: AbstractSet[str], path: str) -> Mapping[str, Any]:
    """Return the fields under the names of `known`: `tool_calls` instead of `toolCalls`.

    Marks are left as they are, since a mark in an unknown spelling is refused. Raises Refused if
    two spellings of a name have different values.
    """
    names = {key: name for key in fields if key not in known and (name := _known(key, known))}
    if not names:
        return fields
    result = {key: value for key, value in fields.items() if key not in names}
    for name in names.values():
        # Other spellings come first: a refusal advises to leave the first key out by `ignore`;
        # the name in this package's spelling leaves all of them out.
        result[name] = only_value(fields, (*(key for key in names if names[key] == name), name), path)
    return result


def _known(key: str, known: AbstractSet[str]) -> str | None:
    return next((name for name in spellings(key) if name in known and name not in MARKS), None)


def require_read(fields: Mapping[str, Any], read: Collection[str], path: str, ignored: Collection[str] = ()) -> None:
    """Raise Refused if a key of `WORDS`, in any spelling, holds words and is not read.

    A key is read if it is in `read`; a key in `ignored` is left out.
    """
    unread = [key for key in fields if key not in read and key not in ignored and not WORDS.isdisjoint(spellings(key))]
    if unread := sorted(key for key in unread if carries_words(fields[key]) and not _is_note(key, fields[key])):
        raise Refused(
            "unread words",
            f"{path}.{unread[0]} holds words that no layout reads: {excerpt(fields[unread[0]])}; move them to content "
            f"or a column, or leave them out by ignore = [{in_turns(path, unread[0])}]",
        )


def _is_note(key: str, value: Any) -> bool:
    """Return True for a single word in a key of `NOTES`, in any spelling."""
    return isinstance(value, str) and len(value.split()) == 1 and not NOTES.isdisjoint(spellings(key))


def require_plain(part: Mapping[str, Any], read: Collection[str], path: str, ignored: Collection[str]) -> None:
    """Raise Refused if a part of a message has a mark, or words in a key that is not in `read`.

    Keys in `ignored` are left out.
    """
    refuse_marks(part, path, ignored)
    require_read(part, read, path, ignored)


def only_value(fields: Mapping[str, Any], names: Sequence[str], path: str, remedy: str | None = None) -> Any:
    """Return the value of keys of the same meaning; None if no key has a value.

    An empty value beside another counts as none. Raises Refused if two values differ, with the
    remedy to ignore a key, unless another is given.
    """
    present = {name: fields[name] for name in names if fields.get(name) is not None}
    filled = {name: value for name, value in present.items() if not _is_empty(value)}
    values = [*filled.values()]
    if any(value != values[0] for value in values[1:]):
        usual = f"leave out the wrong keys by ignore = [{in_turns(path, next(iter(filled)))}], for example"
        raise Refused("two contents", f"{path} has different contents in {[*filled]}; {remedy or usual}")
    return next(iter(values or present.values()), None)


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value in ([], {})
