"""The check at the door: is attention where the family says, and does editing it move the model?"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from transformers import PreTrainedModel

from clva_lens.engine.run import running
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import (
    ClvaLensError,
    InterventionError,
    ModelCheckError,
    PromptError,
)
from clva_lens.lens.faults import machine_fault
from clva_lens.lens.observers import Observer
from clva_lens.lens.reading import first_line
from clva_lens.methods.knockout import KnockOut
from clva_lens.methods.target import Target, shape_of
from clva_lens.models.family import ModelFamily, find_family
from clva_lens.models.prompt import Prompt

QUESTIONS = ("What is in the image?", "Is there a cup in the image?")
_Ask = Callable[[np.ndarray, str], Prompt]


def check_model(model: PreTrainedModel, prompt: _Ask, name: str) -> float:
    """Return what ``check_family`` does, after both checks.

    Raises:
        ModelCheckError: naming what does not fit, or what the model's own code raises.
        PromptError: if no prompt can be made.
    """
    try:
        moved = check_family(model, prompt)
        check_asked(model, prompt)
    except ClvaLensError:
        raise
    except Exception as error:  # the model's code may raise anything
        if machine_fault(error) == "memory":
            raise
        raise ModelCheckError(
            f"'{name}' was loaded, but does not run: {first_line(error)} "
            f"({type(error).__name__}). Call it on what its processor makes: if it fails there "
            "too, mend its files or use another version of transformers."
        ) from error
    return moved


@undisturbed()
def check_family(model: PreTrainedModel, prompt: _Ask) -> float:
    """Return how far the logits move when text may not see the image; it must be more than 0.

    Runs a short prompt about a small noise picture. Checks, at every site, that the number of image
    tokens is the family's, that the rows of every layer sum to 1 (within 1e-3), and that removing
    the attention to the image in all layers changes the logits; the smallest change is returned.

    Raises:
        ModelCheckError: naming what does not fit.
    """
    name = model.name_or_path or type(model).__name__
    family = find_family(model)
    _check_duties(name, model, family)
    asked = prompt(_noise(), QUESTIONS[0])
    _check_pixels(name, model, asked)
    return min(_check_site(name, model, family, site.name, asked) for site in family.sites(model))


def _check_duties(name: str, model: PreTrainedModel, family: ModelFamily) -> None:
    """Check that the family can say of this model what it must say of each of its models."""
    duty = "sites"
    try:
        sites = [site.name for site in family.sites(model)]
        for duty in ("image_token_id", "picture_size"):
            getattr(family, duty)(model)
        for duty in ("visual_count", "grid"):
            for site in sites:
                with suppress(PromptError):  # there may be no grid, for a reason
                    getattr(family, duty)(model, site)
    except ClvaLensError:
        raise
    except Exception as error:
        raise ModelCheckError(
            f"{name}: the family '{family.name}' says that it knows {type(model).__name__}, but "
            f"its {duty}() fails on it ({type(error).__name__}: {error}). Write {duty}() for such "
            f"models in {type(family).__name__}, or let its matches() leave them out."
        ) from error


@undisturbed()
def check_asked(model: PreTrainedModel, prompt: _Ask) -> None:
    """Check that question and picture reach the model: two of each give four different logits.

    Four short passes.

    Raises:
        ModelCheckError: naming what does not arrive.
    """
    name = model.name_or_path or type(model).__name__
    noise = _noise()
    pictures = [noise, 255 - noise]
    told = {}
    for number, picture in enumerate(pictures):
        for question in QUESTIONS:
            made = prompt(picture, question)
            told[number, question] = model(**made.inputs).logits[:, -1].float()
    one, two = QUESTIONS
    for what, where, pairs in (
        (
            "questions about one picture",
            "the chat template",
            [((n, one), (n, two)) for n in (0, 1)],
        ),
        (
            "pictures with one question",
            "the image processor",
            [((0, q), (1, q)) for q in QUESTIONS],
        ),
    ):
        if any(torch.equal(told[first], told[second]) for first, second in pairs):
            raise ModelCheckError(
                f"{name}: two different {what} give the same logits, so that one does not reach "
                f"the model. Probably {where} drops it: mend the processor, and pass (hf_model, "
                "processor)."
            )


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def _check_pixels(name: str, model: PreTrainedModel, asked: Prompt) -> None:
    """Check that the processor's pictures have the size that the vision tower takes."""
    side = find_family(model).picture_size(model)
    if side is None:
        return
    height, width = asked["pixel_values"].shape[-2:]
    if (height, width) != (side, side):
        raise ModelCheckError(
            f"{name}: the image processor makes pictures of {height} × {width} pixels, but the "
            f"vision tower takes {side} × {side}. Set the image processor's size (and crop_size)."
        )


def _check_site(
    name: str, model: PreTrainedModel, family: ModelFamily, site: str, asked: Prompt
) -> float:
    shape = shape_of(model, site)
    found, wanted = asked.spans_at(site).visual_count, family.visual_count(model, site)
    if wanted is not None and found != wanted:
        raise ModelCheckError(
            f"{name}: the prompt has {found} image tokens at the {site}, but the model makes "
            f"{wanted}. Check the processor's patch_size, vision_feature_select_strategy and "
            "num_additional_image_tokens."
        )
    observer = Observer("all", shape)
    with running(model, [observer]):
        before = model(**asked.inputs).logits[:, -1].float()
    try:
        seen = observer.trace(batched=True)
    except InterventionError:
        raise ModelCheckError(
            f"{name}: no attention was seen in some layers of the {site}. The modules or the "
            f"configuration named in the family '{family.name}' are probably not on the path."
        ) from None
    total = seen.intensity + seen.system + seen.text
    apart = total - 1
    worst = float((apart.clamp_min(0) if seen.sinks else apart.abs()).max())
    if not worst <= 1e-3:
        raise ModelCheckError(
            f"{name}: rows of the {site}'s attention pattern sum to {1 - worst:.4f} instead of 1. "
            f"The modules named in the family '{family.name}' are probably not this "
            "model's attention."
        )
    blind = KnockOut(layers=shape.layers, site=site)
    with running(model, blind.sessions(Target(model))):
        after = model(**asked.inputs).logits[:, -1].float()
    moved = float((after - before).abs().max())
    if not moved > 0:
        raise ModelCheckError(
            f"{name}: removing the {site}'s attention to the image left the logits unchanged. The "
            f"modules named in the family '{family.name}' are probably not on the path."
        )
    return moved
