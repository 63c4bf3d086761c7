"""Attention drift: how a layer's map departs from the visual anchors. Eqs. 5-6, arXiv:2603.25088v1.

Tensors in, tensors out; ``*batch`` stands for any leading axes, also none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.ground.drawn import SelfDrawn, drawing
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import check_arguments
from clva_lens.science.anchors import anchor_mask, default_anchor_layers

CURVES = (
    "entropy",
    "entropy_normalised",
    "toward_positive",
    "toward_negative",
    "unmasked_positive",
    "unmasked_negative",
)


@runtime_checkable
class LayerMaps(Protocol):
    """What ``attention_drift`` reads of an AttentionTrace."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The traced layers, 0-based, in the order of the maps."""
        ...

    @property
    def num_layers(self) -> int:
        """Number of layers of the model, traced or not."""
        ...

    def saliency(
        self, heads: Literal["all", "sensitive", "insensitive"], /
    ) -> Float[Tensor, "*batch layer visual"]:
        """Return the saliency map (Eq. 4) of a head set at each traced layer."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class AttentionDrift(SelfDrawn):
    """Curves over the layers: two entropies, and correlations with the two anchors.

    ``entropy``: of the sensitive heads' map as printed in Eq. 5, arXiv:2603.25088v1, which mixes
    dispersion with visual mass; ``entropy_normalised``: of the same map divided by its sum, which
    is dispersion alone. Both in nats. ``toward_positive``, ``toward_negative``: Pearson r (Eq. 6)
    of the map of all heads with the positive and the negative anchor map, in [−1, 1]; NaN where a
    map is constant. ``unmasked_positive``, ``unmasked_negative``: the same r over the tokens that
    neither mask of Eq. 9 marks, to which CLVA does nothing but renormalise: re-weighting the marked
    ones moves r over all tokens by itself, whatever the model does. ``layers`` are the traced
    layers; all layers are 0-based.
    """

    entropy: Float[Tensor, "*batch layer"]
    entropy_normalised: Float[Tensor, "*batch layer"]
    toward_positive: Float[Tensor, "*batch layer"]
    toward_negative: Float[Tensor, "*batch layer"]
    unmasked_positive: Float[Tensor, "*batch layer"]
    unmasked_negative: Float[Tensor, "*batch layer"]
    positive_layer: int
    negative_layer: int
    layers: tuple[int, ...]

    def draw(self) -> Any:
        """Return the paper's Fig. 2b as a matplotlib figure, over all tokens and the unmasked ones.

        Raises:
            FigureError: if a map is constant, so that its correlation is NaN.
        """
        curves = {}
        for name in CURVES:
            values = getattr(self, name).reshape(-1, len(self.layers)).float().cpu().numpy()
            curves[name] = values if len(values) > 1 else values[0]
        del curves["entropy_normalised"]
        ends = self.positive_layer, self.negative_layer
        return drawing("drift_curves")({"greedy": curves}, *ends, layers=self.layers)

    def __repr__(self) -> str:
        """Return the values at the first and the last traced layer, averaged over samples."""

        def ends(curve: Float[Tensor, "*batch layer"]) -> str:
            mean = curve.reshape(-1, curve.shape[-1]).mean(dim=0)
            return f"{float(mean[0]):.2f} → {float(mean[-1]):.2f}"

        *batch, layers = self.entropy.shape
        samples = f"mean of {self.entropy.numel() // layers} samples, " if batch else ""
        return (
            f"AttentionDrift({samples}layers {self.layers[0]} → {self.layers[-1]}: "
            f"entropy {ends(self.entropy)} nats, normalised {ends(self.entropy_normalised)} nats; "
            f"r toward positive (layer {self.positive_layer}) {ends(self.toward_positive)}, "
            f"toward negative (layer {self.negative_layer}) {ends(self.toward_negative)})"
        )


def entropy(
    saliency: Float[Tensor, "*batch visual"], normalised: bool = False
) -> Float[Tensor, "*batch"]:
    """Return the entropy of a saliency map, in nats: −Σ M log M with 0 log 0 = 0.

    Eq. 5, arXiv:2603.25088v1; M is ``saliency``, whose sum is the visual mass and not 1, so that
    the printed value also falls when the map merely gets fainter. ``normalised=True`` divides M by
    its sum first. In [0, ln V] over V tokens (the printed one for V >= 3); float32 or better. A map
    without any mass has no normalised entropy: NaN; as printed, its entropy is 0.

    >>> entropy(torch.tensor([0.25, 0.25, 0.0]))  # 0.5 ln 4
    tensor(0.6931)
    >>> entropy(torch.tensor([0.25, 0.25, 0.0]), normalised=True)  # ln 2
    tensor(0.6931)
    """
    saliency = saliency.to(torch.promote_types(saliency.dtype, torch.float32))
    if normalised:
        saliency = saliency / saliency.sum(dim=-1, keepdim=True)
    return torch.special.entr(saliency).sum(dim=-1)


def correlation(
    a: Float[Tensor, "*#batch visual"],
    b: Float[Tensor, "*#batch visual"],
    among: Bool[Tensor, "*#batch visual"] | None = None,
) -> Float[Tensor, "*#batch"]:
    """Return Pearson's r of two maps over their visual tokens; other axes are broadcast.

    ``among`` marks the tokens that count; None counts all.

    Eq. 6, arXiv:2603.25088v1. Dimensionless, in [−1, 1]; NaN where a map is constant (a map of
    zeros too), because r is undefined there. Computed in float64 on the CPU, returned on the
    device of ``a`` in the wider dtype of the two, at least float32.

    >>> correlation(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.6, 0.4, 0.2]))
    tensor(-1.)
    """
    x, y = _centred(a, among), _centred(b, among)
    covariance = (x * y).sum(dim=-1)
    r = covariance / (x.square().sum(dim=-1).sqrt() * y.square().sum(dim=-1).sqrt())
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return r.clamp(-1, 1).to(dtype).to(a.device)


def drift_of_maps(
    saliency_all: Float[Tensor, "*batch layer visual"],
    saliency_sensitive: Float[Tensor, "*batch layer visual"],
    positive_anchor: Float[Tensor, "*batch visual"],
    negative_anchor: Float[Tensor, "*batch visual"],
    positive_layer: int,
    negative_layer: int,
    *,
    layers: Sequence[int] | None = None,
    tau: float | int = 2.0,
) -> AttentionDrift:
    """Return the entropy of each layer's sensitive heads and its correlation with both anchors.

    Eqs. 5-6 and Fig. 2b, arXiv:2603.25088v1: ``saliency_all`` is M(l, H_all),
    ``saliency_sensitive`` is M(l, H_sens); ``negative_anchor`` is M(1, H_insens) and
    ``positive_anchor`` the map of the sensitive heads at a middle layer. The two layer numbers are
    only recorded. ``layers`` names the layers of the curves where they are not 0, 1, 2, …;
    ``tau`` is τ of the masks (Eq. 9) outside which the unmasked r are taken.
    """
    names = range(saliency_all.shape[-2]) if layers is None else layers
    positive, negative = _for_each_layer(positive_anchor), _for_each_layer(negative_anchor)
    unmasked = ~(anchor_mask(positive, tau) | anchor_mask(negative, tau))
    return AttentionDrift(
        entropy=entropy(saliency_sensitive),
        entropy_normalised=entropy(saliency_sensitive, normalised=True),
        toward_positive=correlation(saliency_all, positive),
        toward_negative=correlation(saliency_all, negative),
        unmasked_positive=correlation(saliency_all, positive, unmasked),
        unmasked_negative=correlation(saliency_all, negative, unmasked),
        positive_layer=positive_layer,
        negative_layer=negative_layer,
        layers=tuple(names),
    )


def attention_drift(
    attn: LayerMaps,
    positive_layer: int | None = None,
    negative_layer: int = 0,
    *,
    tau: float | int = 2.0,
) -> AttentionDrift:
    """Return the drift curves of a traced forward pass.

    Eqs. 5-6, arXiv:2603.25088v1, over the layers that ``attn`` traced. The positive anchor is the
    sensitive heads' map at ``positive_layer`` (default: num_layers // 2 - 2, or the nearest that
    has attention), the negative anchor the insensitive heads' map at ``negative_layer`` (0: the
    first that has attention); both 0-based. ``tau`` is CLVA's, see ``drift_of_maps``. Where a head
    set is empty and was left so (``empty="skip"``), its map is zeros and the correlation with it
    NaN.

    Raises:
        ParameterError: if an anchor layer was not traced, or the model has fewer than 4 layers and
            no ``positive_layer`` is given.

    >>> drift = cl.attention_drift(cl.trace_attention(model, prompt))
    >>> drift.toward_positive.shape
    torch.Size([12])
    """
    check_arguments(attention_drift, attn=attn)
    layers = tuple(attn.layers)
    attending = getattr(attn, "site_layers", ()) or range(attn.num_layers)
    if positive_layer is None:
        positive_layer = default_anchor_layers(attending, attn.num_layers)[0]
    if negative_layer == 0:
        negative_layer = min(attending)
    for name, layer in (("positive_layer", positive_layer), ("negative_layer", negative_layer)):
        if layer not in layers:
            raise ParameterError(
                f"{name} is {layer}, but the traced layers are {', '.join(map(str, layers))} "
                f"(0-based). Pass {name}= one of them, or trace that layer too."
            )
    sensitive = attn.saliency("sensitive")
    return drift_of_maps(
        attn.saliency("all"),
        sensitive,
        positive_anchor=sensitive[..., layers.index(positive_layer), :],
        negative_anchor=attn.saliency("insensitive")[..., layers.index(negative_layer), :],
        positive_layer=positive_layer,
        negative_layer=negative_layer,
        layers=layers,
        tau=tau,
    )


def _centred(
    saliency: Float[Tensor, "*#batch visual"], among: Bool[Tensor, "*#batch visual"] | None
) -> Float[Tensor, "*#batch visual"]:
    """Return the deviations from the mean, exactly 0 on a constant map and where none counts."""
    wide = saliency.cpu().double()
    if among is None:
        wide = wide - wide[..., :1]
        return wide - wide.mean(dim=-1, keepdim=True)
    wide, chosen = torch.broadcast_tensors(wide, among.cpu())
    first = wide.gather(-1, chosen.long().argmax(dim=-1, keepdim=True))
    wide = torch.where(chosen, wide - first, 0)
    mean = wide.sum(dim=-1, keepdim=True) / chosen.sum(dim=-1, keepdim=True)
    return torch.where(chosen, wide - mean, 0)


def _for_each_layer(anchor: Float[Tensor, "*batch visual"]) -> Float[Tensor, "*batch 1 visual"]:
    """Return the anchor with a layer axis to broadcast over."""
    return rearrange(anchor, "... visual -> ... 1 visual")
