"""What a method is to act on: a model, its processor, and the sizes of its attention sites."""

from typing import Any, NamedTuple

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.models.activations import Readout
from clva_lens.models.family import find_family, find_site
from clva_lens.science.anchors import default_anchor_layers
from clva_lens.science.heads import SomeHeads, head_mask


class Shape(NamedTuple):
    """The size of a site that a method will act on.

    ``layers`` are the numbers of its layers, 0-based, in a stack of ``depth`` layers. ``ordered``:
    its rows have a last one.
    """

    site: str
    layers: tuple[int, ...]
    depth: int
    heads: int
    ordered: bool = True

    @property
    def positive_layer(self) -> int:
        """The layer of the positive anchor: L/2 − 2, or the nearest that is in the site.

        Raises:
            ParameterError: if the stack has fewer than 4 layers.
        """
        return default_anchor_layers(self.layers, self.depth)[0]

    def first(self, layer: int) -> int:
        """Return a layer that is given, but for 0, "the first", the first that is in the site."""
        return self.layers[0] if layer == 0 else layer

    def within(self, first: int, end: int) -> tuple[int, ...]:
        """Return the layers from ``first`` to before ``end``; if there is none, the nearest."""
        found = tuple(layer for layer in self.layers if first <= layer < end)
        middle = (first + end - 1) / 2
        return found or (min(self.layers, key=lambda layer: abs(layer - middle)),)

    def row(self, layer: int, rows: int) -> int:
        """Return a layer's row in a table of ``rows`` rows: of the whole stack, or of the site."""
        return layer if rows == self.depth else self.layers.index(layer)

    def head_mask(self, heads: SomeHeads) -> Bool[Tensor, "*batch layer head"]:
        """Return heads, however they are named, as a mask with a row for each layer of the site.

        Raises:
            ParameterError: if a layer or a head does not exist, or a mask is for another model.
        """
        of = f"the model's {self.site}"
        return head_mask(heads, self.layers, self.heads, depth=self.depth, of=of)

    def after(self, layer: int) -> tuple[int, ...]:
        """Return the layers after ``layer``."""
        return tuple(other for other in self.layers if other > layer)


class Target:
    """A model that methods are to act on: its sites, and its processor where there is one."""

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        """Look at the model."""
        self.model, self.processor = model, processor

    def at(self, site: str | None = None) -> Shape:
        """Return the shape of a site; None is the one that methods act on by default.

        Raises:
            ParameterError: if the model has no such site.
        """
        return shape_of(self.model, site)

    def readout(self) -> Readout:
        """Return the modules that make logits of the language model's residual stream.

        Raises:
            ModelLoadError: if nobody wrote down where they are.
        """
        return find_family(self.model).activations(self.model).readout


def shape_of(model: PreTrainedModel, site: str | None = None) -> Shape:
    """Return the size of a model's site; None is the one that methods act on by default.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if it has no such site.
    """
    found = find_site(model, site)
    heads = found.config.num_attention_heads
    return Shape(found.name, found.layers, found.depth, heads, found.ordered)
