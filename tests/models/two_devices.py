"""Two GPUs that are made up, on a CPU: what torch refuses between devices is refused here too.

Inside ``Emulated()`` every tensor has a device by name. Operations on tensors of two devices raise
RuntimeError, as CUDA's do; tensors made without ``device=`` are on the "cpu", which is a third one.
The numbers are those of the CPU throughout. That kernels and copies of real devices do the same is
not shown by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

FIRST, SECOND, HOST = (torch.device(name) for name in ("cuda:0", "cuda:1", "cpu"))
# Copies between devices, by torch's own names.
COPIES = ("to", "copy_", "cpu", "cuda")
# Python's operators on indices: an index on the host is copied to where it is needed.
INDEXING = ("__getitem__", "__setitem__")


def place_of(tensor: Tensor) -> torch.device:
    """Return the device that a tensor is said to be on."""
    return getattr(tensor, "_place", HOST)


def put(tensor: Tensor, place: torch.device) -> Tensor:
    """Say that a tensor is on a device."""
    tensor._place = place
    return tensor


class Emulated(TorchFunctionMode):
    """Inside, tensors have made-up devices; ``crossings`` counts copies from one to another."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if name == "__get__":
            return self._attribute(func, args, kwargs, tensors[0])
        wanted = kwargs.pop("device", None)
        if name in COPIES:
            return self._copy(func, name, args, kwargs, wanted)
        place = self._common(name, tensors) if wanted is None or not tensors else None
        made = func(*args, **kwargs)
        goal = place if wanted is None else torch.device(wanted)
        return tree_map_only(Tensor, lambda one: put(one, goal), made)

    def _attribute(self, func: Any, args: Any, kwargs: Any, tensor: Tensor) -> Any:
        which = getattr(func.__self__, "__name__", "")
        if which == "device":
            return place_of(tensor)
        if which == "is_cuda":
            return place_of(tensor).type == "cuda"
        found = func(*args, **kwargs)
        return put(found, place_of(tensor)) if isinstance(found, Tensor) else found

    def _common(self, name: str, tensors: list[Tensor]) -> torch.device:
        """Return the device that an operation is on."""
        if name in INDEXING:
            tensors = [tensors[0], *(one for one in tensors[1:] if place_of(one) != HOST)]
        places = {place_of(one) for one in tensors if one.ndim or place_of(one) != HOST}
        if len(places) > 1:
            found = " and ".join(sorted(map(str, places)))
            raise RuntimeError(f"{name}: tensors are on different devices, {found}")
        return next(iter(places), HOST)

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any, wanted: Any) -> Tensor:
        source = args[0]
        if name == "copy_":
            return put(func(*args, **kwargs), place_of(source))
        rest = []
        for one in args[1:]:
            if isinstance(one, str | torch.device):
                wanted = one
            elif isinstance(one, Tensor):
                wanted, one = place_of(one), one.dtype
                rest.append(one)
            else:
                rest.append(one)
        goal = {"cpu": HOST}.get(name, place_of(source) if wanted is None else wanted)
        goal = torch.device(goal)
        made = source.to(*rest, **kwargs) if rest or kwargs else source
        if goal != place_of(source):
            self.crossings += 1
            made = made.clone() if made is source else made
        return put(made, goal)


@contextmanager
def split(model: Any, at: int) -> Iterator[None]:
    """Have a model's decoder layers from ``at`` on, its norm and its head on the second device.

    All else is on the first, a head that is tied to the embedding too. As accelerate does, layers
    have their inputs copied to their own device.
    """
    decoder = decoder_of(model)
    layers, head = list(decoder.layers), model.get_output_embeddings()
    after = [part for name, part in decoder.named_children() if "norm" in name]
    second, everything = [*layers[at:], *after], (*model.parameters(), *model.buffers())
    if head.weight is not model.get_input_embeddings().weight:
        second.append(head)
    for one in everything:
        put(one, FIRST)
    for module in second:
        for one in (*module.parameters(), *module.buffers()):
            put(one, SECOND)

    def bring(place: torch.device) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return tree_map_only(Tensor, lambda one: one.to(place), (args, kwargs))

        return hook

    handles = [
        module.register_forward_pre_hook(
            bring(SECOND if module in second else FIRST), with_kwargs=True
        )
        for module in (*layers, *after, head)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one in everything:
            put(one, HOST)


def decoder_of(model: Any) -> Any:
    """Return the module that has the decoder's layers."""
    decoder = model.get_decoder()
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        decoder = getattr(decoder, "model", getattr(decoder, "decoder", None))
    return decoder
