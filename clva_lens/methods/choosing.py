"""Which heads and which rows an edit is for, as users name them and as a run finds them."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from clva_lens.engine.row_reading import read_prompt_rows
from clva_lens.engine.session import AttentionCall
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import check_layers
from clva_lens.methods.target import Shape
from clva_lens.science.heads import classify_heads

HeadClass = Literal["sensitive", "insensitive"]
"""A class of heads by Eqs. 2-3 of arXiv:2603.25088v1."""

HeadTable = tuple[tuple[bool, ...], ...]
"""A mask [layer, head] that cannot change."""


def head_table(heads: Tensor | Sequence[Sequence[bool]] | str) -> HeadTable | HeadClass:
    """Return a mask [layer, head] as tuples, or the name of a class of heads as it is.

    Raises:
        ParameterError: if it is neither.
    """
    if isinstance(heads, str):
        if heads not in get_args(HeadClass):
            raise ParameterError(
                f"heads must be 'sensitive', 'insensitive' or a mask [layer, head], but is "
                f"{heads!r}. Pass heads='sensitive'."
            )
        return cast(HeadClass, heads)
    table = heads if isinstance(heads, Tensor) else torch.tensor(heads)
    if table.dtype != torch.bool or table.ndim != 2:
        raise ParameterError(
            f"heads must be a bool mask [layer, head], but is {table.dtype} of shape "
            f"{tuple(table.shape)}. Pass a mask such as trace.heads().sensitive, of one sample."
        )
    return tuple(map(tuple, table.tolist()))


class ChosenHeads:
    """The heads that an edit is for, by layer: given, or classified when the prompt is read."""

    def __init__(
        self,
        heads: HeadTable | HeadClass,
        layers: Sequence[int] | None,
        shape: Shape,
    ) -> None:
        """Resolve the layers: None is those that a mask names, or all after the middle for a class.

        Raises:
            ParameterError: if a layer does not exist, or a mask is for another model.
        """
        self.kind: HeadClass | None = heads if isinstance(heads, str) else None
        self._known: dict[int, Bool[Tensor, "batch head"]] = {}
        given: dict[int, Tensor] = {}
        if not isinstance(heads, str):
            table = torch.tensor(heads, dtype=torch.bool)
            found = tuple(table.shape)
            if found not in ((shape.depth, shape.heads), (len(shape.layers), shape.heads)):
                raise ParameterError(
                    f"heads is for {found} (layers, heads), but the model's {shape.site} has "
                    f"{(shape.depth, shape.heads)}. Pass a mask of that shape."
                )
            given = {layer: table[shape.row(layer, found[0])] for layer in shape.layers}
        if layers is None and self.kind is not None:
            layers = shape.after(shape.positive_layer)
        elif layers is None:
            layers = shape.layers
        chosen = check_layers("layers", layers, shape)
        self.layers = tuple(i for i in chosen if self.kind is not None or bool(given[i].any()))
        self._given = given

    @torch.no_grad()
    def at(self, call: AttentionCall) -> Bool[Tensor, "batch head"]:
        """Return the chosen heads of one layer, for each sample; a prompt is classified first.

        A class is that of the prompt (λ = 1, empty sets filled from the tail), under the edits
        before this one.

        Raises:
            InterventionError: if the prompt was read before the run began.
        """
        if self.kind is not None and call.step.number == 0:
            classes = classify_heads(read_prompt_rows(call).image[:, None])
            self._known[call.layer] = getattr(classes, self.kind)[:, 0]
        return self.known(call)

    def known(self, call: AttentionCall) -> Bool[Tensor, "batch head"]:
        """Return the chosen heads of one layer, for each sample, as ``at`` found them.

        Raises:
            InterventionError: if the prompt was read before the run began.
        """
        if call.layer in self._given:
            return self._given[call.layer].to(call.query.device).expand(call.query.shape[0], -1)
        if call.layer not in self._known:
            raise InterventionError(
                f"heads={self.kind!r} joined a run whose prompt had been read already, so the "
                "heads are unknown. Start it before the prompt is read, or pass a mask."
            )
        return self._known[call.layer]
