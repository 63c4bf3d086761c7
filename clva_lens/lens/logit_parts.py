"""What each part of a pass adds to some tokens' logits, read while the pass runs.

The last row of the prompt only: of the pattern, of what the heads put out, and of the residual
stream. Of each layer, products with the tokens' directions are kept, and no activation.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Part, Stream, StreamCall
from clva_lens.ground.errors import InterventionError, ModelLoadError
from clva_lens.models.activations import Readout
from clva_lens.models.norms import norm_form
from clva_lens.models.readout import CacheModel
from clva_lens.models.step import Step


class _Row(NamedTuple):
    """What is needed of one layer's attention until its heads are projected."""

    call: AttentionCall
    pattern: Float[Tensor, "batch head key"]
    put_out: Float[Tensor, "batch head width"]


class LogitParts(Session):
    """Edits nothing; keeps what each part of the prompt's pass adds to the logits of some tokens.

    Nothing is divided by the final norm's scale yet, which the pass has last. A norm that stands
    between a block and the stream is taken with the scale that it has in the pass.
    """

    site = "decoder"
    edits_output = True
    edits_logits = True

    def __init__(self, standing: CacheModel, readout: Readout, groups: list[list[int]]) -> None:
        """Take the weights, and the ids of one or two tokens in each of their spellings.

        Raises:
            ModelLoadError: if the stream is no sum of what heads and MLPs add.
        """
        if readout.unsummed is not None:
            raise ModelLoadError(
                f"the logits of this model are no sum over its heads and MLPs: {readout.unsummed}. "
                "Read single activations with run_with_cache, or what layers say with logit_lens."
            )
        self.groups, self.readout, self.blocks = groups, readout, standing.blocks
        self.written, self.form = readout.written, standing.form
        depth = range(len(self.written))
        self.layers = tuple(i for i in depth if self.written[i].heads is not None)
        self.others = tuple(i for i in depth if i not in self.layers)
        self.depth = tuple(depth)
        places: set[tuple[Part, int]] = {("resid_pre", 0)}
        for i in depth:
            places |= {("mlp_out", i), ("resid_post", i)}
            places.add(("z", i) if i in self.layers else ("attn_out", i))
        self.streams = places
        self.ids = torch.tensor([one for group in groups for one in group])
        plain = standing.W_U.T[self.ids].double() * (readout.final.times / readout.final.over)
        self.constant = standing.b_U[self.ids].double() * (readout.final.times / readout.final.over)
        if self.form.bias is not None:
            self.constant = self.constant + plain @ self.form.bias.to(plain)
        self.directions: Float[Tensor, "token width"] = self.form.back(plain)
        self.after = {
            i: norm_form(one.after) for i, one in enumerate(self.written) if one.after is not None
        }
        self.step: Step | None = None
        self._open: _Row | None = None
        self._scores: Float[Tensor, "batch token"] | None = None
        self._scale: Float[Tensor, " batch"] | None = None
        self._stream: dict[tuple[str, int], Float[Tensor, "batch token"]] = {}
        self._biases: dict[int, Float[Tensor, "batch token"]] = {}
        self._heads: dict[int, Float[Tensor, "batch head token"]] = {}
        self._image: dict[int, Float[Tensor, "batch head visual token"]] = {}
        self._elsewhere: dict[int, Float[Tensor, "batch head token"]] = {}

    @torch.no_grad()
    def stream(self, call: StreamCall, hidden: Stream) -> None:
        """Read the last row of what enters the first layer, or of what is written in a layer."""
        if call.step.number:
            return
        if call.part == "resid_pre":
            self._begin(call.step)
        row = _at(hidden, call.step.last_text)
        if call.part == "z":
            self._project(call.layer, row)
            return
        self._stream[call.part, call.layer] = row.double() @ self.directions.T.to(row.device)
        if (call.part, call.layer) == ("resid_post", self.depth[-1]):
            self._scale = self.form.scale(row)[:, 0].double()

    @torch.no_grad()
    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Keep the last row of a layer's heads, until they are projected."""
        if call.step.number:
            return
        last = call.step.last_text
        first = int(last.min())
        pattern = _at(call.rows(first, int(last.max()) + 1).transpose(1, 2), last - first)
        self._open = _Row(call, pattern, _at(out, last))

    def _project(self, layer: int, row: Float[Tensor, "batch width"]) -> None:
        """Divide what a layer's heads write at the last row among its keys."""
        assert self._open is not None and self._open.call.layer == layer
        (call, pattern, put_out), self._open = self._open, None
        assert call.value is not None and call.z is not None
        weight = self.blocks[layer].attn.W_O.double()
        bias = self.blocks[layer].attn.b_O.double()
        z = rearrange(row, "b (h d) -> b h d", h=len(weight))
        written = torch.einsum("bhd,hdm->bm", z.double(), weight) + bias
        directions, constant = self._before(layer, written)
        asked = torch.einsum("hdm,btm->bthd", weight, directions)
        self._biases[layer] = constant + torch.einsum("btm,m->bt", directions, bias)
        heads = torch.einsum("bhd,bthd->bht", z.double(), asked)
        # Heads may be multiplied by gates before they are projected.
        kept, given = z.double(), put_out.double()
        gates = torch.where(given == 0, 0.0, kept / given.where(given != 0, 1.0))
        gated = asked if torch.equal(z, put_out) else asked * rearrange(gates, "b h d -> b 1 h d")
        groups = call.value.shape[1]
        by_group = rearrange(gated, "b t (g r) d -> b t g r d", g=groups)
        rows = rearrange(pattern.double(), "b (g r) k -> b g r k", g=groups)
        parts = torch.einsum("bgkd,btgrd->bgrkt", call.value.double(), by_group) * rows[..., None]
        parts = rearrange(parts, "b g r k t -> b (g r) k t")
        visual = rearrange(call.step.visual, "b v -> b 1 v 1")
        image = torch.take_along_dim(parts, visual, dim=2)
        elsewhere = parts.sum(dim=2) - image.sum(dim=2)
        own = _at(call.z, call.step.last_text)
        replaced = rearrange((put_out != own).any(dim=-1), "b h -> b h 1")
        self._heads[layer] = heads
        self._image[layer] = image.masked_fill(replaced[..., None], 0.0)
        self._elsewhere[layer] = torch.where(replaced, heads, elsewhere)

    def _before(
        self, layer: int, written: Float[Tensor, "batch width"]
    ) -> tuple[Float[Tensor, "batch token width"], Float[Tensor, "batch token"]]:
        """Return the directions of the tokens before a layer's norm of this, and its constant."""
        directions = self.directions.to(written.device) * self.written[layer].times
        constant = torch.zeros(len(written), len(directions), device=written.device).double()
        after = self.after.get(layer)
        if after is None:
            return directions.expand(len(written), -1, -1), constant
        if after.bias is not None:
            constant = constant + directions @ after.bias.to(directions)
        scale = rearrange(after.scale(written), "b 1 -> b 1 1")
        return after.back(directions) / scale, constant

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
    def parts(self) -> dict[str, Float[Tensor, " batch *axes"]]:
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
        # What a soft cap takes off a token's logit, it takes off every part of it.
        capped = scores / self.readout.final.uncapped(scores)
        taken, device = _signs(scores, self.groups), scores.device
        weighed = taken * capped.where(taken != 0, 0.0)

        def pick(parts: Tensor) -> Float[Tensor, " batch *axes"]:
            return torch.einsum("b...t,bt->b...", parts.to(device), weighed)

        def by_layer(parts: list[Tensor]) -> Float[Tensor, "batch layer *axes"]:
            made = torch.stack([pick(one) for one in parts], dim=1)
            return made / scale.to(device).reshape(-1, *[1] * (made.ndim - 1))

        leaves, sums = self._leaves(), self._sums(device)
        heads = [leaves[i] * self._heads[i] for i in self.layers]
        constant = pick(self.constant.to(device).expand_as(scores))
        return {
            "embedding": by_layer([leaves[0] * self._stream["resid_pre", 0]])[:, 0],
            "heads": by_layer(heads),
            "mixers": by_layer([leaves[i] * sums[i].mixer for i in self.depth]),
            "mlps": by_layer([leaves[i] * sums[i].mlp for i in self.depth]),
            "edits": by_layer([sums[i].edit for i in self.depth]),
            "bias": constant + by_layer([leaves[i] * sums[i].bias for i in self.depth]).sum(dim=1),
            "image": by_layer([leaves[i] * self._image[i] for i in self.layers]),
            "elsewhere": by_layer([leaves[i] * self._elsewhere[i] for i in self.layers]),
            "difference": torch.einsum("bt,bt->b", scores, taken),
        }

    def _leaves(self) -> list[float]:
        """Return, for each layer, what the stream is multiplied by from its end to the last."""
        factors = [one.leaves for one in self.written]
        return [math.prod(factors[i:], start=1.0) for i in range(len(factors) + 1)]

    def _sums(self, device: torch.device) -> list["_Sums"]:
        """Return what each layer adds as a whole; an edit is what is left over."""
        leaves, found = self._leaves(), []
        before = self._stream["resid_pre", 0].to(device)
        for i in self.depth:
            mlp, after = (self._stream[one, i].to(device) for one in ("mlp_out", "resid_post"))
            none = torch.zeros_like(mlp)
            mixer = self._stream["attn_out", i].to(device) if i in self.others else none
            heads = self._heads[i].sum(dim=1).to(device) if i in self.layers else none
            bias = self._biases[i].to(device) if i in self.layers else none
            written = heads + mixer + mlp + bias
            edit = leaves[i + 1] * after - leaves[i] * (before + written)
            found.append(_Sums(mixer, mlp, bias, edit))
            before = after
        return found


class _Sums(NamedTuple):
    """What one layer adds to each token's logit, all of it before the final norm's scale."""

    mixer: Float[Tensor, "batch token"]
    mlp: Float[Tensor, "batch token"]
    bias: Float[Tensor, "batch token"]
    edit: Float[Tensor, "batch token"]


def _at(
    values: Float[Tensor, "batch row *axes"], rows: Int[Tensor, " batch"]
) -> Float[Tensor, " batch *axes"]:
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
