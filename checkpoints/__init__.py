"""Save and load crash-safe directories of tensors and plain values, without models or data."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpoints.public import *  # noqa: F403
    from checkpoints.public import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Return a name of `checkpoints.public`; the first call imports torch."""
    is_special = name.startswith("__") and name != "__all__"
    if is_special or find_spec(f"{__name__}.{name}"):  # `from checkpoints import store` imports a module
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = import_module(f"{__name__}.public")
    if name != "__all__" and name not in public.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(public, name)
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return list(__getattr__("__all__"))
