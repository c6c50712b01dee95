"""Read conversation files and return packs for supervised fine-tuning, with exact resume."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sftstream.public import *  # noqa: F403
    from sftstream.public import __all__ as __all__

__version__ = "0.2.0"

_LIGHT = {
    "Door": "door",
    "one_line": "excerpt",
    "printable": "excerpt",
    "require_files": "regular_files",
    "show_result": "cli.results",
    "write_page": "cli.results",
}
"""Public names whose modules need no torch, with their modules."""


def __getattr__(name: str) -> Any:
    """Return a name of `sftstream.public`; the first call imports torch and the other libraries.

    The names in `_LIGHT` and the public module `pages` need no torch.
    """
    is_special = name.startswith("__") and name != "__all__"
    if is_special or find_spec(f"{__name__}.{name}"):  # `from sftstream import formats` imports a module
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _LIGHT:
        globals()[name] = value = getattr(import_module(f"{__name__}.{_LIGHT[name]}"), name)
        return value
    public = import_module(f"{__name__}.public")
    names = [*public.__all__, "__version__"]
    if name == "__all__":
        return names
    if name not in names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(public, name)
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return list(__getattr__("__all__"))
