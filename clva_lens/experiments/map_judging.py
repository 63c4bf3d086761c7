"""Are maps right? The pointing game, and a knock-out of the tokens that they name, beside nulls.

A map that points at the object may still say nothing about the answer, and the other way round. So
each map is asked twice: how much of it lies on the object, and how much of the answer's logit is
lost when text may no longer look at the tokens that it ranks highest, beside as many tokens drawn
at random. A map that points in an untrained twin of the model too shows the picture, not what was
learned (Adebayo et al., arXiv:1810.03292).
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.benchmarks.statistics import Bootstrap, cluster_index, weighted_mean
from clva_lens.experiments.drift_nulls import untrained_twin
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.files import Row
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.image_map import image_map
from clva_lens.lens.load import LensModel
from clva_lens.lens.maps import MAPS
from clva_lens.lens.maps.base import MapFormula, Reading
from clva_lens.methods.knockout import KnockOut
from clva_lens.methods.target import shape_of
from clva_lens.models.prompt import Prompt
from clva_lens.science.pointing import pointing

EVEN = "even"
"""The map that knows nothing: the same for each image token."""


def judge_maps(
    model: LensModel,
    prompts: Sequence[Prompt],
    objects: Bool[Tensor, "sample visual"],
    maps: Mapping[str, MapFormula] | None = None,
    *,
    tokens: Any = ("yes", "no"),
    fraction: float = 0.125,
    untrained: int = 1,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> list[Row]:
    """Return, for each map of the model and of untrained twins of it, a row of how it does.

    ``share`` is the mean fraction of the map on the object and ``hits`` how often its largest value
    is there, beside ``chance``; ``lost`` is what the explained logit loses when the map's highest
    ``fraction`` of tokens is knocked out of all layers, beside what it loses ``at random``, and
    ``beyond`` the mean of the differences; "… low" and "… high" are the ends of a percentile
    bootstrap over groups. A map that is 0 everywhere, or ``"even"``, points nowhere and ranks
    nothing: its share is chance, it hits as often as chance does, and it loses what random tokens
    lose. ``empty`` counts these.

    Args:
        model: what ``cl.load`` returned.
        prompts: single ones, about what is in the picture.
        objects: the patches of what each asks for (``cl.patch_mask``).
        maps: formulas by the names they are to have; None are all registered, as they are.
        tokens: the logit that is explained, as ``cl.image_map`` takes it.
        fraction: how many of the image tokens are knocked out.
        untrained: how many twins with random weights are asked the same.
        groups: names the picture of each prompt, which are resampled together.
        resamples: how many draws an interval is of.
        seed: of the twins, the tokens at random and the intervals.
        progress: whether a bar may be shown.

    Raises:
        ParameterError: if there are no prompts, or not as many objects.
    """
    if not prompts or len(prompts) != len(objects):
        raise ParameterError(
            f"{len(prompts)} prompts and {len(objects)} objects were passed. Pass as many of each."
        )
    asked = {name: MAPS.get(name)() for name in MAPS.names()} if maps is None else dict(maps)
    models = {"trained": [model]}
    if untrained:
        models["untrained"] = [untrained_twin(model, seed + one) for one in range(untrained)]
    rows, total = [], len(prompts) * sum(map(len, models.values()))
    with progress_bar("judging maps", total, wanted=progress) as advance:
        for which, several in models.items():
            found = [_Judged(one, asked, tokens, fraction, seed) for one in several]
            for judged in found:
                for prompt in prompts:
                    judged.ask(prompt)
                    advance(1)
            for name in (EVEN, *asked):
                told = _row(found, name, objects, groups, (resamples, seed))
                rows.append({"map": name, "model": which, **told})
    return rows


class _Judged:
    """Every map of every prompt for one model, and what is lost without the tokens they name."""

    def __init__(
        self,
        model: LensModel,
        maps: Mapping[str, MapFormula],
        tokens: Any,
        fraction: float,
        seed: int,
    ) -> None:
        self.model, self.maps, self.tokens, self.fraction = model, maps, tokens, fraction
        self.generator = torch.Generator().manual_seed(seed)
        names = (EVEN, *maps)
        self.saliency: dict[str, list[Float[Tensor, " visual"]]] = {name: [] for name in names}
        self.lost: dict[str, list[float]] = {name: [] for name in names}
        self.at_random: list[float] = []
        self.empty = dict.fromkeys(names, 0)

    def ask(self, prompt: Prompt) -> None:
        """Make the maps of one prompt, and knock out what they rank highest."""
        plain = self._logit(prompt, None)
        visual = prompt.sites[next(iter(prompt.sites))].spans.visual_count
        count = round(self.fraction * visual)
        drawn = torch.randperm(visual, generator=self.generator)[:count].tolist()
        random = plain - self._logit(prompt, drawn)
        self.at_random.append(random)
        even = torch.full((visual,), 1 / visual)
        for name in (EVEN, *self.maps):
            saliency = even
            if name != EVEN:
                found = image_map(self.model, prompt, self.maps[name], tokens=self.tokens)
                saliency = found.saliency().float().cpu()
            knows = bool(saliency.max() > saliency.min())
            self.empty[name] += not knows
            top = saliency.topk(count).indices.tolist()
            self.saliency[name].append(saliency if knows else even)
            self.lost[name].append(plain - self._logit(prompt, top) if knows else random)

    def _logit(self, prompt: Prompt, hidden: list[int] | None) -> float:
        shape = shape_of(self.model.hf_model)
        method = None if hidden is None else KnockOut(layers=shape.layers, tokens=hidden)
        reading = Reading(self.model, prompt, self.tokens, method)
        with undisturbed():
            return float(reading.run())


def _row(
    judged: Sequence[_Judged],
    name: str,
    objects: Bool[Tensor, "sample visual"],
    groups: Sequence[Hashable] | None,
    draws: tuple[int, int],
) -> Row:
    """Return how one map does; of several twins, each prompt's mean over them."""
    resamples, seed = draws
    saliency = torch.stack([torch.stack(one.saliency[name]) for one in judged], dim=1)
    found = pointing(saliency, objects)
    even = saliency.amax(dim=-1) <= saliency.amin(dim=-1)
    # The first of equal values is no largest one.
    hit = torch.where(even, found.chance[:, None], found.hit.float()).double().mean(dim=1)
    lost, random = (
        torch.tensor(several, dtype=torch.float64).mean(dim=0)
        for several in ([one.lost[name] for one in judged], [one.at_random for one in judged])
    )
    columns = {
        "share": found.share.double().mean(dim=1),
        "hits": hit,
        "chance": found.chance.double(),
        "lost": lost,
        "at random": random,
        "beyond": lost - random,
    }
    row: Row = {key: float(column.mean()) for key, column in columns.items()}
    row |= {"empty": sum(one.empty[name] for one in judged), "prompts": len(objects)}
    if len(objects) > 1:
        bootstrap = Bootstrap(cluster_index(groups, len(objects)), resamples, 0.95, seed)
        told = ("share", "hits", "beyond")
        ends = bootstrap.intervals([(weighted_mean, columns[key].numpy(), None) for key in told])
        for key, end in zip(told, ends, strict=True):
            row |= {f"{key} low": end.low, f"{key} high": end.high}
    return row
