"""Module paths of before the rooms that the README, notebooks or scripts used: they still import.

An old path is a module whose every name is looked up in its new home.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "bench": "experiments.speed.bench",
    "bench_models": "experiments.speed.models",
    "errors": "ground.errors",
    "look": "lens.side_by_side",
    "masks": "lens.patch_masks",
    "models.lens": "lens.load",
    "paper": "experiments.paper",
    "qwen_vl": "models.qwen",
    "qwen_vl.convert": "models.qwen.convert",
    "runs": "benchmarks.run_folder",
    "toy.measure": "experiments.toy_measures",
}


class _Forward:
    """Finds and loads the old paths of a package, after everything else has been asked."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.removeprefix(f"{self.package}.") not in MOVED:
            return None
        loader: Any = self
        return importlib.util.spec_from_loader(fullname, loader, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{self.package}.")
        home = importlib.import_module(f"{self.package}.{MOVED[old]}")
        vars(module)["__getattr__"] = lambda name: getattr(home, name)
        vars(module)["__doc__"] = f"Moved to ``{home.__name__}``."


def forward(package: str) -> None:
    """Let the old paths of a package be imported."""
    if not any(isinstance(finder, _Forward) for finder in sys.meta_path):
        sys.meta_path.append(_Forward(package))
