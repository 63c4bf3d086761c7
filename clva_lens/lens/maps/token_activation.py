"""Token activation maps (TAM): which image tokens would say the answer's word, less what words do.

Li et al., arXiv:2506.23270, as released. With h_j the last layer's state at position j after the
final norm, W_c the unembedding of the token c that is explained, and t the words of the question
that are other tokens than c (id t, at position t; the row that writes the answer left out),

    m_i = (W_c · h_i)⁺          image tokens i            s_t = (W_c · h_t)⁺
    I_i = Σ_t s_t / Σ s · (W_t · h_i)⁺                    what those words activate
    m  ← (m − b I)⁺,  b = ⟨m, I⟩ / ⟨I, I⟩                  their part is taken out
    m  ← (m − least) / (most − least)                     of all m and s together
    m  ← a rank filter of 3 × 3: Σ_k w_k v_k / Σ_k w_k, w_k = exp(−k² / 2c²), k = −4 … 4

v being a window's values in order, c their standard deviation over their mean, edges mirrored. From
0 to 1, without a unit. One pass; the answer's first token is explained.

**Departs from the release:** a window of equal values, which it divides 0 by 0 for, stays as it is;
where the image tokens lie on no single grid (tiles, queries), nothing is filtered. b is the
release's least squares in closed form.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from clva_lens.engine.session import Session
from clva_lens.engine.stream import Part, Stream, StreamCall
from clva_lens.lens.maps.base import MapFormula, Reading, register_map
from clva_lens.models.norms import plain_weight
from clva_lens.models.readout import final_state
from clva_lens.models.step import Step


@register_map
@dataclass(frozen=True, kw_only=True)
class TokenActivation(MapFormula):
    """Token activation maps.

    Args:
        filtered: whether the rank filter is applied.
    """

    name: ClassVar[str] = "token-activation"
    paper: ClassVar[str] = "arXiv:2506.23270"
    filtered: bool = True

    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map, from one pass."""
        last = _LastStates(reading.shape.depth - 1)
        reading.run(last)
        readout, step = reading.readout, last.step
        states = final_state(readout, last.hidden)
        words = plain_weight(readout.unembed).detach()
        ids = reading.inputs["input_ids"].to(states.device)
        text = step.text_rows.clone()
        text[torch.arange(len(text)), step.last_text] = False
        maps = [
            activation(state[places], state[own], words[row[own]], words[token], row[own] != token)
            for state, places, own, row, token in zip(
                states, step.visual, text, ids, reading.word_ids(), strict=True
            )
        ]
        made = torch.stack(maps)
        grid = reading.prompt.tokens_at("decoder").grid
        if not self.filtered or isinstance(grid, str):
            return made
        return ranked(made.unflatten(-1, grid)).flatten(-2)


class _LastStates(Session):
    """Keeps what leaves the last layer."""

    site = "decoder"
    step: Step
    hidden: Stream

    def __init__(self, layer: int) -> None:
        self.streams: tuple[tuple[Part, int], ...] = (("resid_post", layer),)

    def stream(self, call: StreamCall, hidden: Stream) -> None:
        self.step, self.hidden = call.step.to(hidden.device), hidden


def activation(
    image: Float[Tensor, "visual width"],
    text: Float[Tensor, "word width"],
    own: Float[Tensor, "word width"],
    wanted: Float[Tensor, " width"],
    others: Tensor,
) -> Float[Tensor, " visual"]:
    """Return m before the filter; ``own`` are the words' unembeddings, ``wanted`` the token's.

    ``others`` says which words are other tokens than the one that is explained.
    """
    image, text, own, wanted = (one.float() for one in (image, text, own, wanted))
    found, said = (image @ wanted).clamp(min=0), (text @ wanted).clamp(min=0)
    weights = said.where(others.to(said.device), 0.0)
    if float(weights.sum()) > 0:
        between = (image @ own.T).clamp(min=0) @ (weights / weights.sum())
        square = between.square().sum()
        if float(square) > 0:
            found = (found - (found @ between) / square * between).clamp(min=0)
    both = torch.cat([found, said])
    least, most = both.min(), both.max()
    return (found - least) / (most - least) if float(most) > float(least) else found


def ranked(maps: Float[Tensor, "batch row column"]) -> Float[Tensor, "batch row column"]:
    """Return the maps through the rank filter."""
    padded = functional.pad(maps[:, None], (1, 1, 1, 1), mode="reflect")
    windows = rearrange(functional.unfold(padded, 3), "b k (r c) -> b r c k", r=maps.shape[1]).sort(
        dim=-1
    )
    values = windows.values
    mean, spread = values.mean(dim=-1, keepdim=True), values.std(dim=-1, correction=0, keepdim=True)
    rank: Int[Tensor, " nine"] = torch.arange(-4, 5, device=maps.device)
    width = spread / mean.where(mean > 0, 1.0)
    weights = torch.exp(-rank.square() / (2 * width.square()).clamp(min=1e-12))
    return (weights * values).sum(dim=-1) / weights.sum(dim=-1)
