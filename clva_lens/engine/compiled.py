"""A decoding step as one graph: what sessions do to its only row, as a function of tensors.

Hooks, context variables and counters would be traced into the graph, and a number that grows makes
another one each step. So none of them is asked here: what acts goes down to the attention function
as a keyword argument, and what the positions are is fixed, for the whole length of the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from clva_lens.engine import bias as folding
from clva_lens.engine.kernels import AttentionKernel, Merging
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.models.step import Step

PASS = "clva_lens_pass"
"""The keyword argument of the attention function."""


@dataclass(frozen=True, eq=False)
class RowEdits:
    """What acts on every generated row, by layer; ``step`` is the pass of the first one."""

    sessions: tuple[Session, ...]
    layers: Mapping[int, tuple[int, ...]]
    step: Step

    @classmethod
    def of(cls, sessions: tuple[Session, ...], prompt: Step, keys: int) -> "RowEdits":
        """Return them after a pass that read a prompt, for a cache of so many keys.

        Nothing but the number of keys is a number that the graph depends on: prompts of several
        lengths share it, wherever their images are.
        """
        acting = {
            layer: tuple(i for i, session in enumerate(sessions) if layer in session.layers)
            for session in sessions
            for layer in session.layers
        }
        room = prompt.spans.with_room(keys - prompt.keys)
        text = functional.pad(prompt.text_rows, (0, keys - prompt.prompt_rows))
        step = replace(
            prompt, number=1, offset=keys, text_rows=text, spans=room, ids=None, block=None
        )
        return cls(sessions, acting, step)


class RowPass:
    """One pass of a generated row: what its layers leave to later ones, and how many were met."""

    def __init__(self, edits: RowEdits) -> None:
        """Begin with nothing."""
        self.edits = edits
        self.seen: list[dict[Any, Any]] = [{} for _ in edits.sessions]
        self.merging = Merging(fused=True)
        self.met = 0


def attend_row(
    kernel: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run a layer's kernel under what the sessions put on its only row."""
    now: RowPass = kwargs.pop(PASS)
    layer: Any = module.layer_idx
    acting = now.edits.layers.get(layer)
    if acting is None:
        return kernel(query, key, value, mask, **kwargs)
    now.met += 1
    scaling = kernel.keywords["scaling"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap")
    call = AttentionCall(
        layer, now.edits.step, query, key, mask, None, scale, value, softcap=softcap
    )
    for index in acting:
        bias = now.edits.sessions[index].compiled_step(call, now.seen[index])
        if bias is not None:
            call.bias = folding.add(call.bias, bias)
    if call.bias is None:
        return kernel(query, key, value, mask, **kwargs)
    bound: AttentionKernel = partial(kernel, **kwargs)
    return now.merging.attend(bound, call)
