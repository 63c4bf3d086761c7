"""The pointing game with intervals: which layers look at the object, against chance."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clva_lens.benchmarks.statistics import Bootstrap, Interval, cluster_index, weighted_mean
from clva_lens.figures import Drawing, pointing_heads
from clva_lens.figures import pointing as draw_pointing
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.parameters import check_arguments
from clva_lens.models.prompt import Prompt
from clva_lens.science.pointing import pointing


@dataclass(frozen=True, eq=False, repr=False)
class PointingGame(SelfDrawn):
    """How often maps point at objects, by layer (or whatever axes the maps have).

    ``hits`` is the share of objects on which a map has its maximum, ``shares`` the mean fraction
    of its sum that lies on them, both in [0, 1]; ``chance`` is the mean fraction of the area that
    the objects cover, which both are expected to be for a map that knows nothing. ``hit_intervals``
    and ``share_intervals`` are (low, high) of a percentile bootstrap over ``groups``, or objects;
    None for a single object. ``layers`` are the numbers of the last axis, 0-based.
    """

    hits: Float[Tensor, "*axes"]
    shares: Float[Tensor, "*axes"]
    chance: float
    hit_intervals: Float[Tensor, "*axes 2"] | None
    share_intervals: Float[Tensor, "*axes 2"] | None
    objects: int
    confidence: float
    layers: tuple[int, ...]

    def draw(self) -> Drawing:
        """Return hits and shares by layer, with intervals, or by layer and head; and chance.

        Raises:
            BenchmarkError: if the maps have other axes than layers, or layers and heads.
        """
        if not self.drawable:
            raise BenchmarkError(
                f"the maps have axes {tuple(self.hits.shape)}, but layers, or layers and heads, "
                "are drawn. Play with trace.saliency(...), or with trace.maps."
            )
        if self.hits.ndim == 2:
            return pointing_heads(
                self.hits.numpy(),
                self.shares.numpy(),
                chance=self.chance,
                layers=self.layers,
                objects=self.objects,
            )
        intervals = (self.hit_intervals, self.share_intervals)
        low_high = [None if one is None else one.numpy() for one in intervals]
        return draw_pointing(
            self.hits.numpy(),
            self.shares.numpy(),
            chance=self.chance,
            hit_intervals=low_high[0],
            share_intervals=low_high[1],
            layers=self.layers,
            objects=self.objects,
        )

    @property
    def drawable(self) -> bool:
        """Whether the maps are of layers, or of layers and heads."""
        return self.hits.ndim in (1, 2)

    def __repr__(self) -> str:
        """Return the best entry against chance: of those that hit as often, the largest share."""
        ranked = self.hits.flatten().double() + 1e-6 * self.shares.flatten().double()
        best = int(ranked.argmax())
        place = np.unravel_index(best, self.hits.shape) if self.hits.ndim else ()
        where = f"layer {self.layers[place[0]]}" if place else "the map"
        where += "".join(f", head {one}" for one in place[1:])
        hit, share = float(self.hits.flatten()[best]), float(self.shares.flatten()[best])
        span = ""
        if self.hit_intervals is not None:
            low, high = self.hit_intervals.reshape(-1, 2)[best].tolist()
            span = f" ({low:.0%} to {high:.0%})"
        return (
            f"PointingGame({self.objects} objects: {where} points at {hit:.0%}{span}, with a share "
            f"of {share:.2f}; chance {self.chance:.2f})"
        )


def _check_given(part: str | None, **given: Any) -> None:
    check_arguments(pointing_game, **given)
    if not given["saliency"].ndim or not given["mask"].ndim:
        raise ParameterError("saliency or mask is one number. Pass one for each image token.")
    if given["prompt"] is None and part is not None:
        raise ParameterError(f"part is {part!r}, but there is no prompt. Pass prompt= too.")


def pointing_game(
    saliency: Float[Tensor, "*sample_axes visual"],
    mask: Bool[Tensor, "*sample visual"],
    *,
    prompt: Prompt | None = None,
    part: str | None = None,
    layers: Sequence[int] | None = None,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    confidence: float | int = 0.95,
    seed: int = 0,
) -> PointingGame:
    """Return how saliency maps fall on objects, against chance.

    ``saliency`` is [layer, visual] with one object's patches [visual], or [sample, layer, visual]
    with those of many, [sample, visual]: ``trace.saliency("sensitive")`` with ``cl.patch_mask`` or
    a scene's own. […, layer, head, visual] plays head by head (``trace.maps``). ``layers`` are the
    0-based numbers of the layers, where they are not 0, 1, 2, … (``trace.layers``). Objects of one
    picture are not independent: ``groups`` names the picture of each, and pictures are resampled.
    With a ``prompt`` whose image tokens lie as those of all samples do, only those that are patches
    play, not those that end rows; ``part`` plays on the "tiles" or on the "thumbnail" alone.

    ``mask``: the patches of the objects; ``resamples``: how many draws an interval is of;
    ``confidence``: of the intervals, between 0 and 1; ``seed``: of the draws.

    Raises:
        PromptError: if it is unknown where the prompt's image tokens lie.
        ParameterError: if ``part`` is neither, or there is no prompt to know it from.
        BenchmarkError: if the sizes differ, an object covers no patch, or a map is negative, not
            finite or empty.

    >>> on = torch.arange(64) < 16
    >>> cl.pointing_game(cl.trace_attention(model, prompt).saliency(), on).chance
    0.25
    """
    _check_given(part, saliency=saliency, mask=mask, prompt=prompt)
    if prompt is not None:
        playing = _patches(prompt, saliency.shape[-1], part)
        saliency, mask = (one[..., playing.to(one.device)] for one in (saliency, mask))
    found = pointing(saliency, mask)
    count = found.hit.shape[mask.ndim - 1] if found.hit.ndim >= mask.ndim else 1
    numbered = tuple(range(count) if layers is None else layers)
    if len(numbered) != count:
        raise BenchmarkError(f"layers names {len(numbered)} layers, but the maps have {count}.")
    hit, share = found.hit.double().cpu(), found.share.double().cpu()
    single = mask.ndim == 1
    objects = 1 if single else len(mask)
    ends: list[Tensor | None] = [None, None]
    if objects > 1:
        index = cluster_index(groups, objects)
        draws = Bootstrap(index, resamples, float(confidence), seed)
        ends = [_intervals(draws, values) for values in (hit, share)]
    means = [values if single else values.mean(dim=0) for values in (hit, share)]
    return PointingGame(
        means[0].float(),
        means[1].float(),
        float(found.chance.mean()),
        ends[0],
        ends[1],
        objects,
        float(confidence),
        numbered,
    )


def _patches(prompt: Prompt, count: int, part: str | None) -> Int[Tensor, " patch"]:
    """Return the places of those of ``count`` image tokens that are patches."""
    site = prompt.site_of(count)
    if site is not None:
        if part is not None:
            return prompt.sites[site].piece(part).tokens
        return torch.cat([one.tokens for one in prompt.pieces_at(site)]).sort().values
    counts = ", ".join(str(tokens.spans.visual_count) for tokens in prompt.sites.values())
    raise BenchmarkError(
        f"the maps have {count} values, but the prompt has {counts} image tokens. Pass maps over "
        "this prompt's image tokens."
    )


def _intervals(draws: Bootstrap, values: Tensor) -> Float[Tensor, "*axes 2"]:
    """Return (low, high) of the mean over the first axis, for each of the others."""
    columns = values.reshape(len(values), -1).T.numpy()
    made: list[Interval] = draws.intervals([(weighted_mean, column, None) for column in columns])
    ends = torch.tensor([[one.low, one.high] for one in made], dtype=torch.float32)
    return ends.reshape(*values.shape[1:], 2)
