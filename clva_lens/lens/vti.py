"""VTI, visual and textual intervention (arXiv:2410.15778; shengliu66/VTI, bb5dfee): two steerings.

Two directions are made once, of pictures with a true and a hallucinated caption each.

*Text.* With h the last token's states in all layers after prompt and caption, d = h_true − h_false
of each pair: v is the mean of d and its first principal component (a unit vector over all layers,
of the centred differences) together. *Vision.* The same for each token of the vision tower, with
d = mean of 50 maskings − original; a masking sets 99 % of the patches to the picture's mean colour.

What the MLP of each layer puts out is turned in all rows, at all steps, and keeps its length:
x′ = |x|·u/|u|, u = x/|x| + 0.1·a·v/|v|. a = 0.9 for both; the 0.1 is the release's. The text's
direction is read with the vision tower steered.

**Departs from the release** (no licence: from the formulas): principal components point the way the
mean does, where there signs fall as they fall; the vision's component is taken token by token,
where there a reshaping mixes neighbours. Its beams of 5 and answers without a cache are no part of
this.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import check_arguments, check_several
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.lens.load import LensModel
from clva_lens.lens.stream_reading import span_states
from clva_lens.methods.base import Method, compose
from clva_lens.methods.steering import Steer
from clva_lens.methods.steering_vector import SteeringVector
from clva_lens.methods.stream_rows import tower_depth
from clva_lens.methods.target import shape_of
from clva_lens.models.pictures import ImageLike, read_image
from clva_lens.models.weights import weights_sample
from clva_lens.toy.questions import caption
from clva_lens.toy.scenes import KINDS, render, sample_scenes

FACTOR = 0.1
TOY_DEMOS = 12


class Demo(NamedTuple):
    """A picture, a caption that is true of it, and one that is not."""

    image: ImageLike
    true: str
    false: str


@undisturbed()
def vti(
    model: LensModel,
    demos: Sequence[Demo | tuple[ImageLike, str, str]] | None = None,
    *,
    text: float | int = 0.9,
    vision: float | int = 0.9,
    masked: float | int = 0.99,
    trials: int = 50,
    question: str = "describe the image.",
    seed: int = 0,
    progress: bool = True,
) -> Method:
    """Return VTI for a model: a method of two ``cl.Steer``, whose vectors can be saved.

    Args:
        model: the model to steer.
        demos: (picture, true caption, false caption); None are 12 scenes of the toy world, in whose
            false captions the last object is one that is not there.
        text: a of the text's direction; 0 leaves it out.
        vision: a of the vision tower's direction; 0 leaves it out.
        masked: the share of patches that a masking takes, in [0, 1].
        trials: how many maskings are averaged, >= 1.
        question: what the captions answer.
        seed: of the maskings.
        progress: whether a progress bar is shown.

    Raises:
        ParameterError: if a parameter is out of range, or there is no demonstration.
        InterventionError: inside a trace.

    >>> method = cl.vti(model, trials=2)
    >>> cl.generate(model, prompt, method).texts
    ['no']
    """
    refuse_in_trace("vti", "")
    told: dict[str, Any] = {"masked": masked, "trials": trials, "question": question, "seed": seed}
    _check(model=model, text=text, vision=vision, **told)
    shown = _toy_demos() if demos is None else _given(demos)
    if not shown:
        raise ParameterError("there is no demonstration. Pass (picture, true, false) captions.")
    told = {
        "how": "vti",
        "demos": len(shown),
        "scenes": "of the toy world, seed 0" if demos is None else "given",
        **told,
        "model": model.name,
    }
    parts: list[Method] = []
    if vision != 0:
        seen = _vision(model, shown, question, masked, trials, seed, progress)
        vector = _vector(model, seen, "vision", told)
        parts.append(_steer(vector, vision, "all"))
    if text != 0:
        with intervening(model, compose(*parts)):
            read = _text(model, shown, question, progress)
        parts.append(_steer(_vector(model, read, "decoder", told), text, "all"))
    return compose(*parts)


def _given(demos: Any) -> list[Demo]:
    what = "(picture, true caption, false caption)"
    check_several("demos", demos, what)
    for one in demos:
        if not isinstance(one, tuple | list) or len(one) != 3:
            raise ParameterError(f"a demonstration is {one!r:.80}. Pass a list of {what}.")
    return [Demo(*one) for one in demos]


def _check(masked: Any, trials: Any, seed: Any, **given: Any) -> None:
    check_arguments(vti, masked=masked, trials=trials, seed=seed, **given)
    if not 0 <= masked <= 1 or trials < 1 or seed < 0:
        raise ParameterError(
            f"masked must be in [0, 1] and trials at least 1, and seed at least 0, but they are "
            f"{masked}, {trials} and {seed}. Pass masked=0.99, trials=50."
        )


def _steer(vector: SteeringVector, strength: float | int, span: str) -> Steer:
    return Steer(
        vector=vector, span=span, part="mlp_out", strength=FACTOR * strength, keep_norm=True
    )


def _vector(model: LensModel, values: Tensor, stack: Any, told: dict[str, Any]) -> SteeringVector:
    layers = tuple(range(len(values)))
    sample = weights_sample(model.hf_model)
    return SteeringVector(values.float(), layers, "resid_post", stack, told, sample)


def with_component(differences: Float[Tensor, " demo *axes"]) -> Float[Tensor, "*axes"]:
    """Return the mean of differences and their first principal component, a unit vector, together.

    The component is of all axes together and points the way the mean does; of a single
    demonstration there is none.
    """
    mean = differences.mean(dim=0)
    if len(differences) < 2:
        return mean
    rows = (differences - mean).flatten(1)
    unit = torch.linalg.svd(rows, full_matrices=False).Vh[0].reshape(mean.shape)
    return mean + unit * (1.0 if float((unit * mean).sum()) >= 0 else -1.0)


def _text(
    model: LensModel, demos: Sequence[Demo], question: str, progress: bool
) -> Float[Tensor, "layer width"]:
    layers = tuple(range(shape_of(model.hf_model, "decoder").depth))
    prompts = [
        model.prompt(one.image, question, answer=said)
        for one in demos
        for said in (one.true, one.false)
    ]
    states = span_states(model, prompts, layers, ["last"], what="captions", progress=progress)[:, 0]
    return with_component(states[::2] - states[1::2])


def _vision(
    model: LensModel,
    demos: Sequence[Demo],
    question: str,
    masked: float | int,
    trials: int,
    seed: int,
    progress: bool,
) -> Float[Tensor, "layer position width"]:
    layers = tuple(range(tower_depth(model.hf_model, "resid_post")))
    if not layers:
        raise ParameterError(
            "the vision tower of this model has no layers that have names, so it cannot be "
            "steered. Pass vision=0."
        )
    noise, found = np.random.default_rng(seed), []
    config = model.hf_model.config.vision_config
    cells = config.image_size // config.patch_size
    with progress_bar("maskings", len(demos), wanted=progress) as advance:
        for one in demos:
            picture = np.asarray(read_image(one.image))
            several = [picture, *(mask(picture, cells, masked, noise) for _ in range(trials))]
            prompts = [model.prompt(each, question) for each in several]
            options: dict[str, Any] = {"stack": "vision", "each": True, "progress": False}
            states = span_states(model, prompts, layers, ["all"], **options)[:, 0]
            found.append(states[1:].mean(dim=0) - states[0])
            advance(1)
    # Token by token: [position, demo, layer, width].
    tokens = torch.stack(found).movedim(2, 0)
    return torch.stack([with_component(one) for one in tokens], dim=1)


def mask(
    picture: UInt8[np.ndarray, "height width 3"],
    cells: int,
    share: float | int,
    noise: np.random.Generator,
) -> UInt8[np.ndarray, "height width 3"]:
    """Return a picture with a share of a grid of cells in its mean colour, drawn at random."""
    gone = np.zeros(cells * cells, dtype=bool)
    gone[noise.permutation(cells * cells)[: round(share * cells * cells)]] = True
    rows, columns = (np.arange(size) * cells // size for size in picture.shape[:2])
    hidden = gone.reshape(cells, cells)[np.ix_(rows, columns)]
    mean = picture.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    return np.where(hidden[..., None], mean, picture)


def _toy_demos() -> list[Demo]:
    demos = []
    for scene in sample_scenes(TOY_DEMOS, seed=0):
        said = caption(scene).answer
        absent = next(kind for kind in KINDS if kind not in scene.kinds)
        demos.append(Demo(render(scene), said, said.replace(scene.kinds[-1], absent)))
    return demos
