"""What a sparse autoencoder's features say of a prompt, drawn on its picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.stream import stream_hooks
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn, on_photo
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import check_arguments, is_integer
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.methods.base import MethodLike
from clva_lens.methods.sae import SparseAutoencoder
from clva_lens.models.family import transformers_model
from clva_lens.models.prompt import Asked, Prompt, as_prompt, readable


@dataclass(frozen=True, eq=False, repr=False)
class FeatureReading(SelfDrawn):
    """Features at the positions of a span, [batch, position, feature].

    ``explained`` is the share of the rows' variance that the autoencoder rebuilds (1 − residual /
    total, over all rows; it can be negative, and of rows that are all alike it is not a number),
    ``active`` how many features are above 0 in a row, on average.
    """

    values: Float[Tensor, "batch position feature"]
    places: Int[Tensor, "batch position"]
    explained: float
    active: float
    span: str
    prompt: Prompt

    def top(self, count: int = 5) -> list[tuple[int, float]]:
        """Return the features with the largest mean over all rows, and that mean."""
        mean = self.values.mean(dim=(0, 1))
        order = mean.argsort(descending=True)[:count].tolist()
        return [(int(i), float(mean[i])) for i in order]

    def draw(self, features: Sequence[int] | None = None) -> Any:
        """Return features at the image tokens, drawn on the photo; None are the four largest.

        Raises:
            ParameterError: if this is of a batch, or of another span than the image's, or a feature
                does not exist.
            PromptError: if it is unknown where on the photo the tokens lie.
        """
        if self.span != "image" or len(self.values) > 1:
            raise ParameterError(
                "only features at the image tokens of a single prompt can be drawn on the photo. "
                "Call sae_features(model, prompt, sae, span='image')."
            )
        chosen = [i for i, _ in self.top(4)] if features is None else list(features)
        count = self.values.shape[-1]
        if not chosen or not all(is_integer(i) and 0 <= i < count for i in chosen):
            raise ParameterError(
                f"features are {chosen}, but there are 0 to {count - 1}. Pass some of these."
            )
        maps = self.values[0][:, chosen].T
        titles = [f"feature {i}" for i in chosen]
        return on_photo()(self.prompt, maps, titles=titles, label="feature (its own unit)")

    @property
    def drawable(self) -> bool:
        """Whether it can be drawn on the photo."""
        photo = len(self.values) == 1 and bool(self.prompt.photos)
        return self.span == "image" and photo and self.prompt.sites["decoder"].drawable

    def __repr__(self) -> str:
        """Return how much is rebuilt, and the largest features."""
        largest = ", ".join(f"{i} ({value:.2f})" for i, value in self.top(3))
        rebuilt = f"{self.explained:.1%} of the variance"
        if math.isnan(self.explained):
            rebuilt = "no variance to rebuild"
        return (
            f"FeatureReading({self.span}: {rebuilt}, {self.active:.1f} "
            f"features a row; largest {largest})"
        )


@undisturbed()
def sae_features(
    model: Any,
    prompt: Asked,
    sae: SparseAutoencoder,
    *,
    span: str | Sequence[int] = "image",
    method: MethodLike | None = None,
) -> FeatureReading:
    """Return the features of a sparse autoencoder at a prompt's positions, from one pass.

    Args:
        model: the model that the autoencoder is of.
        prompt: the prompt; one, or a batch.
        sae: the autoencoder; ``SparseAutoencoder.load`` reads SAELens' files.
        span: "image", "text", "system", "last", "all", or positions.
        method: holds in the pass.

    Raises:
        ParameterError: if the span, the layer or the width does not fit, or ``sae`` is none.
        InterventionError: inside a trace.

    >>> from clva_lens.methods.sae import SparseAutoencoder
    >>> eye = torch.eye(128)
    >>> sae = SparseAutoencoder(eye, eye, torch.zeros(128), torch.zeros(128), layer=6)
    >>> cl.sae_features(model, prompt, sae).values.shape
    torch.Size([1, 64, 128])
    """
    refuse_in_trace("sae_features", "")
    check_arguments(sae_features, sae=sae)
    found: Any = transformers_model(model)
    asked = as_prompt(model, prompt)
    sae.compare_model(model)
    with intervening(model, method):
        rows = span_rows_of(found, asked, sae, span)
    if rows.shape[-1] != len(sae.b_dec):
        raise ParameterError(
            f"the autoencoder reads rows of {len(sae.b_dec)}, but layer {sae.layer} has "
            f"{rows.shape[-1]}. Pass one of this model."
        )
    values = sae.encode(rows)
    rebuilt, flat = sae.decode(values), rows.flatten(0, 1).float()
    total = float((flat - flat.mean(dim=0)).square().sum())
    left = float((rows.float() - rebuilt).square().sum())
    return FeatureReading(
        values=values,
        places=asked.spans.places(span),
        explained=1 - left / total if total > 0 else math.nan,
        active=float((values > 0).sum(dim=-1).float().mean()),
        span=span if isinstance(span, str) else ", ".join(map(str, span)),
        prompt=asked,
    )


def span_rows_of(
    model: Any, prompt: Prompt, sae: SparseAutoencoder, span: str | Sequence[int]
) -> Float[Tensor, "batch position width"]:
    """Return the rows of the stream that an autoencoder reads, at a span of a prompt.

    Raises:
        ParameterError: if the layer, its part or the span does not exist.
    """
    kept: list[Tensor] = []
    places = prompt.spans.places(span)

    def keep(part: str, layer: int, value: Tensor) -> None:
        value = value if value.ndim > 2 else value.unflatten(0, (len(places), -1))
        at = places.to(value.device)
        kept.append(value[torch.arange(len(at), device=at.device)[:, None], at].float().cpu())

    hooks = [hook for _, hook in stream_hooks(model, "decoder", [(sae.part, sae.layer)], keep)]
    try:
        with readable(prompt):
            model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return kept[0]
