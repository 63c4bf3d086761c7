"""The same module a second time, sharing every weight, so that it can be run beside itself."""

import copy
from typing import Any, TypeVar

from torch import nn

from clva_lens.ground.errors import InterventionError

# transformers installs the hooks behind output_hidden_states once, and remembers it here.
CAPTURES = "_output_capturing_hooks_installed"


SomeModule = TypeVar("SomeModule", bound=nn.Module)


def twin(model: SomeModule) -> SomeModule:
    """Return a model, or a part of one, of new modules around the same parameters and buffers.

    It has no hooks, nothing that nnsight put on the modules, and configurations of its own, with
    the kernels that the model has outside a run. Nothing is copied but the modules' dictionaries.

    Raises:
        InterventionError: if a module has a ``forward`` of its own, as that of a model split over
            devices.
    """
    known: dict[int, Any] = {}

    def again(module: nn.Module) -> Any:
        if id(module) not in known:
            other = known[id(module)] = object.__new__(type(module))
            vars(other).update(_attributes(module))
            vars(other)["_modules"] = {
                name: None if child is None else again(child)
                for name, child in module._modules.items()
            }
            if "config" in vars(other):
                vars(other)["config"] = own_config(vars(other)["config"])
        return known[id(module)]

    def own_config(config: Any) -> Any:
        if id(config) not in known:
            other = known[id(config)] = copy.copy(config)
            kernel = getattr(config, "_attn_implementation", None)
            if isinstance(kernel, str) and kernel.startswith("clva_"):
                other._attn_implementation = kernel.removeprefix("clva_")
        return known[id(config)]

    return again(model)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, without those that belong to this very object."""
    kept = dict(vars(module))
    forward = kept.pop("forward", None)
    nnsights = type(forward).__module__.startswith("nnsight")
    if "_hf_hook" in kept or not (forward is None or nnsights):
        raise InterventionError(
            f"a {type(module).__name__} runs a forward function that was put on it (a model split "
            "over devices or offloaded, or a patch), so it cannot be run a second time with the "
            "same weights. Load the model on one device, without patches."
        )
    kept = {name: value for name, value in kept.items() if "nnsight" not in name}
    kept.pop(CAPTURES, None)
    for name, value in kept.items():
        if name in ("_parameters", "_buffers"):
            kept[name] = value.copy()
        elif name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            kept[name] = type(value)()
    return kept
