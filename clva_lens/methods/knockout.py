"""Attention knock-out: what is lost when text may no longer look at the image in some layers.

A picture of attention shows where a head looks, not that anything depends on it. The knock-out is
the causal control: set those weights to 0 (Eq. 10 of arXiv:2603.25088v1 with weight 0 on every
image token), renormalise (Eq. 11), and see whether the answer changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.bias import Bias, dense
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import (
    Kernel,
    Method,
    Rows,
    check_layers,
    check_order,
    check_rows,
    register_method,
    row_bias,
    single_row_bias,
)
from clva_lens.methods.choosing import ChosenHeads, chosen_heads
from clva_lens.methods.target import Target
from clva_lens.models.step import Step
from clva_lens.science.heads import SomeHeads


@register_method
@dataclass(frozen=True, kw_only=True)
class KnockOut(Method):
    """Remove all attention from text rows to image tokens in ``layers``.

    Args:
        layers: 0-based; None is every layer after L/2 − 2, those that CLVA edits by default, or,
            with named heads, every layer in which there is one.
        rows: prompt rows that go blind: all text after the image, or the "last"; generated rows
            always. In a Q-Former, "text" is all queries; they keep what lies on no patch (CLS).
        heads: those that go blind: pairs (layer, head), {layer: [heads]}, or a bool mask [layer,
            head] with a row for each layer of the stack, or for each that the site has; or
            "sensitive" or "insensitive", the class that each layer gives its heads on the prompt
            (Eqs. 2-3). None is all of them.
        site: where; None is where the model's family has CLVA act.
        tokens: which image tokens are lost, by their places among them, 0-based; None is all.

    Raises:
        ParameterError: if ``rows``, ``heads`` or ``tokens`` is none of these, or, in a run, there
            is no such image token.

    >>> margins = [cl.generate(model, there, one).margins[0] for one in (None, cl.KnockOut())]
    >>> margins[0] > margins[1]
    True
    """

    name: ClassVar[str] = "knockout"
    paper: ClassVar[str] = "control: Eqs. 10-11 of arXiv:2603.25088 with weight 0"
    kernel: ClassVar[Kernel] = "fused"
    zero: ClassVar[Mapping[str, Any] | None] = {"layers": ()}
    layers: Sequence[int] | None = None
    rows: Rows = "text"
    heads: SomeHeads | str | None = None
    site: str | None = None
    tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_rows(self.rows)
        if self.heads is not None:
            object.__setattr__(self, "heads", chosen_heads(self.heads))
        if self.tokens is not None:
            if not all(isinstance(one, int) and one >= 0 for one in self.tokens):
                raise ParameterError(
                    f"tokens are {self.tokens!r}. Pass places among the image tokens, from 0 on."
                )
            object.__setattr__(self, "tokens", tuple(self.tokens))

    def sessions(self, target: Target) -> list[Session]:
        """Return one session for the layers of this model."""
        shape = target.at(self.site)
        check_order(self.rows, shape)
        if self.heads is not None:
            chosen = ChosenHeads(chosen_heads(self.heads), self.layers, shape)
            return [_KnockOutSession(shape.site, chosen.layers, self.rows, chosen, self.tokens)]
        layers: Sequence[int] | None = self.layers
        if layers is None:
            layers = shape.after(shape.positive_layer)
        layers = check_layers("layers", layers, shape)
        return [_KnockOutSession(shape.site, layers, self.rows, None, self.tokens)]


class _KnockOutSession(Session):
    leaves_prefix = True
    compiles = True

    def __init__(
        self,
        site: str,
        layers: tuple[int, ...],
        rows: Rows,
        heads: ChosenHeads | None,
        tokens: Sequence[int] | None,
    ) -> None:
        self.site = site
        self.layers = layers
        self.steady = layers if heads is None else ()
        self.rows: Rows = rows
        self.heads = heads
        self.tokens = tokens
        self._bias: tuple[Step, Bias] | None = None

    def attention(self, call: AttentionCall) -> Bias | None:
        """Return log 0 on the image keys of the chosen rows, for the chosen heads."""
        if call.layer not in self.layers:
            return None
        if self._bias is None or self._bias[0] is not call.step:
            self._bias = (call.step, row_bias(call, self.rows, self._nothing(call)))
        if self.heads is not None:
            self.heads.at(call)
        return self._of_heads(call, self._bias[1])

    def compiled_step(self, call: AttentionCall, seen: dict[Any, Any]) -> Bias | None:
        """Return the same for the only row."""
        if "bias" not in seen:
            seen["bias"] = single_row_bias(call, self._nothing(call))
        return self._of_heads(call, seen["bias"])

    def _nothing(self, call: AttentionCall) -> Float[Tensor, "batch visual"]:
        size, device = call.step.visual.shape, call.query.device
        if self.tokens is None:
            return torch.full(size, -torch.inf, dtype=torch.float32, device=device)
        if max(self.tokens, default=0) >= size[1]:
            raise ParameterError(
                f"tokens has {max(self.tokens)}, but the prompt has {size[1]} image tokens at the "
                f"{self.site}. Pass places from 0 to {size[1] - 1}."
            )
        lost = torch.zeros(size, dtype=torch.float32, device=device)
        lost[:, list(self.tokens)] = -torch.inf
        return lost

    def _of_heads(self, call: AttentionCall, bias: Bias) -> Bias:
        if self.heads is None:
            return bias
        chosen = self.heads.known(call)
        return dense(bias).where(rearrange(chosen, "b h -> b h 1 1"), 0.0)
