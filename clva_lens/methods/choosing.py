"""Which heads and which rows an edit is for, as users name them and as a run finds them."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

from jaxtyping import Bool
from torch import Tensor

from clva_lens.engine.row_reading import read_prompt_rows
from clva_lens.engine.session import AttentionCall
from clva_lens.ground.ambient import without_gradients
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import check_layers
from clva_lens.methods.target import Shape
from clva_lens.science.heads import HeadPairs, HeadTable, SomeHeads, classify_heads, named_heads

HeadClass = Literal["sensitive", "insensitive"]
"""A class of heads by Eqs. 2-3 of arXiv:2603.25088v1."""

Chosen = HeadTable | HeadPairs | HeadClass
"""Heads as a method keeps them."""


def chosen_heads(heads: SomeHeads | str) -> Chosen:
    """Return named heads in tuples (see ``named_heads``), or the name of a class of heads.

    Raises:
        ParameterError: if it is neither.
    """
    if isinstance(heads, str):
        if heads not in get_args(HeadClass):
            raise ParameterError(
                f"heads must be 'sensitive', 'insensitive', a mask [layer, head] or pairs (layer, "
                f"head), but is {heads!r}. Pass heads='sensitive'."
            )
        return cast(HeadClass, heads)
    return named_heads(heads)


class ChosenHeads:
    """The heads that an edit is for, by layer: given, or classified when the prompt is read."""

    def __init__(
        self,
        heads: Chosen,
        layers: Sequence[int] | None,
        shape: Shape,
    ) -> None:
        """Resolve the layers: None is those of named heads, or all after the middle for a class.

        Raises:
            ParameterError: if a layer does not exist, or a mask is for another model.
        """
        self.kind: HeadClass | None = heads if isinstance(heads, str) else None
        self._known: dict[int, Bool[Tensor, "batch head"]] = {}
        given: dict[int, Tensor] = {}
        if not isinstance(heads, str):
            given = dict(zip(shape.layers, shape.head_mask(heads), strict=True))
        if layers is None and self.kind is not None:
            layers = shape.after(shape.positive_layer)
        elif layers is None:
            layers = shape.layers
        chosen = check_layers("layers", layers, shape)
        self.layers = tuple(i for i in chosen if self.kind is not None or bool(given[i].any()))
        self._given = given

    @without_gradients
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
