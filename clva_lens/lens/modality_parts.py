"""What attention puts out, divided by modality: Eq. 12 of arXiv:2603.25088v1, layer by layer.

O = O_P + O_V: what a row takes from system and text tokens, and what it takes from the image.
Exact: from the row of the pattern that the product reads, and the values; no other row is formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.row_reading import stack_layers
from clva_lens.engine.run import running
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import InterventionError
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.observers import chosen_layers
from clva_lens.lens.trace import last_logits
from clva_lens.methods.base import MethodLike
from clva_lens.methods.target import Shape, shape_of
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, as_prompt
from clva_lens.models.step import Step


@dataclass(frozen=True, eq=False, repr=False)
class ModalityParts:
    """What each head puts out at the last row of the prompt, by where it comes from.

    Eq. 12, arXiv:2603.25088v1: ``visual`` is O_V, ``linguistic`` is O_P, the sum of ``system`` and
    ``text``; ``output`` is O as the kernel put it out, and the sum of the parts but for rounding.
    Before the output projection, in the units of the values; before anything that a method puts in
    the place of a head's output. In a Q-Former, whose queries have no last one, all are means over
    the queries, and ``system`` is the CLS token's.

    ``layers`` are 0-based. With ``batched`` there is a batch axis first. Where heads of some layers
    are narrower than others, the axis width ends in zeros there.
    """

    visual: Float[Tensor, "*batch layer head width"]
    system: Float[Tensor, "*batch layer head width"]
    text: Float[Tensor, "*batch layer head width"]
    output: Float[Tensor, "*batch layer head width"]
    layers: tuple[int, ...]
    batched: bool
    site: str = "decoder"

    @property
    def linguistic(self) -> Float[Tensor, "*batch layer head width"]:
        """O_P: what comes from system and text tokens."""
        return self.system + self.text

    @property
    def visual_norm(self) -> Float[Tensor, "*batch layer"]:
        """The length of O_V, over all heads of a layer."""
        return self.visual.flatten(-2).norm(dim=-1)

    @property
    def linguistic_norm(self) -> Float[Tensor, "*batch layer"]:
        """The length of O_P, over all heads of a layer."""
        return self.linguistic.flatten(-2).norm(dim=-1)

    @property
    def visual_share(self) -> Float[Tensor, "*batch layer"]:
        """The share of O that is O_V: its projection onto O over the length of O.

        With that of O_P it sums to 1. It is below 0 or above 1 where the two point against each
        other, which lengths do not tell; nan where O is 0.
        """
        whole, visual = self.output.flatten(-2), self.visual.flatten(-2)
        return (visual * whole).sum(dim=-1) / (whole * whole).sum(dim=-1)

    def __repr__(self) -> str:
        """Return the size, and the visual share of the first and the last layer."""
        mean = self.visual_share.reshape(-1, len(self.layers)).mean(dim=0)
        samples = f"{len(self.output)} samples × " if self.batched else ""
        return (
            f"ModalityParts({self.site}: {samples}{len(self.layers)} layers × "
            f"{self.output.shape[-2]} heads; visual share of the output {float(mean[0]):.2f} in "
            f"layer {self.layers[0]}, {float(mean[-1]):.2f} in layer {self.layers[-1]})"
        )


@undisturbed()
def modality_parts(
    model: Any,
    prompt: Asked,
    method: MethodLike | None = None,
    *,
    layers: Sequence[int] | str = "all",
    site: str | None = None,
) -> ModalityParts:
    """Return what attention puts out at the last row, as a visual and a linguistic part (Eq. 12).

    One forward pass under ``method``, through whichever kernel the model has; only the last row of
    a layer's pattern is formed. ``site`` is "decoder" or, in a model with a Q-Former, "qformer";
    None is the family's own.

    ``model``: what ``cl.load`` returned, or a transformers model; ``prompt``: what is asked;
    ``layers``: 0-based, or "all".

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if the site or a layer does not exist, or the method does not fit.
        InterventionError: inside a trace.

    >>> parts = cl.modality_parts(model, prompt)
    >>> parts.visual_share.shape
    torch.Size([12])
    """
    refuse_in_trace("modality_parts", "")
    found, prompt = transformers_model(model), as_prompt(model, prompt, continued=True)
    session = _Dividing(layers, shape_of(found, site))
    with intervening(model, method), running(found, [session]):
        last_logits(found, prompt)
    return session.parts(prompt.batched)


class _Dividing(Session):
    """Edits nothing; divides what the chosen layers put out at the prompt's last row."""

    edits_output = True
    leaves_prefix = True

    def __init__(self, layers: Sequence[int] | str, shape: Shape) -> None:
        """Choose the layers: "all", or 0-based indices.

        Raises:
            ParameterError: if a layer does not exist.
        """
        self.layers, self.site = chosen_layers(layers, shape), shape.site
        self._found: dict[int, Float[Tensor, "batch part head width"]] = {}

    @torch.no_grad()
    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Divide one layer's output."""
        if call.step.number or call.layer not in self.layers:
            return
        assert call.value is not None and call.z is not None
        step = call.step
        counts = _counts(step, call.query.shape[2]).to(call.query.device)
        place = counts.any(dim=0).nonzero()
        row = sum(
            torch.einsum("bq,bhqk->bhk", counts[:, start:stop], call.rows(start, stop).double())
            for start, stop in call.row_pieces(int(place.min()), int(place.max()) + 1)
        )
        assert isinstance(row, Tensor)
        spans, keys = step.spans, step.keys
        groups = call.value.shape[1]
        rows = rearrange(row[..., :keys], "b (g r) k -> b g r k", g=groups)
        value = call.value[:, :, :keys].double()
        parts = [
            rearrange((rows * rearrange(span, "b k -> b 1 1 k")) @ value, "b g r d -> b (g r) d")
            for span in (spans.image, spans.system, spans.text)
        ]
        whole = torch.einsum("bq,bqhd->bhd", counts, call.z.double())
        self._found[call.layer] = torch.stack([*parts, whole], dim=1)

    def parts(self, batched: bool) -> ModalityParts:
        """Return what was found, in float64.

        Raises:
            InterventionError: if no prompt was read.
        """
        if set(self._found) != set(self.layers):
            raise InterventionError(
                "the parts are not known: the model has not read a prompt's last row."
            )
        found = [self._found[layer] for layer in self.layers]
        width = max(one.shape[-1] for one in found)
        whole = [torch.nn.functional.pad(one, (0, width - one.shape[-1])) for one in found]
        stacked = stack_layers(whole, dim=2)
        parts = (stacked if batched else stacked[0]).unbind(dim=-4)
        return ModalityParts(*parts, layers=self.layers, batched=batched, site=self.site)


def _counts(step: Step, count: int) -> Float[Tensor, "batch query"]:
    """Return what each row of this pass counts: 1 the last one, or all the same where unordered."""
    rows = step.text_rows
    if step.ordered:
        position = torch.arange(rows.shape[1], device=rows.device)
        rows = position == rearrange(step.last_text, "b -> b 1")
    counts = rows.double() / rows.sum(dim=1, keepdim=True)
    return counts[:, step.offset : step.offset + count]
