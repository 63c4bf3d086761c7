"""The attention functions that are registered with transformers, one for each kernel.

A module that is in no run of this thread or task is passed through to the kernel itself.
"""

import inspect
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clva_lens.engine import maskless, windows
from clva_lens.engine.checkpointing import checkpointed
from clva_lens.engine.compiled import PASS, attend_row
from clva_lens.models.belonging import HERE
from clva_lens.models.tree import tree


def _base(kernel: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return a kernel; the eager one is that of the file that defines the module."""
    if kernel == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[kernel]


KERNELS = {"sdpa": sdpa_mask, "eager": eager_mask} | {
    name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in maskless.MASKLESS
}
"""The kernels that can be intercepted, with what builds their masks."""

_LOOKED_UP = re.compile(r"get_interface\(\s*self\.config\._attn_implementation")


class KernelName(str):
    """The name of an attention function here, which is its base kernel's to a model that asks.

    Some models build a mask of their own if their kernel's name is "sdpa" or "eager". Tables of
    kernels are looked up by the hash, which is that of the function here.
    """

    base: str
    whole: str

    def __new__(cls, base: str) -> "KernelName":
        """Return the name for a base kernel."""
        made = super().__new__(cls, f"clva_{base}")
        made.base, made.whole = base, f"clva_{base}"
        return made

    def __getnewargs__(self) -> tuple[str]:
        """Return what a copy is made of."""
        return (self.base,)

    def __eq__(self, other: object) -> bool:
        """Return whether a text is this name or the base kernel's."""
        return other in (self.base, self.whole)

    def __ne__(self, other: object) -> bool:
        """Return the opposite."""
        return other not in (self.base, self.whole)

    def __str__(self) -> str:
        """Return the name as a plain text."""
        return self.whole

    def __hash__(self) -> int:
        """Return that of the plain text."""
        return hash(self.whole)


@cache
def _asks(file: str) -> bool:
    """Whether a model's file does anything with its kernel's name but look the kernel up."""
    module = sys.modules.get(file)
    try:
        source = inspect.getsource(module) if module is not None else None
    except (OSError, TypeError):
        source = None
    return source is None or "_attn_implementation" in _LOOKED_UP.sub("", source)


def name_in_run(kernel: str, entry: nn.Module) -> str:
    """Return what a configuration names while a kernel is intercepted in the passes of a module.

    A plain text, but for models that ask for the name, and kernels whose name transformers asks
    for: theirs costs calls of Python in each layer.
    """
    if kernel in maskless.MASKLESS:
        return KernelName(kernel)
    files = {kind.__module__ for kind in set(map(type, tree(entry)))}
    own = any(_asks(file) for file in files if not file.startswith("torch."))
    return KernelName(kernel) if own else f"clva_{kernel}"


ACTED: set[nn.Module] = set()
"""The modules that the runs of all threads and tasks act on; others need not be looked up."""


def _attend(kernel: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    fused = sdpa_attention_forward if kernel == "sdpa" else None

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,  # a Tensor, None, or a BlockMask
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the base kernel, under the bias of the run that the module belongs to."""
        base = fused or _base(kernel, module)
        if PASS in kwargs:
            bound = partial(base, module, scaling=scaling)
            return attend_row(bound, module, query, key, value, attention_mask, **kwargs)
        runs: Any = HERE.get() if module in ACTED else ()
        if module not in runs or module not in runs[module].acting:
            return base(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        run, step, count = runs[module], runs[module].passes.step, query.shape[2]
        acting, ready = run.acting[module], None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # To ask the sessions again at every steady layer would be most of what a step costs, and
        # to call what looks here for one that is like it a good part of the rest.
        like = (acting.sessions, query.shape, key.shape, query.dtype, query.device)
        for known in run.merging.ready if acting.steady and run.merging.step is step else ():
            if known.formed.mask is attention_mask and known.like == like:
                ready = known.formed
        if ready is not None and not (count > 1 and checkpointed()):
            if ready.form == "masked":
                return base(module, query, key, value, ready.both, scaling=scaling, **kwargs)
            if "softcap" not in kwargs:  # which only a mask goes with
                bound = partial(base, module, scaling=scale, **kwargs)
                return ready.attend(bound, query, key, value, scale)
        mask, seen, values = attention_mask, key, value
        window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
        sinks = None if fused else kwargs.get("s_aux")  # the fused kernel leaves them out
        # A static cache hands over its empty end too: leave it out, as the kernel would.
        if attention_mask is None and step is not None and step.causal and count > 1:
            seen, values = key[:, :, : step.offset + count], value[:, :, : step.offset + count]
        if kernel in maskless.MASKLESS:
            mask = maskless.written_out(mask, step, seen, count, window)
        if step is not None and step.causal and seen.shape[2] < step.offset + count:
            seen, values, mask = windows.widen(seen, values, mask, step.offset + count, count)
        call = run.edit(acting, query, seen, values, mask, scale, window, softcap, sinks)
        if call is None:
            out, weights = base(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
        else:
            bound = partial(base, module, scaling=scale, **kwargs)
            if kernel in maskless.MASKLESS:
                out, weights = maskless.folded(bound, call, key, value, attention_mask)
            else:
                out, weights = run.merging.attend(bound, call, acting)
        return run.output(out) if acting.output else out, weights

    return attend


for _kernel, _mask in KERNELS.items():
    AttentionInterface.register(f"clva_{_kernel}", _attend(_kernel))
    AttentionMaskInterface.register(f"clva_{_kernel}", _mask)
