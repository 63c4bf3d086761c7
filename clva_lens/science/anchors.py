"""Visual anchors: where a few heads look, and attention re-weighted by it.

Eqs. 4 and 8-11 of arXiv:2603.25088v1. Tensors in, tensors out; ``*batch`` stands for any leading
axes, also none. Nothing here reads a value back from the device, so that it can run at every
decoding step; only the properties and the repr of ``VisualAnchors`` do, when asked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.ground.ambient import exact
from clva_lens.ground.drawn import on_photo
from clva_lens.ground.errors import ParameterError
from clva_lens.science.heads import HeadClasses

_ZERO = 1e-12  # 1 + α − β closer to 0 than this is 0: (1 − 0.9) − 0.1 is −3e-17 in float64


@dataclass(frozen=True, eq=False, repr=False)
class VisualAnchors:
    """The visual tokens to reinforce and those to suppress, with the maps they come from.

    ``positive``, ``negative``: the masks Z_pos and Z_neg of Eq. 9, arXiv:2603.25088v1;
    ``positive_map``, ``negative_map``: the saliency maps of Eq. 4 (fractions of attention mass);
    the layers are 0-based; ``heads`` is None where no head classes were needed.

    Args:
        positive_layer: where the positive anchor was read.
        negative_layer: where the negative one was.

    >>> with cl.intervening(model, cl.CLVA()) as run:
    ...     _ = model.hf_model(**prompt)
    >>> run.anchors.positive.shape
    torch.Size([64])
    """

    positive: Bool[Tensor, "*batch visual"]
    negative: Bool[Tensor, "*batch visual"]
    positive_map: Float[Tensor, "*batch visual"]
    negative_map: Float[Tensor, "*batch visual"]
    heads: HeadClasses | None
    positive_layer: int
    negative_layer: int

    @property
    def empty_positive(self) -> int:
        """Number of samples whose positive mask marks no token: for them it is a no-op."""
        return int((~self.positive.any(dim=-1)).sum())

    @property
    def empty_negative(self) -> int:
        """Number of samples whose negative mask marks no token: for them it is a no-op."""
        return int((~self.negative.any(dim=-1)).sum())

    @property
    def overlap(self) -> int:
        """Number of visual tokens in both masks, summed over samples: their weight is 1 + α − β."""
        return int((self.positive & self.negative).sum())

    def draw(self, prompt: Any, **options: Any) -> Any:
        """Return both maps on the photo of ``prompt``, both anchors outlined: a matplotlib figure.

        ``options`` are those of ``cl.overlay``.

        Raises:
            ParameterError: if they are of several samples.
            PromptError: if it is unknown where on the photo the image tokens lie.
        """
        if self.positive.ndim > 1:
            raise ParameterError(
                f"these anchors are of {len(self.positive)} samples, and one is drawn. Make the "
                "prompt from one image and one question."
            )
        return on_photo()(
            prompt,
            torch.stack([self.positive_map, self.negative_map]),
            titles=[f"layer {self.positive_layer}", f"layer {self.negative_layer}"],
            outlines={"positive": self.positive, "negative": self.negative},
            **options,
        )

    def __repr__(self) -> str:
        """Return where the anchors come from and how many tokens they mark."""
        *batch, visual = self.positive.shape
        samples = f"{math.prod(batch)} samples × " if batch else ""
        return (
            f"VisualAnchors({samples}{visual} visual tokens: "
            f"{int(self.positive.sum())} positive (layer {self.positive_layer}), "
            f"{int(self.negative.sum())} negative (layer {self.negative_layer}), "
            f"{self.overlap} in both; empty masks: {self.empty_positive} positive, "
            f"{self.empty_negative} negative)"
        )


def default_positive_layer(num_layers: int) -> int:
    """Return the layer of the positive anchor, L/2 − 2 with L = ``num_layers``; 0-based.

    The paper counts layers from 1 in its equations and does not say which count L/2 − 2 is in; the
    0-based reading is the one that lands on a cross-attention layer of the 12-layer Q-Former.

    Raises:
        ParameterError: if the model is too shallow to have such a layer.

    >>> default_positive_layer(32)
    14
    """
    if num_layers < 4:
        raise ParameterError(
            f"the default positive layer, num_layers // 2 - 2, needs at least 4 layers, but the "
            f"model has {num_layers}. Pass positive_layer= explicitly."
        )
    return num_layers // 2 - 2


def default_anchor_layers(layers: Sequence[int], num_layers: int) -> tuple[int, int]:
    """Return the default layers of the positive and the negative anchor, of those with attention.

    ``layers`` are these, in a stack of ``num_layers``. The negative anchor is the first of them,
    the positive one the nearest to L/2 − 2, the earlier of two as near; but the last of them only
    if there is no other, since what is edited comes after the anchors.

    Raises:
        ParameterError: if the model is too shallow for a default.

    >>> default_anchor_layers(range(32), 32), default_anchor_layers(range(3, 32, 4), 32)
    ((14, 0), (15, 3))
    """
    wanted = default_positive_layer(num_layers)
    earlier = sorted(layers)[:-1] or list(layers)
    return min(earlier, key=lambda layer: abs(layer - wanted)), min(layers)


@exact()
def saliency_map(
    rows: Float[Tensor, "*batch head visual"], heads: Bool[Tensor, "*#batch head"]
) -> Float[Tensor, "*batch visual"]:
    """Return where a set of heads looks: the mean over the set of one query row's attention to V.

    Eq. 4, arXiv:2603.25088v1: M is the result, H is ``heads``, A(−1, j) is ``rows``, each head's
    attention from the last query row to the visual tokens. Fractions of attention mass, summing to
    at most 1; float32 or better. Heads outside the set are excluded, whatever they hold. An empty
    set gives a map of zeros, which marks no token (Eq. 9): that anchor is a no-op.

    >>> rows = torch.tensor([[0.2, 0.4], [0.0, 0.2], [0.9, 0.0]])
    >>> saliency_map(rows, torch.tensor([True, True, False]))
    tensor([0.1000, 0.3000])
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    chosen = rows.where(rearrange(heads.to(rows.device), "... head -> ... head 1"), 0.0)
    return mean_of_heads(chosen, head_shares(heads).to(rows))


