"""What is read from attention rows, reduced while they are formed: masses and visual maps.

Both the lens (lens/observers.py) and the methods read attention through these two functions, so
that what is shown is what is acted on. Only a few rows of one layer's pattern exist at a time,
unless gradients are recorded.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.bias import at
from clva_lens.engine.session import AttentionCall
from clva_lens.models.step import Step


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


def read_prompt_rows(call: AttentionCall) -> PromptRows:
    """Return masses and the map of one layer; the pass must hold all text rows of the prompt."""
    step, offset = call.step, call.step.offset
    known = step.of_prompt[step.text_rows.device]
    if known.means is None:
        known.means = _means(step)
    weights, where = known.means
    means = [
        weights[..., offset + start : offset + stop] @ call.rows(start, stop)[..., : step.keys]
        for start, stop in call.row_pieces(
            max(0, step.first_text - offset), step.prompt_rows - offset
        )
    ]
    mean, last = sum(means[1:], means[0]).unbind(dim=2)
    image, system, text = (mean @ where).unbind(dim=2)
    return PromptRows(image, system, text, step.on_image(last))


def _means(step: Step) -> tuple[Float[Tensor, "batch 1 2 row"], Float[Tensor, "batch key 3"]]:
    """Return the weights of rows in two means, of all text rows and the last; and the spans.

    Where rows are unordered queries, both means are over all of them.
    """
    spans, every = step.spans, step.text_rows
    position = torch.arange(step.prompt_rows, device=every.device)
    last = position == step.last_text[:, None]
    rows = torch.stack([every, last if step.ordered else every], dim=1).float()
    weights = (rows / rows.sum(dim=2, keepdim=True))[:, None]
    return weights, torch.stack([spans.image, spans.system, spans.text], dim=2).float()


def read_text_rows(call: AttentionCall) -> Float[Tensor, "batch head row visual"]:
    """Return each row's attention to each image token, from the first text row of any sample on.

    The pass must hold all text rows of the prompt.
    """
    step = call.step
    maps = [
        step.on_image(call.rows(start, stop))
        for start, stop in call.row_pieces(
            max(0, step.first_text - step.offset), step.prompt_rows - step.offset
        )
    ]
    return torch.cat(maps, dim=2)


def read_query_rows(call: AttentionCall) -> Float[Tensor, "batch query visual"]:
    """Return each prompt row's attention to each image token, averaged over the heads."""
    maps = [
        call.step.on_image(call.rows(start, stop).mean(dim=1))
        for start, stop in call.row_pieces(0, call.step.prompt_rows)
    ]
    return torch.cat(maps, dim=1)


def read_generated_rows(call: AttentionCall) -> Float[Tensor, "batch head row visual"]:
    """Return each generated row's attention to each image token, in fractions of attention mass.

    The pass must hold a generated row.
    """
    count = call.query.shape[2]
    new = 1 if count == 1 else call.new_rows
    if new == 1:
        return call.step.on_image(call.rows(count - 1, count))
    maps = [
        call.step.on_image(call.rows(start, stop))
        for start, stop in call.row_pieces(count - new, count)
    ]
    return torch.cat(maps, dim=2)


def read_received(call: AttentionCall) -> Float[Tensor, "batch visual"]:
    """Return the attention that each image token receives from the other image tokens.

    The sum over their rows, averaged over the heads; the pass must hold the prompt, and the image
    tokens must be rows of it too.
    """
    spans, visual = call.step.spans, call.step.visual
    first, end = call.step.block or (int(visual.min()), int(visual.max()) + 1)
    received = torch.zeros(spans.image.shape, dtype=torch.float32, device=call.query.device)
    key = torch.arange(call.step.keys, device=received.device)
    for start, stop in call.row_pieces(first, end):
        pattern = call.rows(start, stop)[..., : call.step.keys].mean(dim=1)
        others = rearrange(spans.image[:, start:stop], "b q -> b q 1") & (
            key[None] != key[start:stop, None]
        )
        received += pattern.where(others, 0.0).sum(dim=1)
    return call.step.on_image(received)


def stack_layers(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return what was read in several layers as one tensor, on the device of the first of them."""
    return torch.stack([at(part, parts[0].device) for part in parts], dim=dim)
