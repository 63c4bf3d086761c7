"""Text-centric heads of a model, for ASCD: those that lead on most reference prompts.

Of each prompt, every head of the language model has the ratio of its text rows' attention to text
over that to the image; the ``count`` heads with the largest lead on that prompt. The heads that
lead on most prompts are text-centric. ASCD (arXiv:2506.14766) takes 32 of 1024, of 500 pictures.

**Departs from it**: the script that finds them was not published, and the paper could not be read
whole. The rule is as others tell it; that rows and keys are those after the image, without the
system prompt, is ours, as is that of equally many votes the larger mean share of text decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import check_arguments, check_several
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.intervene import refuse_in_trace
from clva_lens.lens.trace import trace_attention
from clva_lens.methods.ascd import ONE_OF
from clva_lens.models.prompt import Asked
from clva_lens.science.heads import HeadPairs


@dataclass(frozen=True, eq=False, repr=False)
class TextCentricHeads:
    """Heads that look at text for what they look at the image; made by ``text_centric_heads``.

    ``heads`` are (layer, head), most votes first, as ``ASCD(heads=...)`` takes them; a run's record
    lists them with ASCD's parameters. ``votes`` says on how many of ``prompts`` each head of
    ``layers`` (0-based) led. ``agreement`` is the share of heads that the prompts at even and at
    odd places elect alike, None of a single one; of heads at random it would be ``chance``.
    """

    heads: HeadPairs
    votes: Int[Tensor, "layer head"]
    layers: tuple[int, ...]
    prompts: int
    agreement: float | None

    @property
    def chance(self) -> float:
        """The share that two random sets of as many heads have in common, on average."""
        return len(self.heads) / self.votes.numel()

    def __repr__(self) -> str:
        """Return how many there are, and how surely."""
        layers, heads = self.votes.shape
        least = int(self.votes.flatten().sort(descending=True).values[len(self.heads) - 1])
        halves = "" if self.agreement is None else f"; halves agree in {self.agreement:.0%}"
        return (
            f"TextCentricHeads({len(self.heads)} of {layers} × {heads}, each leads on {least} or "
            f"more of {self.prompts} prompts{halves}, chance {self.chance:.0%})"
        )


def text_centric_heads(
    model: Any,
    prompts: Sequence[Asked],
    *,
    count: int | None = None,
    progress: bool = True,
) -> TextCentricHeads:
    """Return the heads that most often look at text for what they look at the image, for ``ASCD``.

    Each prompt (which may be a batch) is read once, under the methods that are open; no pattern is
    kept. Where two halves of the prompts hardly agree more than by chance, these are no property of
    the model; nor does agreement alone make one, since random weights have their own: ask an
    untrained model too.

    Args:
        model: what ``cl.load`` returned, or a transformers model.
        prompts: reference prompts, such as 500 pictures with the question that is to be asked.
        count: how many heads are found, and lead on each prompt. None: one of 32, as in the paper.
        progress: whether a progress bar is shown.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if there is no prompt, or there are fewer heads than ``count``.
        InterventionError: inside a trace.

    >>> found = cl.text_centric_heads(model, [prompt, (image, "is there a car in the image?")])
    >>> found
    TextCentricHeads(3 of 12 × 8, each leads on ... of 2 prompts; halves agree in ..., chance 3%)
    >>> cl.generate(model, prompt, cl.ASCD(heads=found.heads)).texts
    ['no']
    """
    refuse_in_trace("text_centric_heads", "")
    check_arguments(text_centric_heads, count=count, progress=progress)
    check_several("prompts", prompts, "prompts")
    if not prompts:
        raise ParameterError("there is no prompt. Pass prompts of several pictures.")
    shares, layers = [], ()
    with progress_bar("prompts", len(prompts), wanted=progress and len(prompts) > 1) as advance:
        for asked in prompts:
            trace = trace_attention(model, asked, site="decoder")
            share = text_share(trace.text.double(), trace.intensity.double()).cpu()
            shares.append(share if trace.batched else share[None])
            layers = trace.layers
            advance(1)
    share = torch.cat(shares)
    size = share[0].numel()
    count = max(1, round(size / ONE_OF)) if count is None else count
    if not 1 <= count <= size:
        raise ParameterError(
            f"count must be from 1 to {size}, the number of heads, but is {count}. Pass count=None "
            f"for one of {ONE_OF}."
        )
    led = leaders(share, count)
    found = elected(led, share, count)
    agreement = None
    if len(share) > 1:
        even, odd = (elected(led[half::2], share[half::2], count) for half in (0, 1))
        agreement = len(set(even) & set(odd)) / count
    heads = tuple((layers[row], head) for row, head in found)
    return TextCentricHeads(heads, led.sum(dim=0), layers, len(share), agreement)


def text_share(
    text: Float[Tensor, "*prompt layer head"], image: Float[Tensor, "*prompt layer head"]
) -> Float[Tensor, "*prompt layer head"]:
    """Return text / (text + image), which orders heads as text / image does; 0 where both are 0."""
    return text / (text + image).clamp_min(torch.finfo(image.dtype).tiny)


def leaders(
    share: Float[Tensor, "prompt layer head"], count: int
) -> Bool[Tensor, "prompt layer head"]:
    """Return the ``count`` heads of each prompt, over all layers, with the largest shares."""
    flat = share.flatten(1)
    best = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    led = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True)
    return led.reshape(share.shape)


def elected(
    led: Bool[Tensor, "prompt layer head"], share: Float[Tensor, "prompt layer head"], count: int
) -> HeadPairs:
    """Return rows and heads that lead most often; of equal votes, the larger mean share decides."""
    votes, mean = led.sum(dim=0).flatten(), share.mean(dim=0).flatten()
    heads = share.shape[-1]
    # A share is at most 1, so twice the votes are never outweighed by it.
    order = (2 * votes + mean).argsort(descending=True, stable=True)[:count].tolist()
    return tuple(divmod(one, heads) for one in order)
