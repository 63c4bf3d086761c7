"""What is read from attention rows, reduced while they are formed: masses and visual maps.

Both the lens (trace.py) and the methods read attention through these two functions, so that what
is shown is what is acted on. Only a few rows of one layer's pattern exist at a time.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from clva_lens.session import AttentionCall


class PromptRows(NamedTuple):
    """What one layer's heads look at from the prompt's text rows, in fractions of attention mass.

    ``image``, ``system``, ``text`` are means over the text rows and sum to 1; ``image`` is Eq. 1.
    ``map`` is the last text row's attention to each image token, A(−1, j) of Eq. 4; the mean over
    the rows where these are unordered queries.
    """

    image: Float[Tensor, "batch head"]
    system: Float[Tensor, "batch head"]
    text: Float[Tensor, "batch head"]
    map: Float[Tensor, "batch head visual"]


@torch.no_grad()
def read_prompt_rows(call: AttentionCall) -> PromptRows:
    """Return masses and the map of one layer; the pass must hold the whole prompt."""
    step = call.step
    spans = step.spans
    where = torch.stack([span.float() for span in (spans.image, spans.system, spans.text)], dim=1)
    batch, heads = call.query.shape[:2]
    mass = torch.zeros(batch, heads, 3, device=call.query.device)
    summary = torch.zeros(batch, heads, step.visual.shape[1], device=call.query.device)
    position = torch.arange(step.prompt_rows, device=call.query.device)
    is_last = position == rearrange(step.last_text, "b -> b 1")
    weight = (is_last if step.ordered else step.text_rows).float()
    for start, stop in call.row_pieces(step.first_text, step.prompt_rows):
        pattern = call.rows(start, stop)[..., : step.keys]
        counted = step.text_rows[:, start:stop].float()
        mass += torch.einsum("bhqk,bsk,bq->bhs", pattern, where, counted)
        summed = torch.einsum("bhqk,bq->bhk", pattern, weight[:, start:stop])
        summary += torch.take_along_dim(summed, rearrange(step.visual, "b v -> b 1 v"), dim=2)
    mass = mass / rearrange(step.text_rows.sum(dim=1), "b -> b 1 1")
    image, system, text = mass.unbind(dim=2)
    return PromptRows(image, system, text, summary / rearrange(weight.sum(dim=1), "b -> b 1 1"))


@torch.no_grad()
def read_query_rows(call: AttentionCall) -> Float[Tensor, "batch query visual"]:
    """Return each prompt row's attention to each image token, averaged over the heads."""
    visual = rearrange(call.step.visual, "b v -> b 1 v")
    maps = [
        torch.take_along_dim(call.rows(start, stop).mean(dim=1), visual, dim=2)
        for start, stop in call.row_pieces(0, call.step.prompt_rows)
    ]
    return torch.cat(maps, dim=1)


@torch.no_grad()
def read_generated_rows(call: AttentionCall) -> Float[Tensor, "batch head row visual"]:
    """Return each generated row's attention to each image token, in fractions of attention mass.

    The pass must hold a generated row.
    """
    count = call.query.shape[2]
    visual = rearrange(call.step.visual, "b v -> b 1 1 v")
    maps = [
        torch.take_along_dim(call.rows(start, stop), visual, dim=3)
        for start, stop in call.row_pieces(count - call.new_rows, count)
    ]
    return torch.cat(maps, dim=2)


@torch.no_grad()
def read_received(call: AttentionCall) -> Float[Tensor, "batch visual"]:
    """Return the attention that each image token receives from the other image tokens.

    The sum over their rows, averaged over the heads; the pass must hold the prompt, and the image
    tokens must be rows of it too.
    """
    spans, visual = call.step.spans, call.step.visual
    received = torch.zeros(spans.image.shape, device=call.query.device)
    key = torch.arange(call.step.keys, device=received.device)
    for start, stop in call.row_pieces(int(visual.min()), int(visual.max()) + 1):
        pattern = call.rows(start, stop)[..., : call.step.keys].mean(dim=1)
        others = rearrange(spans.image[:, start:stop], "b q -> b q 1") & (
            key[None] != key[start:stop, None]
        )
        received += pattern.where(others, 0.0).sum(dim=1)
    return torch.take_along_dim(received, visual, dim=1)
