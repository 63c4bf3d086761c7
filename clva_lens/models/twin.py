"""The same module a second time, sharing every weight, so that it can be run beside itself."""

import copy
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

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
    return _again(model, {})


def _again(module: nn.Module, known: dict[Any, Any]) -> Any:
    """Return a module's twin, one of ``known`` if it has one.

    A closure would be a cycle, which keeps a twin until it is collected. What is done here is done
    for each module, once a generation: each function that is called is felt.
    """
    if module in known:
        return known[module]
    other = known[module] = object.__new__(type(module))
    own = other.__dict__
    own |= _attributes(module)
    if module._modules:
        children = module._modules.items()
        own["_modules"] = {n: None if one is None else _again(one, known) for n, one in children}
    else:
        own["_modules"] = {}
    if "config" in own:
        own["config"] = _own_config(own["config"], known)
    return other


def _own_config(config: Any, known: dict[Any, Any]) -> Any:
    if id(config) not in known:
        other = known[id(config)] = copy.copy(config)
        kernel = getattr(config, "_attn_implementation", None)
        if isinstance(kernel, str) and kernel.startswith("clva_"):
            other._attn_implementation = kernel.removeprefix("clva_")
    return known[id(config)]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, without those that belong to this very object."""
    kept = {**module.__dict__}
    forward = kept.pop("forward", None)
    patched = forward is not None and not type(forward).__module__.startswith("nnsight")
    if patched or "_hf_hook" in kept:
        raise InterventionError(
            f"a {type(module).__name__} runs a forward function that was put on it (a model split "
            "over devices or offloaded, or a patch), so it cannot be run a second time with the "
            "same weights. Load the model on one device, without patches."
        )
    own = _own_names(tuple(kept))
    for name in own.dropped:
        del kept[name]
    for name in ("_parameters", "_buffers"):
        kept[name] = {**kept[name]}
    for name in own.emptied:
        kept[name] = type(kept[name])()
    return kept


class _Names(NamedTuple):
    """Which attributes a twin does not have, and which are empty in it."""

    dropped: tuple[str, ...]
    emptied: tuple[str, ...]


@lru_cache(maxsize=1024)
def _own_names(names: tuple[str, ...]) -> _Names:
    """Sort the names of a module's attributes, of which most modules have the same.

    To ask this of every module would be most of what a twin costs.
    """
    dropped = tuple(name for name in names if "nnsight" in name or name == CAPTURES)
    hooks = [
        n for n in names if n.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    ]
    # Nobody saves or loads a twin.
    return _Names(dropped, tuple(n for n in hooks if "state_dict" not in n and n not in dropped))
