"""Which heads look at the image: visual intensity and head classes, Eqs. 1-3 of arXiv:2603.25088v1.

Tensors in, tensors out. ``*batch`` stands for any leading axes, also none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clva_lens.ground.drawn import SelfDrawn, drawing
from clva_lens.ground.errors import ParameterError, SpanError

HeadTable = tuple[tuple[bool, ...], ...]
"""A mask [layer, head] that cannot change."""

HeadPairs = tuple[tuple[int, int], ...]
"""Heads by (layer, head), 0-based; they cannot change."""

SomeHeads = (
    Bool[Tensor, "*batch layer head"]
    | Int[Tensor, "pair 2"]
    | Mapping[int, Sequence[int]]
    | Sequence[Sequence[bool]]
    | Sequence[Sequence[int]]
)
"""Heads as they may be named: a mask, (layer, head) pairs, or {layer: [heads]}."""

EmptyPolicy = Literal["tail", "skip"]
"""What happens to an empty head set: filled from the tail of the ranking, or left empty."""


def visual_mass(
    pattern: Float[Tensor, "*batch head query key"], visual: Bool[Tensor, "*batch key"]
) -> Float[Tensor, "*batch head query"]:
    """Return the attention mass that each row of each head puts on the visual keys.

    The inner sum of Eq. 1, arXiv:2603.25088v1. A fraction in [0, 1], in float32 or better. The row
    of a padding query may be NaN and stays so; ``intensity_from_mass`` leaves such rows out.
    """
    dtype = torch.promote_types(pattern.dtype, torch.float32)
    on_visual = rearrange(visual, "... key -> ... 1 1 key")
    return pattern.where(on_visual, 0.0).sum(dim=-1, dtype=dtype)


def intensity_from_mass(
    mass: Float[Tensor, "*batch head query"], text: Bool[Tensor, "*batch query"] | None = None
) -> Float[Tensor, "*batch head"]:
    """Return the visual intensity of each head from the row masses that ``visual_mass`` gives.

    The outer mean of Eq. 1, arXiv:2603.25088v1, for code that sees the rows one layer or one chunk
    at a time. Rows outside ``text`` are excluded, whatever they hold; ``None`` means that every
    row is a text row. A fraction in [0, 1], in float32 or better.

    Raises:
        SpanError: if an item has no text row.
    """
    mass = mass.to(torch.promote_types(mass.dtype, torch.float32))
    if text is None:
        text = mass.new_ones(mass.shape[:-2] + mass.shape[-1:], dtype=torch.bool)
    _require_some(text, "text rows", "Pass a question after the image")
    total = mass.where(rearrange(text, "... query -> ... 1 query"), 0.0).sum(dim=-1)
    return total / text.sum(dim=-1, keepdim=True)


def visual_intensity(
    pattern: Float[Tensor, "*batch head query key"],
    text: Bool[Tensor, "*batch query"],
    visual: Bool[Tensor, "*batch key"],
) -> Float[Tensor, "*batch head"]:
    """Return the share of each head's attention that lands on the image, averaged over text rows.

    Eq. 1, arXiv:2603.25088v1: their Φ is the result, A is ``pattern`` (post-softmax), T_txt is
    ``text`` and T_vis is ``visual``. A fraction in [0, 1], computed in float32 or better.
    Excluded: every row outside ``text`` (system, image, padding), also when it holds NaN.

    Raises:
        SpanError: if an item has no text row or no visual key.

    >>> pattern = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.2]]])  # 1 head
    >>> image, question = torch.tensor([True, True, False]), torch.tensor([False, False, True])
    >>> visual_intensity(pattern, text=question, visual=image)
    tensor([0.8000])
    """
    _require_some(visual, "visual keys", "Pass the image to model.prompt(image, question)")
    return intensity_from_mass(visual_mass(pattern, visual), text)


@dataclass(frozen=True, eq=False, repr=False)
class HeadClasses(SelfDrawn):
    """The visually sensitive and insensitive heads of each layer.

    ``sensitive``, ``insensitive``: the two head sets. ``sensitive_fallback``,
    ``insensitive_fallback``: layers where the rule of Eqs. 2-3 selected no head, so that the
    policy ``empty`` decided ("tail" filled the set, "skip" left it empty). ``threshold`` is their
    λ_vis, or None where the heads were given explicitly.

    >>> cl.trace_attention(model, prompt).heads().sensitive.shape
    torch.Size([12, 8])
    """

    sensitive: Bool[Tensor, "*batch layer head"]
    insensitive: Bool[Tensor, "*batch layer head"]
    sensitive_fallback: Bool[Tensor, "*batch layer"]
    insensitive_fallback: Bool[Tensor, "*batch layer"]
    threshold: float | None
    empty: str

    @classmethod
    def from_indices(
        cls,
        sensitive: SomeHeads,
        insensitive: SomeHeads,
        *,
        layers: int,
        heads: int,
    ) -> "HeadClasses":
        """Return the classes with the heads named explicitly, as {layer: [heads]} or in pairs.

        A layer that is not named has an empty set there; an anchor read from it is a no-op
        (``empty`` is "skip"). A head may be in both sets. No layer counts as a fallback.

        Raises:
            ParameterError: if a layer or a head does not exist.

        >>> HeadClasses.from_indices({4: [0, 1]}, {0: [3]}, layers=12, heads=8)
        HeadClasses(12 layers × 8 heads, given explicitly: 2 sensitive, 1 insensitive)
        """
        none = torch.zeros(layers, dtype=torch.bool)
        return cls(
            sensitive=head_mask(sensitive, range(layers), heads, name="sensitive"),
            insensitive=head_mask(insensitive, range(layers), heads, name="insensitive"),
            sensitive_fallback=none,
            insensitive_fallback=none.clone(),
            threshold=None,
            empty="skip",
        )

    def draw(self) -> Any:
        """Return the matrix of heads with their classes, as a matplotlib figure.

        Of several samples it is the share of them in which a head is in a class.
        """
        shares = [
            one.float().reshape(-1, *one.shape[-2:]).mean(dim=0).cpu().numpy()
            for one in (self.sensitive, self.insensitive)
        ]
        return drawing("head_classes")(*shares)

    def __repr__(self) -> str:
        """Return the size of both head sets and how often the policy for empty sets decided."""
        *batch, layers, heads = self.sensitive.shape
        samples = f"{math.prod(batch)} samples × " if batch else ""
        rule = "given explicitly" if self.threshold is None else f"λ = {self.threshold:g}"
        text = (
            f"{samples}{layers} layers × {heads} heads, {rule}: "
            f"{int(self.sensitive.sum())} sensitive, {int(self.insensitive.sum())} insensitive"
        )
        if self.threshold is not None:
            done = "filled from the tail" if self.empty == "tail" else "left empty"
            text += (
                f"; empty sets {done}: {int(self.sensitive_fallback.sum())} sensitive, "
                f"{int(self.insensitive_fallback.sum())} insensitive"
            )
        return f"HeadClasses({text})"


def classify_heads(
    intensity: Float[Tensor, "*batch layer head"],
    threshold: float | int = 1.0,
    empty: EmptyPolicy = "tail",
    *,
    check: bool = True,
) -> HeadClasses:
    """Return the heads that look at the image far more, and far less, than their layer's mean.

    Eqs. 2-3, arXiv:2603.25088v1: sensitive where Φ > μ + λσ, insensitive where Φ < μ − λσ, both
    strict; Φ is ``intensity``, λ_vis is ``threshold``, μ and σ (population, ddof 0) are taken over
    the heads of one layer of one sample. Computed in float64, so that heads that are equal in
    float32 have σ = 0 exactly. Nothing is read back from the device, except to see that all is
    finite; ``check=False`` leaves that out, and heads that are not are in no class.

    **Departs from the paper:** on skewed layers μ − λσ is often below 0, and a set is empty. With
    ``empty="tail"`` it is then made of the ⌈(1 − N(λ))·H⌉ lowest (or highest) of the H heads, N
    the standard normal distribution function: the share that a normal Φ would give, at least one
    head. With ``empty="skip"`` it stays empty, and the anchor read from it is a no-op. Both are
    counted in the result's fallback masks. Ties: of equal heads, the one with the lower index
    ranks as the lower one, so that the two tails are disjoint whenever they fit into H heads.

    Raises:
        ParameterError: if ``intensity`` is not finite, ``threshold`` is negative or not finite,
            or ``empty`` is not a known policy.

    >>> layer = torch.tensor([[0.1, 0.1, 0.1, 0.9]])  # μ = 0.3, σ = 0.346, so μ − σ < 0
    >>> classes = classify_heads(layer)
    >>> classes.sensitive
    tensor([[False, False, False,  True]])
    >>> classes.insensitive, classes.insensitive_fallback  # ⌈0.159·4⌉ = 1 head
    (tensor([[ True, False, False, False]]), tensor([True]))
    """
    check_rule(threshold, empty)
    if not isinstance(intensity, Tensor):
        raise ParameterError(f"intensity must be a tensor, but is {intensity!r:.80}. Pass one.")
    if check:
        _require_finite(intensity)
    # Less the first head's: of equal heads, μ and σ are exactly 0.
    phi = intensity.detach()
    phi = (phi.cpu() if phi.device.type == "mps" else phi).double()
    phi = phi - phi[..., :1]
    deviation = phi - phi.mean(dim=-1, keepdim=True)
    limit = threshold * phi.std(dim=-1, correction=0, keepdim=True)
    sensitive, insensitive = deviation > limit, deviation < -limit
    no_sensitive, no_insensitive = ~sensitive.any(dim=-1), ~insensitive.any(dim=-1)
    if empty == "tail":
        heads = phi.shape[-1]
        count = max(1, math.ceil(0.5 * math.erfc(threshold / math.sqrt(2)) * heads))
        rank = phi.argsort(dim=-1, stable=True).argsort(dim=-1)
        sensitive |= no_sensitive[..., None] & (rank >= heads - count)
        insensitive |= no_insensitive[..., None] & (rank < count)
    return HeadClasses(
        sensitive=sensitive.to(intensity.device),
        insensitive=insensitive.to(intensity.device),
        sensitive_fallback=no_sensitive.to(intensity.device),
        insensitive_fallback=no_insensitive.to(intensity.device),
        threshold=float(threshold),
        empty=empty,
    )


def check_rule(threshold: float | int, empty: str) -> None:
    """Raise ParameterError unless the threshold is a number >= 0 and the policy a known one."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ParameterError(
            f"threshold must be a finite number of standard deviations >= 0, but is {threshold}. "
            "Pass threshold=1.0 for the paper's setting."
        )
    if empty not in get_args(EmptyPolicy):
        raise ParameterError(
            f"empty must be 'tail' or 'skip', but is {empty!r}. Pass empty='tail'."
        )


