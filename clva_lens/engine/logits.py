"""The last position's logits of a pass, between the module that makes them and everybody else.

They are replaced in the output of the unembedding: before the model hands its output to nnsight, to
``generate`` or to the caller, who all see the same numbers. What a model makes of that output (a
factor, a soft cap) is made of it for ``edit`` too, and undone. What somebody else sends through the
unembedding while the layers run (a logit lens in a trace) is let through as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from clva_lens.models.belonging import hook_after, hook_before
from clva_lens.models.final_logits import final_logits

Edit = Callable[[Float[Tensor, "row vocabulary"]], Float[Tensor, "batch vocabulary"]]


def watch_logits(entry: nn.Module, edit: Edit) -> list[RemovableHandle]:
    """Have ``edit`` replace the last position's logits in each pass; the handles stop it.

    ``entry`` is the language model, or the model around it: a module with ``get_decoder`` and
    ``get_output_embeddings``.
    """
    language: Any = entry
    unembed = language.get_output_embeddings()
    final = final_logits(entry, unembed)
    ready = False

    def begin(*_: Any) -> None:
        nonlocal ready
        ready = False

    def finish(*_: Any) -> None:
        nonlocal ready
        ready = True

    def replace(_: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        if not ready or isinstance(out, FakeTensor):
            return None
        own = final.of(out[:, -1])
        last = edit(own)
        if last is own:
            return None
        last = final.before(last)
        # Rows of second inputs, which ``edit`` takes off, come after the prompts'.
        return torch.cat([out[: len(last), :-1], last[:, None].to(out.dtype)], dim=1)

    return [
        hook_before(entry, begin),
        hook_after(entry, begin),
        hook_after(language.get_decoder(), finish),
        hook_after(unembed, replace),
    ]
