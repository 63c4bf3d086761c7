"""What each part of a pass adds to some tokens' logits, read while the pass runs.

The last row of the prompt only: of the pattern, of what the heads put out, and of the residual
stream. Of each layer, products with the tokens' directions are kept, and no activation.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Stream, StreamCall
from clva_lens.ground.errors import InterventionError
from clva_lens.models.readout import CacheModel, normalise, plain_weight
from clva_lens.models.step import Step


class LogitParts(Session):
    """Edits nothing; keeps what each part of the prompt's pass adds to the logits of some tokens.

    Nothing is divided by the final norm's scale yet, which the pass has last.
    """

    site = "decoder"
    edits_output = True
    edits_logits = True

    def __init__(self, standing: CacheModel, groups: list[list[int]]) -> None:
        """Take the weights, and the ids of one or two tokens in each of their spellings."""
        self.groups = groups
        self.blocks, self.norm = standing.blocks, standing.ln_final
        depth = len(self.blocks)
        self.layers = tuple(range(depth))
        self.streams = {("resid_pre", 0)}
        self.streams |= {(part, i) for i in self.layers for part in ("mlp_out", "resid_post")}
        self.ids = torch.tensor([one for group in groups for one in group])
        plain = standing.W_U.T[self.ids].double()
        norm: Any = self.norm
        weight = plain_weight(norm).detach().to(plain)  # the head may be on another device
        directions = plain * weight
        self.constant = standing.b_U[self.ids].double()
        if isinstance(norm, nn.LayerNorm):
            self.constant = self.constant + plain @ norm.bias.detach().to(plain)
            directions = directions - directions.mean(dim=1, keepdim=True)
        self.directions: Float[Tensor, "token width"] = directions
        self.step: Step | None = None
        self._scores: Float[Tensor, "batch token"] | None = None
        self._scale: Float[Tensor, " batch"] | None = None
        self._stream: dict[tuple[str, int], Float[Tensor, "batch token"]] = {}
        self._heads: dict[int, Float[Tensor, "batch head token"]] = {}
        self._image: dict[int, Float[Tensor, "batch head visual token"]] = {}
        self._elsewhere: dict[int, Float[Tensor, "batch head token"]] = {}

    @torch.no_grad()
    def stream(self, call: StreamCall, hidden: Stream) -> None:
        """Read the last row of what enters the first layer, of an MLP's output or of a layer's."""
        if call.step.number:
            return
        if call.part == "resid_pre":
            self._begin(call.step)
        row = _at(hidden, call.step.last_text)
        self._stream[call.part, call.layer] = row.double() @ self.directions.T.to(row.device)
        if (call.part, call.layer) == ("resid_post", self.layers[-1]):
            self._scale = normalise(self.norm, row, "scale")[:, 0].double()

    @torch.no_grad()
    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Divide what a layer's heads put out at the last row among its keys."""
        if call.step.number:
            return
        assert call.value is not None and call.z is not None
        last = call.step.last_text
        first = int(last.min())
        pattern = _at(call.rows(first, int(last.max()) + 1).transpose(1, 2), last - first)
        weight = self.blocks[call.layer].attn.W_O.double()
        asked = torch.einsum("hdm,tm->thd", weight, self.directions.to(weight.device))
        z = _at(out, last)
        heads = torch.einsum("bhd,thd->bht", z.double(), asked)
        groups = call.value.shape[1]
        by_group = rearrange(asked, "t (g r) d -> t g r d", g=groups)
        rows = rearrange(pattern.double(), "b (g r) k -> b g r k", g=groups)
        parts = torch.einsum("bgkd,tgrd->bgrkt", call.value.double(), by_group) * rows[..., None]
        parts = rearrange(parts, "b g r k t -> b (g r) k t")
        visual = rearrange(call.step.visual, "b v -> b 1 v 1")
        image = torch.take_along_dim(parts, visual, dim=2)
        elsewhere = parts.sum(dim=2) - image.sum(dim=2)
        replaced = rearrange((z != _at(call.z, last)).any(dim=-1), "b h -> b h 1")
        self._heads[call.layer] = heads
        self._image[call.layer] = image.masked_fill(replaced[..., None], 0.0)
        self._elsewhere[call.layer] = torch.where(replaced, heads, elsewhere)

    @torch.no_grad()
    def logits(self, step: Step, logits: Float[Tensor, "batch vocabulary"]) -> None:
        """Keep the logits of the tokens as the model has them."""
        if step.number == 0:
            self._scores = logits[:, self.ids.to(logits.device)].double()

    def _begin(self, step: Step) -> None:
        if not bool((step.last_text == step.prompt_rows - 1).all()):
            raise InterventionError(
                "the prompt is padded on the right, so the last row's logits are of padding. Pad "
                "on the left, as model.prompt does."
            )
        self.step, self._scores = step, None

    @torch.no_grad()
    def parts(self) -> dict[str, Float[Tensor, "batch *axes"]]:
        """Return the parts of the logits' difference, each token in its likeliest spelling.

        Under the names of ``LogitAttribution``'s fields, in float64.

        Raises:
            InterventionError: if no prompt was read yet.
        """
        scores, scale = self._scores, self._scale
        if scores is None or scale is None:
            raise InterventionError(
                "the attribution is not known yet: the model has not read a prompt. Read it after "
                "the block that runs the model."
            )
        taken, device = _signs(scores, self.groups), scores.device

        def pick(parts: Tensor) -> Float[Tensor, "batch *axes"]:
            return torch.einsum("b...t,bt->b...", parts.to(device), taken)

        def by_layer(parts: list[Tensor]) -> Float[Tensor, "batch layer *axes"]:
            made = torch.stack([pick(one) for one in parts], dim=1)
            return made / scale.to(device).reshape(-1, *[1] * (made.ndim - 1))

        heads, mlps = [self._heads[i] for i in self.layers], []
        edits, biases, before = [], [], self._stream["resid_pre", 0]
        for i in self.layers:
            mlp, after = self._stream["mlp_out", i].to(device), self._stream["resid_post", i]
            bias = self.directions.to(device) @ self.blocks[i].attn.b_O.double().to(device)
            written = heads[i].sum(dim=1).to(device) + mlp + bias
            edits.append(after.to(device) - before.to(device) - written)
            biases.append(bias.expand_as(mlp))
            mlps.append(mlp)
            before = after

        constant = pick(self.constant.to(device).expand_as(scores))
        return {
            "embedding": by_layer([self._stream["resid_pre", 0]])[:, 0],
            "heads": by_layer(heads),
            "mlps": by_layer(mlps),
            "edits": by_layer(edits),
            "bias": constant + by_layer(biases).sum(dim=1),
            "image": by_layer([self._image[i] for i in self.layers]),
            "elsewhere": by_layer([self._elsewhere[i] for i in self.layers]),
            "difference": pick(scores),
        }


def _at(
    values: Float[Tensor, "batch row *axes"], rows: Int[Tensor, " batch"]
) -> Float[Tensor, "batch *axes"]:
    """Return one row of each sample."""
    return values[torch.arange(len(rows), device=values.device), rows.to(values.device)]


def _signs(
    scores: Float[Tensor, "batch token"], groups: list[list[int]]
) -> Float[Tensor, "batch token"]:
    """Return 1 at the likeliest spelling of the first token, −1 at that of the second, else 0."""
    made, start = torch.zeros_like(scores), 0
    for sign, group in zip((1.0, -1.0), groups, strict=False):
        best = scores[:, start : start + len(group)].argmax(dim=1) + start
        made[torch.arange(len(scores), device=scores.device), best] = sign
        start += len(group)
    return made
