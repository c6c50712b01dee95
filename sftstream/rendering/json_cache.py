"""A cache for the filter `tojson`: conversations of one source often share tool definitions."""

from __future__ import annotations

import marshal
from collections.abc import Callable
from typing import Any

REMEMBERED = 2048
"""Number of results in one generation of `JsonCache`, which keeps two generations."""


def exact_key(value: Any) -> bytes:
    """Return a key that differs for any two different JSON values.

    1, 1.0, True and "1" have four different keys; a list and a tuple of equal items have different
    keys. A NumPy array has the key of its bytes. Raises ValueError if the value contains an object
    that `marshal` does not know, for example a date. The key is not JSON text, because the JSON
    encoder in use prints a date and its text alike.
    """
    return marshal.dumps(value, 2)  # versions 3 and 4 may encode equal values differently


class JsonCache:
    """A function with a cache of its results, keyed by `exact_key` of the arguments.

    The cache holds a current and an earlier generation, each of up to `REMEMBERED` results. Once
    the current generation is full, it replaces the earlier one, and an empty generation begins. A
    result found in the earlier generation is copied to the current one.
    """

    def __init__(self, function: Callable[..., str]) -> None:
        self._function = function
        self._results: dict[bytes, str] = {}
        self._earlier: dict[bytes, str] = {}

    def __call__(self, value: Any, *arguments: Any, **options: Any) -> str:
        try:
            key = exact_key((value, arguments, options))
        except ValueError:
            return self._function(value, *arguments, **options)
        if (result := self._results.get(key)) is None:
            if len(self._results) >= REMEMBERED:
                self._results, self._earlier = {}, self._results
            result = self._earlier.get(key)
            if result is None:
                result = self._function(value, *arguments, **options)
            self._results[key] = result
        return result