def head_shares(heads: Bool[Tensor, "*batch head"]) -> Float[Tensor, "*batch head"]:
    """Return what each head counts in the mean over a set: 1/|H| in it, 0 outside; float32."""
    return heads.float() / heads.sum(dim=-1, keepdim=True).clamp(min=1)


def mean_of_heads(
    rows: Float[Tensor, "*batch head visual"], shares: Float[Tensor, "*#batch head"]
) -> Float[Tensor, "*batch visual"]:
    """Return Eq. 4 from ``head_shares``, for code that makes these once for many rows."""
    return (shares.unsqueeze(-2) @ rows).squeeze(-2)


def z_scores(
    saliency: Float[Tensor, "*batch visual"], epsilon: float = 1e-6
) -> Float[Tensor, "*batch visual"]:
    """Return how many standard deviations each visual token stands above the mean of its map.

    Eq. 8, arXiv:2603.25088v1: (M − μ)/(σ + ε) with M = ``saliency``, μ and σ (population, ddof 0)
    over the visual tokens of one map, ε = ``epsilon``. Dimensionless, in [−√(V−1), √(V−1)] for V
    tokens; 0 everywhere on a constant map, up to rounding. Float32 or better.

    Raises:
        ParameterError: if ``epsilon`` is not positive (a constant map would give 0/0).
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ParameterError(
            f"epsilon must be finite and > 0, but is {epsilon}. Pass epsilon=1e-6."
        )
    saliency = saliency.to(torch.promote_types(saliency.dtype, torch.float32))
    std, mean = torch.std_mean(saliency, dim=-1, correction=0, keepdim=True)
    return (saliency - mean) / (std + epsilon)


def anchor_mask(
    saliency: Float[Tensor, "*batch visual"], tau: float | int = 2.0, epsilon: float = 1e-6
) -> Bool[Tensor, "*batch visual"]:
    """Return the visual tokens that stand out of a saliency map: z > τ.

    Eqs. 8-9, arXiv:2603.25088v1: Z is the result, τ is ``tau``, strict. Marks less than
    V/(1 + τ²) of V tokens (Cantelli), hence none at all on a map of V ≤ 1 + τ² tokens. A constant
    map, zeros included, marks none at τ > 0.

    Raises:
        ParameterError: if ``tau`` is negative or not finite, or ``epsilon`` is not positive.

    >>> anchor_mask(torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3])).nonzero()
    tensor([[7]])
    """
    if not (math.isfinite(tau) and tau >= 0):
        raise ParameterError(
            f"tau must be a finite number of standard deviations >= 0, but is {tau}. "
            "Pass tau=2.0 for the paper's setting."
        )
    return z_scores(saliency, epsilon) > tau


def check_strengths(alpha: float | int, beta: float | int) -> None:
    """Check that no weight that Eq. 10 can give is negative: 1 + α, 1 − β and 1 + α − β.

    Negative strengths are allowed within that (α = −0.9 and β = −14 swap the roles of the
    anchors). A weight of 0 is allowed: it removes the token.

    Raises:
        ParameterError: naming α and β, if one of the weights is negative or not finite.
    """
    _levels(alpha, beta)


def reanchor_weights(
    positive: Bool[Tensor, "*batch visual"],
    negative: Bool[Tensor, "*batch visual"],
    alpha: float | int,
    beta: float | int,
) -> Float[Tensor, "*batch visual"]:
    """Return the factor for the attention to each visual token: 1 + α Z_pos − β Z_neg.

    Eq. 10, arXiv:2603.25088v1: Z_pos is ``positive``, Z_neg is ``negative``. Dimensionless, >= 0;
    float32. A token in both masks gets 1 + α − β.

    Raises:
        ParameterError: if ``check_strengths(alpha, beta)`` does.
    """
    return _by_mask(positive, negative, _levels(alpha, beta))


def reanchor_log_weights(
    positive: Bool[Tensor, "*batch visual"],
    negative: Bool[Tensor, "*batch visual"],
    alpha: float | int,
    beta: float | int,
) -> Float[Tensor, "*batch visual"]:
    """Return log(1 + α Z_pos − β Z_neg), to be added to the scores before the softmax.

    Eqs. 10-11, arXiv:2603.25088v1, in one step: softmax(s + log w) is w·softmax(s) renormalised, so
    that fused kernels apply it as a bias and no pattern is ever materialised. Nats; float32; −inf
    where the weight is 0, exactly 0 outside both masks.

    Raises:
        ParameterError: if ``check_strengths(alpha, beta)`` does.

    >>> masks = torch.tensor([True, False, True, False]), torch.tensor([False, True, True, False])
    >>> reanchor_log_weights(*masks, alpha=14, beta=0.9)
    tensor([ 2.7081, -2.3026,  2.6462,  0.0000])
    """
    return _by_mask(positive, negative, _log_levels(alpha, beta))


def averaged_log_weights(
    share: Float[Tensor, "*batch visual"], alpha: float | int, beta: float | int
) -> Float[Tensor, "*batch visual"]:
    """Return log(1 + (α − β) Z_avg), to be added to the scores before the softmax.

    Eq. 15, arXiv:2603.25088v1: Z_avg is ``share``, the mean over all heads of their masks, in
    [0, 1]: one anchor in the place of a positive and a negative one. Nats; float32; −inf where the
    weight is 0.

    Raises:
        ParameterError: if ``check_strengths(alpha, beta)`` does.

    >>> averaged_log_weights(torch.tensor([0.0, 0.5, 1.0]), alpha=14, beta=0.9)
    tensor([0.0000, 2.0215, 2.6462])
    """
    check_strengths(alpha, beta)
    weights = 1 + (alpha - beta) * share.float()
    return weights.where(weights > _ZERO, 0.0).log()


def reanchor(
    pattern: Float[Tensor, "*batch head query key"],
    weights: Float[Tensor, "*batch key"],
    rows: Bool[Tensor, "*batch query"],
) -> Float[Tensor, "*batch head query key"]:
    """Return the pattern with some rows re-weighted and renormalised over all their keys.

    Eqs. 10-11, arXiv:2603.25088v1, as printed: the reference for ``reanchor_log_weights``, and for
    figures. ``weights`` has a factor for every key (1 outside the image), ``rows`` marks the text
    rows to edit; they sum to 1 again, and the others are returned bit for bit. Computed in float32
    or better, returned in the dtype of ``pattern``. A row all of whose mass is on keys of weight 0
    becomes NaN, as a softmax over nothing but −inf does.
    """
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    edited = wide * rearrange(weights, "... key -> ... 1 1 key")
    edited = edited / edited.sum(dim=-1, keepdim=True)
    return edited.to(pattern.dtype).where(rearrange(rows, "... query -> ... 1 query 1"), pattern)


def _levels(alpha: float | int, beta: float | int) -> tuple[float, float, float, float]:
    """Return the four weights of Eq. 10: 1, 1 + α, 1 − β and 1 + α − β, or raise."""
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ParameterError(
            f"alpha (α) and beta (β) must be finite, but are {alpha} and {beta}. "
            "Pass alpha=14, beta=0.9 for the paper's setting."
        )
    levels = {"1 + α": 1 + alpha, "1 − β": 1 - beta, "1 + α − β": 1 + alpha - beta}
    for name, level in levels.items():
        if level < -_ZERO:
            raise ParameterError(
                f"a weight of Eq. 10 is negative: {name} = {level:g} with α = {alpha}, β = {beta}. "
                "Pass alpha >= -1, beta <= 1 and beta <= 1 + alpha."
            )
    positive, negative, both = (0.0 if abs(x) <= _ZERO else float(x) for x in levels.values())
    return 1.0, positive, negative, both


@cache
def _log_levels(alpha: float | int, beta: float | int) -> tuple[float, ...]:
    """Return the logarithms of the four weights of Eq. 10, or raise."""
    return tuple(math.log(level) if level else -math.inf for level in _levels(alpha, beta))


def _by_mask(
    positive: Bool[Tensor, "*batch visual"],
    negative: Bool[Tensor, "*batch visual"],
    values: Sequence[float],
) -> Float[Tensor, "*batch visual"]:
    """Return a value per token: in neither mask, in the positive, in the negative, in both."""
    in_neither, in_positive, in_negative, in_both = values
    chosen = torch.full_like(positive, in_neither, dtype=torch.float32)
    chosen.masked_fill_(positive, in_positive).masked_fill_(negative, in_negative)
    return chosen.masked_fill_(positive & negative, in_both)