def _require_finite(intensity: Float[Tensor, "*batch layer head"]) -> None:
    """Raise ParameterError, naming the first one, unless every head's intensity is finite."""
    finite = intensity.isfinite()
    if not bool(finite.all()):
        *_, layer, head = (~finite).nonzero()[0].tolist()
        raise ParameterError(
            f"intensity must be finite, but layer {layer}, head {head} is "
            f"{float(intensity[~finite][0])}. Check the model's dtype and the padding mask."
        )


def _require_some(mask: Bool[Tensor, "*batch position"], what: str, remedy: str) -> None:
    """Raise SpanError, naming the first item, unless every item has at least one True."""
    some = mask.any(dim=-1).reshape(-1)
    if not bool(some.all()):
        item = int((~some).nonzero()[0])
        raise SpanError(
            f"item {item} of the batch has 0 {what}, but visual intensity (Eq. 1) needs at least "
            f"1. {remedy}, or drop the item."
        )


def named_heads(heads: SomeHeads, name: str = "heads") -> HeadTable | HeadPairs:
    """Return a mask [layer, head] as a table, anything else as (layer, head) pairs, in tuples.

    ``name`` is the parameter's, for errors.

    Raises:
        ParameterError: if it is no mask, no pairs and no {layer: [heads]}.
    """
    found: Any = heads.tolist() if isinstance(heads, Tensor | np.ndarray) else heads
    try:
        if isinstance(found, Mapping):
            found = [(layer, head) for layer, several in found.items() for head in several]
        rows: Any = tuple(map(tuple, found))
    except TypeError:
        rows: Any = (("neither",),)
    kinds = {type(one) for row in rows for one in row}
    lengths = {len(row) for row in rows}
    if kinds == {bool} and len(lengths) == 1:
        return rows
    if lengths <= {2} and all(issubclass(one, Integral) and one is not bool for one in kinds):
        return tuple((int(layer), int(head)) for layer, head in rows)
    shown: Any = heads
    if isinstance(heads, Tensor | np.ndarray):
        shown = f"{heads.dtype} of shape {tuple(heads.shape)}"
    raise ParameterError(
        f"{name} must be a bool mask [layer, head], pairs (layer, head) or {{layer: [heads]}}, "
        f"but is {shown}. Pass a mask such as trace.heads().sensitive, of one sample, or "
        f"{name}=[(4, 0), (5, 2)]."
    )


