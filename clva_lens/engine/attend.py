"""The attention functions that are registered with transformers, one for each kernel.

A module that is in no run of this thread or task is passed through to the kernel itself.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clva_lens.engine import maskless, windows
from clva_lens.engine.compiled import PASS, attend_row
from clva_lens.engine.kernels import Formula
from clva_lens.models.belonging import HERE


def _base(kernel: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return a kernel; the eager one is that of the file that defines the module."""
    if kernel == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return sdpa_attention_forward if kernel == "sdpa" else ALL_ATTENTION_FUNCTIONS[kernel]


KERNELS = {"sdpa": sdpa_mask, "eager": eager_mask} | {
    name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in maskless.MASKLESS
}
"""The kernels that can be intercepted, with what builds their masks."""


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
        return not self == other

    def __str__(self) -> str:
        """Return the name as a plain text."""
        return self.whole

    def __hash__(self) -> int:
        """Return that of the plain text."""
        return hash(self.whole)


def _formula(kernel: str, kwargs: dict[str, Any]) -> Formula:
    """Return what else is in a layer's attention; the fused kernel leaves sinks out."""
    sinks = None if kernel == "sdpa" else kwargs.get("s_aux")
    return Formula(kwargs.get("sliding_window"), kwargs.get("softcap"), sinks)


def _attend(kernel: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
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
        base = _base(kernel, module)
        if PASS in kwargs:
            bound = partial(base, module, scaling=scaling)
            return attend_row(bound, module, query, key, value, attention_mask, **kwargs)
        run: Any = HERE.get().get(id(module))
        acting = None if run is None else run.acting.get(id(module))
        if run is None or acting is None:
            return base(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        ready = run.merging.ready(acting, run.passes.step, key, attention_mask)
        if ready is not None:
            return base(module, query, key, value, ready, scaling=scaling, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        count, step, mask, values = query.shape[2], run.passes.step, attention_mask, value
        seen, formula = key, _formula(kernel, kwargs)
        # A static cache hands over its empty end too: leave it out, as the kernel would.
        if attention_mask is None and step is not None and step.causal and count > 1:
            seen, values = key[:, :, : step.offset + count], value[:, :, : step.offset + count]
        if kernel in maskless.MASKLESS:
            mask = maskless.written_out(mask, step, seen, count, formula.window)
        if step is not None and step.causal:
            seen, values, mask = windows.widen(seen, values, mask, step.offset + count, count)
        call = run.edit(acting, query, seen, values, mask, scale, formula)
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
        return run.output(out), weights

    return attend


for _kernel, _mask in KERNELS.items():
    AttentionInterface.register(f"clva_{_kernel}", _attend(_kernel))
    AttentionMaskInterface.register(f"clva_{_kernel}", _mask)
