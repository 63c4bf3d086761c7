"""One prompt looked at from all sides: attention, anchors and answers, without and with CLVA."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.figures import SaliencyPicture
from clva_lens.figures.base import evenly
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.decoding import Greedy
from clva_lens.lens.generate import generate
from clva_lens.lens.intervene import intervening
from clva_lens.lens.load import LensModel
from clva_lens.lens.trace import composed_saliency, trace_attention
from clva_lens.methods.base import Method
from clva_lens.methods.clva import CLVA
from clva_lens.methods.knockout import KnockOut
from clva_lens.models.prompt import Asked, Prompt, as_prompt
from clva_lens.science.anchors import VisualAnchors

SHOWN_LAYERS = 7


class Look(NamedTuple):
    """One prompt's attention without a method and under ``clva``, and what that anchored on.

    ``composed``: where on the picture the language model looks through a Q-Former, without and
    with CLVA; None in models whose language model looks at the picture itself.
    """

    prompt: Prompt
    plain: AttentionTrace
    edited: AttentionTrace
    anchors: VisualAnchors
    composed: tuple[Float[Tensor, "layer visual"], Float[Tensor, "layer visual"]] | None
    clva: CLVA


def conditions(model: LensModel, clva: CLVA | None = None) -> dict[str, Method | None]:
    """Return what a model is compared under: greedy, CLVA at each of its sites, the knock-out."""
    clva = CLVA() if clva is None else clva
    others = {
        f"CLVA, {site.name}": replace(clva, site=site.name)
        for site in model.sites[1:]
        if clva.site is None
    }
    return {"greedy": None, "CLVA": clva, **others, "knock-out": KnockOut()}


def look_at(model: LensModel, prompt: Asked, clva: CLVA | None = None) -> Look:
    """Return the attention of a single prompt, from one forward pass without and one with CLVA."""
    clva = CLVA() if clva is None else clva
    prompt = as_prompt(model, prompt)
    plain = trace_attention(model, prompt)
    with intervening(model, clva) as run:
        edited = trace_attention(model, prompt)
    composed = None
    if plain.site != "decoder":
        composed = composed_saliency(model, prompt), composed_saliency(model, prompt, clva)
    return Look(prompt, plain, edited, run.anchors, composed, clva)


def shown_layers(layers: Sequence[int]) -> list[int]:
    """Return up to seven layers, from the first to the last, evenly spaced."""
    return [layers[place] for place in evenly(len(layers), SHOWN_LAYERS)]


def saliency_picture(
    model: LensModel, look: Look, *, label: str = "", objects: Any = None
) -> SaliencyPicture:
    """Return a picture with its maps (all heads) before and after CLVA, and all answers."""
    prompt, layers = look.prompt, look.plain.layers
    rows = [layers.index(layer) for layer in shown_layers(layers)]
    before, after = (
        prompt.on_grid(trace.saliency("all")[rows]).float().cpu().numpy()
        for trace in (look.plain, look.edited)
    )
    answers = {}
    for name, method in conditions(model, look.clva).items():
        made = generate(model, prompt, method, Greedy(max_new_tokens=24))
        answers[name] = (made.texts[0], made.margins[0])
    return SaliencyPicture(
        image=drawn_over(model, look),
        before=before,
        after=after,
        question=prompt.questions[0] if prompt.questions else "",
        label=label,
        answers=answers,
        positive=prompt.on_grid(look.anchors.positive).cpu().numpy(),
        negative=prompt.on_grid(look.anchors.negative).cpu().numpy(),
        objects=objects,
    )


def drawn_over(model: LensModel, look: Look) -> np.ndarray:
    """Return what lies under the maps: what the tower got, or the photo where that is in pieces."""
    prompt = look.prompt
    if model.family.picture_size(model.hf_model) is not None or not prompt.photos:
        return seen_pixels(model, prompt["pixel_values"])
    piece = prompt.piece_at(look.plain.site)
    return np.asarray(piece.view(prompt.photos[piece.picture])) / 255


def seen_pixels(model: LensModel, pixel_values: torch.Tensor) -> np.ndarray:
    """Return the picture as the vision tower got it (resized and cropped), in [0, 1]."""
    images = model.images
    pixels = pixel_values[0].float().cpu().permute(1, 2, 0).numpy()
    return (pixels * np.array(images.image_std) + np.array(images.image_mean)).clip(0, 1)