def head_mask(
    heads: SomeHeads,
    layers: Sequence[int],
    count: int,
    *,
    depth: int | None = None,
    name: str = "heads",
    of: str = "the model",
) -> Bool[Tensor, "*batch layer head"]:
    """Return heads, however they are named, as a mask with a row for each of ``layers``.

    ``layers`` are the numbers (0-based) of those that have such heads, ``count`` of them each. A
    mask has a row for each, or for each of the ``depth`` layers of the whole stack. ``name`` and
    ``of`` are the parameter and what it is for, for errors.

    Raises:
        ParameterError: if ``heads`` is of another kind or shape, or a layer or head does not exist.
    """
    if isinstance(heads, Tensor) and heads.dtype == torch.bool and heads.ndim >= 2:
        mask = heads
    else:
        named = named_heads(heads, name)
        if not named or not isinstance(named[0][0], bool):
            mask = torch.zeros(len(layers), count, dtype=torch.bool)
            for layer, head in named:
                _check_head(layer, head, layers, count, name)
                mask[layers.index(layer), head] = True
            return mask
        mask = torch.tensor(named)
    found, size = tuple(mask.shape[-2:]), (len(layers), count)
    whole = size if depth is None else (depth, count)
    if found == size:
        return mask
    if found != whole:
        raise ParameterError(
            f"{name} is for {found} (layers, heads), but {of} has {whole}. Pass a mask of that "
            f"shape, or {name}=[(layer, head), …]."
        )
    return mask[..., list(layers), :]


def _check_head(layer: int, head: int, layers: Sequence[int], count: int, name: str) -> None:
    """Raise ParameterError unless there is such a head."""
    if layer not in layers:
        whole = list(layers) == list(range(len(layers)))
        known = f"0 to {len(layers) - 1}" if whole else ", ".join(map(str, layers))
        raise ParameterError(
            f"{name} names layer {layer}, but the layers are {known} (0-based). Correct {name}."
        )
    if not 0 <= head < count:
        raise ParameterError(
            f"{name} names head {head} of layer {layer}, but the heads are 0 to {count - 1}. "
            f"Correct {name}."
        )
