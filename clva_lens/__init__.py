"""clva_lens: look inside vision-language models, and act on what you see.

>>> import clva_lens as cl
>>> "clva" in cl.methods()
True
"""

import importlib
from importlib.metadata import version
from typing import Any

import lazy_loader

from clva_lens.ground import moved

# Each public name and its home stand in __init__.pyi, which type checkers read as well; a home is
# imported when its name is first used, so that importing this package costs next to nothing.
_public, _, _names = lazy_loader.attach_stub(__name__, __file__)

ROOMS = (
    "ground",
    "science",
    "models",
    "toy",
    "engine",
    "benchmarks",
    "methods",
    "figures",
    "lens",
    "experiments",
)
REGISTRIES = ("benchmarks", "figures", "methods", "models")
"""The rooms that can be called, for the names that are registered in them."""

__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]
    [*_names, *REGISTRIES], key=lambda name: (not name.isupper(), not name[0].isupper(), name)
)

moved.forward(__name__)


def __getattr__(name: str) -> Any:
    """Import a public name, or a room, when it is first used; the version is the installed one."""
    if name == "__version__":
        return version("clva-lens")
    if name in ROOMS or name in moved.MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    return _public(name)


def __dir__() -> list[str]:
    """Return the public names and the rooms."""
    return sorted({*__all__, *ROOMS})
