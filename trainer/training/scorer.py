"""Load the function of a user that scores answers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

from sftstream import Door, one_line

Scorer = Callable[[str, str, str], float]
"""Function of prompt, expected answer and given answer, to a score; more is better."""

ALLOW_CODE = "--allow-code"
"""Option of the command line without which no function of a user is called."""


def require_allowed(name: str | None, *, allow_code: bool) -> None:
    """Raise ValueError if a scorer is named and code is not allowed."""
    if name is not None and not allow_code:
        raise ValueError(
            f"evaluation.scorer = {name!r} runs code that the config names; add {ALLOW_CODE} to the command line if you "
            "trust it, or remove the key"
        )


def load_scorer(name: str) -> Scorer:
    """Return the function `module:function`. Raises ValueError if it is not found.

    Imports the module, which runs its code.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"evaluation.scorer = {name!r} is not found: {one_line(error)}; name a function as module:function, of a module "
            "that is installed or lies in a directory of PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"evaluation.scorer = {name!r} is no function; name a function as module:function")

    def score(prompt: str, expected: str, given: str) -> float:
        with Door(f"evaluation.scorer = {name!r} fails for the answer {given!r:.80}; correct the function"):
            value = float(found(prompt, expected, given))
        if not math.isfinite(value):
            raise ValueError(
                f"evaluation.scorer = {name!r} returned {value} for the answer {given!r:.80}; correct the function to "
                "return a finite number"
            )
        return value

    return score
