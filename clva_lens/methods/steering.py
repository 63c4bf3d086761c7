"""Steering: a direction is added to the residual stream while the model runs.

In the chosen rows of layer l, a part h of the stream becomes

    h + s·v_l,   or, with ``keep_norm``,   |h|·u / |u|  with  u = h/|h| + s·v_l/|v_l|,

v_l being the layer's direction and s the strength. Adding is activation addition (Turner et al.,
arXiv:2308.10248) and, with differences of two sets of prompts, representation engineering (Zou et
al., arXiv:2310.01405) and contrastive activation addition (Rimsky et al., arXiv:2312.06681). The
second form turns each row and keeps its length, as VTI (arXiv:2410.15778) and VISTA
(arXiv:2502.03628) do to what the MLP puts out. The sums are formed in float32 or wider.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import Session
from clva_lens.engine.stream import Part, Stream
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Kernel, Method, check_layers, register_method
from clva_lens.methods.steering_vector import SteeringVector
from clva_lens.methods.stream_rows import (
    Edit,
    Stack,
    StreamSession,
    TowerSession,
    check_span,
    tower_depth,
)
from clva_lens.methods.target import Shape, Target
from clva_lens.models.norms import wide


@register_method
@dataclass(frozen=True, kw_only=True)
class Steer(Method):
    """Add a direction to the residual stream, at chosen layers and in chosen rows.

    Where image rows are edited ("image", "all", positions, or the vision tower) nothing that was
    read of a picture is shared between questions.

    Args:
        vector: the directions: a ``SteeringVector``, the path of one, a tensor [layer, width], or
            [width] for each of ``layers``. None is the control: in each layer a random direction
            of ``seed``, as long as the row that it is added to.
        layers: 0-based; None is all of the vector's, and the middle one without a vector.
        span: prompt rows that are edited: all "text" after the image, the "last", "image",
            "system", "all", none but "generated", or positions (0-based, padding included).
            Generated rows are edited too with "text", "last", "all" and "generated". None is
            "text", and "all" at the vision tower.
        strength: s, of either sign; 0 edits nothing.
        keep_norm: whether rows are turned and keep their length; only the direction of the vector
            matters then.
        part: what is edited; None is what the vector was read from, else "resid_post". "mlp_out"
            and "attn_out" are what a block puts out, before it is added.
        stack: "decoder" or "vision", the tower, where ``span`` is "all" or positions of its
            tokens, CLS first; None is the vector's own, else the decoder.
        seed: of the random directions.

    Raises:
        ParameterError: if a parameter is none of these, or contradicts the vector.

    >>> vector = cl.steering_vector(model, layers=[6])
    >>> steer = cl.Steer(vector=vector, strength=-2.0)
    >>> cl.generate(model, prompt, steer).texts
    ['no']
    """

    name: ClassVar[str] = "steer"
    paper: ClassVar[str] = "activation addition, arXiv:2308.10248; arXiv:2310.01405"
    kernel: ClassVar[Kernel] = "none"
    sites: ClassVar[tuple[str, ...]] = ()
    zero: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0}
    vector: SteeringVector | Float[Tensor, "*layer width"] | str | Path | None = None
    layers: Sequence[int] | None = None
    span: str | Sequence[int] | None = None
    strength: float | int = 1.0
    keep_norm: bool = False
    part: Part | None = None
    stack: Stack | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Read the vector, and check what can be checked without a model."""
        if not math.isfinite(self.strength):
            raise ParameterError(f"strength is {self.strength}. Pass a finite one.")
        found = _vector(self.vector, self.layers, self.part, self.stack)
        object.__setattr__(self, "vector", found)
        for name, words in (("part", get_args(Part)), ("stack", get_args(Stack))):
            if getattr(self, name) not in (None, *words):
                raise ParameterError(
                    f"{name} must be {' or '.join(words)}, but is {getattr(self, name)!r}. Pass "
                    f"{name}=None for the vector's own."
                )
        if found is not None and self.stack not in (None, found.stack):
            raise ParameterError(
                f"stack is {self.stack!r}, but the vector was read from the {found.stack}. Leave "
                "stack out."
            )
        if found is not None and found.values.ndim == 3 and found.stack != "vision":
            raise ParameterError(
                "a vector with a direction for each position is for a vision tower, whose "
                "positions are the same for all pictures. Pass [layer, width] for the decoder."
            )
        object.__setattr__(self, "stack", self.stack or (found.stack if found else "decoder"))
        object.__setattr__(self, "part", self.part or (found.part if found else "resid_post"))
        if self.span is None:
            object.__setattr__(self, "span", "all" if self.stack == "vision" else "text")
        check_span(self.span)

    def sessions(self, target: Target) -> list[Session]:
        """Return what steers; nothing for s = 0.

        Raises:
            ModelLoadError: if the vector was made on another model, or the language model's layers
                have no names (T5).
            ParameterError: if a layer does not exist, or the vector has another width.
        """
        if self.strength == 0:
            return []
        part, vector, span = self.part, self.vector, self.span
        assert part is not None and span is not None
        assert not isinstance(vector, Tensor | str | Path)
        shape = _shape(target, self.stack, part)
        layers = self.layers
        if layers is None:
            layers = (shape.depth // 2,) if vector is None else vector.layers
        layers = check_layers("layers", layers, shape)
        if vector is None:
            edit: Edit = self._random
        else:
            vector.check(target.model)
            missing = [layer for layer in layers if layer not in vector.layers]
            if missing:
                raise ParameterError(
                    f"layers names layer {missing[0]}, but the vector has directions for "
                    f"{', '.join(map(str, vector.layers))}. Pass layers= from these."
                )
            rows = {layer: vector.values[vector.layers.index(layer)] for layer in layers}
            edit = _Adding(rows, self.strength, self.keep_norm)
        if self.stack == "vision":
            return [TowerSession(target.model, part, layers, span, edit)]
        return [StreamSession(part, layers, span, edit)]

    def _random(self, layer: int, hidden: Stream) -> Stream:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(layer + 1, hidden.shape[-1], generator=generator, dtype=torch.float32)[
            layer
        ]
        unit = (drawn / drawn.norm()).to(hidden.device)
        if self.keep_norm:
            return turned(hidden, unit, self.strength)
        length = wide(hidden).norm(dim=-1, keepdim=True)
        return (wide(hidden) + self.strength * length * unit).to(hidden.dtype)


class _Adding:
    """What adds a layer's direction to each row, or turns the row towards it."""

    def __init__(self, rows: Mapping[int, Tensor], strength: float | int, keep_norm: bool) -> None:
        self.rows, self.strength, self.keep_norm = dict(rows), strength, keep_norm

    def __call__(self, layer: int, hidden: Stream) -> Stream:
        direction = self.rows[layer] = self.rows[layer].to(hidden.device)
        if direction.shape[-1] != hidden.shape[-1] or (
            direction.ndim == 2 and len(direction) != hidden.shape[1]
        ):
            raise ParameterError(
                f"the vector has directions of shape {tuple(direction.shape)}, but layer {layer} "
                f"has rows {tuple(hidden.shape[1:])}. Make it on this model."
            )
        if self.keep_norm:
            return turned(hidden, direction, self.strength)
        return (wide(hidden) + self.strength * direction.to(wide(hidden))).to(hidden.dtype)


def turned(
    hidden: Stream,
    direction: Float[Tensor, "*position width"],
    strength: float | int | Float[Tensor, "batch query *one"],
) -> Stream:
    """Return rows of the same length, turned towards a direction; a strength may be a row's own.

    A direction of length 0 turns nothing, nor is a row of length 0 turned.
    """
    own = wide(hidden)
    tiny = torch.finfo(own.dtype).tiny
    length = own.norm(dim=-1, keepdim=True)
    towards = direction.to(own)
    towards = towards / towards.norm(dim=-1, keepdim=True).clamp_min(tiny)
    moved = own / length.clamp_min(tiny) + strength * towards
    return (length * moved / moved.norm(dim=-1, keepdim=True).clamp_min(tiny)).to(hidden.dtype)


def _vector(
    given: Any, layers: Sequence[int] | None, part: Part | None, stack: Stack | None
) -> SteeringVector | None:
    """Return directions, however they were given, as a SteeringVector."""
    if given is None or isinstance(given, SteeringVector):
        return given
    if isinstance(given, str | Path):
        return SteeringVector.load(given)
    if (
        not isinstance(given, Tensor)
        or not given.is_floating_point()
        or given.ndim not in (1, 2, 3)
    ):
        raise ParameterError(
            f"vector must be a SteeringVector, the path of one, or a tensor [layer, width], but is "
            f"{given!r:.80}. Pass cl.steering_vector(model, pairs), for example."
        )
    if given.ndim == 1:
        if not layers:
            raise ParameterError(
                "the vector is one direction, so it is unclear which layers it is for. Pass "
                "layers=[6], for example."
            )
        given = given.expand(len(layers), -1)
    numbers = tuple(range(len(given))) if layers is None else tuple(layers)
    return SteeringVector(given, numbers, part or "resid_post", stack or "decoder")


def _shape(target: Target, stack: str | None, part: str) -> Shape:
    """Return the size of a stack, all of whose layers have a stream."""
    if stack != "vision":
        shape = target.at("decoder")
        return shape._replace(layers=tuple(range(shape.depth)))
    depth = tower_depth(target.model, part)
    if not depth:
        raise ParameterError(
            f"the vision tower of this {type(target.model).__name__} has no layers whose '{part}' "
            "has a name, so it cannot be steered. Pass stack='decoder'."
        )
    return Shape("vision tower", tuple(range(depth)), depth, 0)
