"""All modules of a model, for code that runs each time a run is opened."""

from collections.abc import Iterator

from torch import nn


def tree(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and all below it, as ``modules()`` does but for what hangs there twice.

    ``modules()`` is a generator within a generator for each level, several times as slow.
    """
    waiting = [module]
    while waiting:
        one = waiting.pop()
        yield one
        if one._modules:
            waiting += [child for child in reversed(one._modules.values()) if child is not None]
