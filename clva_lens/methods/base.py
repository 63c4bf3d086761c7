"""What a method is: frozen parameters, and a session for each run."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.attention import AttentionCall, Session
from clva_lens.errors import ParameterError
from clva_lens.models.family import find_family
from clva_lens.registry import Registry

Rows = Literal["text", "last"]
"""Which prompt rows an edit is for: all text after the image, or the last one only."""


class Shape(NamedTuple):
    """The size of the site that a method will act on."""

    layers: int
    heads: int


def shape_of(model: PreTrainedModel) -> Shape:
    """Return the size of a model's site.

    Raises:
        ModelLoadError: if no family knows the model.
    """
    site = find_family(model).site(model)
    return Shape(len(site.modules), site.config.num_attention_heads)


class Method(ABC):
    """A training-free method: parameters that never change. ``name`` is its registered name."""

    name: ClassVar[str]

    @abstractmethod
    def sessions(self, shape: Shape) -> list[Session]:
        """Return fresh sessions for one run on a site of the given shape.

        Raises:
            ParameterError: if a parameter does not fit the shape (an unknown layer, for example).
        """


METHODS = Registry[type[Method]]("method")


@dataclass(frozen=True)
class Composed(Method):
    """Several methods in one run, applied left to right; each sees the edits of those before it."""

    name: ClassVar[str] = "composed"
    methods: tuple[Method, ...]

    def sessions(self, shape: Shape) -> list[Session]:
        """Return the sessions of all methods in order."""
        return [session for method in self.methods for session in method.sessions(shape)]


def compose(*methods: Method) -> Method:
    """Return one method that applies ``methods`` left to right; with none, it changes nothing."""
    return Composed(methods)


def check_rows(rows: str) -> None:
    """Raise ParameterError unless ``rows`` names a set of rows."""
    if rows not in get_args(Rows):
        raise ParameterError(f"rows must be 'text' or 'last', but is {rows!r}. Pass rows='text'.")


def check_layers(name: str, layers: Sequence[int], shape: Shape) -> tuple[int, ...]:
    """Return ``layers`` sorted, each once.

    Raises:
        ParameterError: if a layer does not exist in the site.
    """
    unknown = [layer for layer in layers if not 0 <= layer < shape.layers]
    if unknown:
        raise ParameterError(
            f"{name} names layer {unknown[0]}, but the model has layers 0 to {shape.layers - 1} "
            f"(0-based). Pass {name}= within that range."
        )
    return tuple(sorted(set(layers)))


def row_bias(
    call: AttentionCall,
    rows: Rows,
    prompt: Float[Tensor, "batch visual"],
    generated: Float[Tensor, "batch row visual"],
) -> Float[Tensor, "batch 1 query key"]:
    """Return the bias that puts log-weights on the image keys of text and generated rows.

    ``prompt`` is for the prompt's rows after the image, ``generated`` for each generated row of
    this pass; all other rows and keys get 0. Float32.
    """
    step, count = call.step, call.query.shape[2]
    shape = (call.query.shape[0], 1, count, call.key.shape[2])
    bias = torch.zeros(shape, device=call.query.device)
    new = call.new_rows
    visual = rearrange(step.visual, "b v -> b 1 1 v")
    if new > 0:
        part = bias[:, :, count - new :]
        part.scatter_(3, visual.expand(-1, -1, new, -1), rearrange(generated, "b r v -> b 1 r v"))
    old = count - new
    if old > 0:
        is_text = step.spans.text[:, step.offset : step.offset + old]
        if rows == "last":
            position = torch.arange(old, device=is_text.device) + step.offset
            is_text = is_text & (position == rearrange(step.last_text, "b -> b 1"))
        weights = torch.where(
            rearrange(is_text, "b q -> b 1 q 1"), rearrange(prompt, "b v -> b 1 1 v"), 0.0
        )
        bias[:, :, :old].scatter_(3, visual.expand(-1, -1, old, -1), weights)
    return bias
