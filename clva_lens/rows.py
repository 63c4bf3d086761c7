"""What is read from attention rows, reduced while they are formed: masses and visual maps.

Both the lens (trace.py) and the methods read attention through these two functions, so that what
is shown is what is acted on. Only a few rows of one layer's pattern exist at a time.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from clva_lens.attention import AttentionCall


class PromptRows(NamedTuple):
    """What one layer's heads look at from the prompt's text rows, in fractions of attention mass.

    ``image``, ``system``, ``text`` are means over the text rows and sum to 1; ``image`` is Eq. 1.
    ``last`` is the last text row's attention to each image token: A(−1, j) of Eq. 4.
    """

    image: Float[Tensor, "batch head"]
    system: Float[Tensor, "batch head"]
    text: Float[Tensor, "batch head"]
    last: Float[Tensor, "batch head visual"]


@torch.no_grad()
def read_prompt_rows(call: AttentionCall) -> PromptRows:
    """Return masses and the last row's map of one layer; the pass must hold the whole prompt."""
    step = call.step
    length = step.prompt_length
    is_text = step.spans.text[:, :length]
    last_position = step.last_text
    columns = [span[:, :length].float() for span in (step.spans.image, step.spans.system)]
    where = torch.stack([*columns, is_text.float()], dim=1)
    batch, heads = call.query.shape[:2]
    mass = torch.zeros(batch, heads, 3, device=call.query.device)
    last = torch.zeros(batch, heads, step.visual.shape[1], device=call.query.device)
    for start, stop in call.row_pieces(step.first_text, length):
        pattern = call.rows(start, stop)[..., :length]
        counted = is_text[:, start:stop].float()
        mass += torch.einsum("bhqk,bsk,bq->bhs", pattern, where, counted)
        here = (last_position >= start) & (last_position < stop)
        row = (last_position - start).clamp(0, stop - start - 1)
        found = torch.take_along_dim(pattern, rearrange(row, "b -> b 1 1 1"), dim=2)
        found = torch.take_along_dim(found[:, :, 0], rearrange(step.visual, "b v -> b 1 v"), dim=2)
        last = torch.where(rearrange(here, "b -> b 1 1"), found, last)
    mass = mass / rearrange(is_text.sum(dim=1), "b -> b 1 1")
    image, system, text = mass.unbind(dim=2)
    return PromptRows(image, system, text, last)


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
