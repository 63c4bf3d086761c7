"""``cl.explore``: one prompt read without and with methods, as what an explorer shows."""

from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from PIL import Image
from torch import Tensor

from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import ModelLoadError, ParameterError, PromptError
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.decoding import Greedy, told
from clva_lens.lens.explorer.exploration import Exploration
from clva_lens.lens.explorer.looking import Look, Looker
from clva_lens.lens.intervene import refuse_in_trace
from clva_lens.lens.load import LensModel
from clva_lens.lens.provenance import describe, digest, identity, machine
from clva_lens.methods.base import Composed, Method, MethodLike, as_method
from clva_lens.models.pieces import Piece
from clva_lens.models.prompt import Asked, Prompt, as_prompt

ALONE = "no method"
_LONGEST = 640  # pixels of the photo
_LENGTH = 20  # tokens of an answer
_PASSES = 4  # a look's, but for those of the knock-outs by layer


@undisturbed()
def explore(
    model: LensModel,
    prompt: Asked,
    method: MethodLike | Sequence[MethodLike] | None = None,
    *,
    max_new_tokens: int = _LENGTH,
    objects: Bool[Tensor, " visual"] | None = None,
    knock_outs: bool = True,
    part: str = "tiles",
    picture: int | None = None,
    progress: bool = True,
) -> Exploration:
    """Return one prompt read without and with a method, to be touched in a notebook or a browser.

    ``.show()`` is the explorer in a notebook, ``.to_html(path)`` one file that needs no kernel and
    no network, ``.save(path)`` the arrays. The model answers greedily; the words of that answer are
    then read under each method, so that the maps of one word can be compared.

    Args:
        model: what ``cl.load`` returned.
        prompt: a single one, with its photo: ``model.prompt(...)`` or (image, question).
        method: one, or several.
        max_new_tokens: how long the answer may be.
        objects: the image tokens of an object (``cl.patch_mask``), to be outlined.
        knock_outs: whether the margin is measured without each layer's look at the image: a pass
            for each layer and method.
        part: of a photo that was cut, its "tiles" or the "thumbnail".
        picture: which photo, 0-based, where the prompt has several.
        progress: whether to show a bar.

    Raises:
        ModelLoadError: if it is a bare model, without its tokenizer.
        PromptError: if the prompt is a batch, or it is unknown where the image tokens lie.
        ParameterError: if a method does not fit, or searches for its answer.
        InterventionError: inside a trace.

    >>> told = cl.explore(model, prompt, cl.CLVA(), knock_outs=False, progress=False)
    >>> told.words, told.maps.shape, told.map(layer=6, look=1).shape
    (('no',), (2, 12, 8, 1, 64), (8, 8))
    """
    told = looked(
        model,
        prompt,
        method,
        max_new_tokens=max_new_tokens,
        objects=objects,
        knock_outs=knock_outs,
        part=part,
        picture=picture,
        progress=progress,
    )
    return replace(told, record={**told.record, **identity(model)})


def looked(
    model: LensModel,
    prompt: Asked,
    method: MethodLike | Sequence[MethodLike] | None,
    *,
    max_new_tokens: int = _LENGTH,
    objects: Bool[Tensor, " visual"] | None = None,
    knock_outs: bool = True,
    part: str = "tiles",
    picture: int | None = None,
    progress: bool = True,
) -> Exploration:
    """Return what ``explore`` returns, but for the digests of the model in its record.

    They are those of the weights in memory, which one model needs once.
    """
    asked, methods = _asked(model, prompt), [None, *_several(method)]
    piece = asked.piece_at(model.site.name, part, picture)
    decoding = Greedy(max_new_tokens=max_new_tokens)
    passes = 1 + len(methods) * (_PASSES + knock_outs * len(model.site.layers))
    with progress_bar("looks", passes, wanted=progress) as advance:
        looker = Looker(model, asked, decoding, advance)
        looks = [looker.look(one, knock_outs=knock_outs) for one in methods]
    return Exploration(
        question=asked.questions[0] if asked.questions else "",
        model=model.name,
        names=(ALONE, *(written(one) for one in methods[1:])),
        words=tuple(word.text for word in looker.words),
        layers=model.site.layers,
        depth=model.site.depth,
        grid=(piece.rows, piece.columns),
        photo=_photo(piece.view(asked.photos[piece.picture])),
        outlines=_outlines(asked, looks, objects, piece),
        record=_record(model, asked, methods, decoding) | {"left_out": looker.left_out},
        **_stacked(looks, piece),
    )


def _asked(model: LensModel, prompt: Asked) -> Prompt:
    """Return what is asked as a single prompt."""
    refuse_in_trace("explore", "")
    if not isinstance(model, LensModel):
        raise ModelLoadError("explore() needs the tokenizer. Pass cl.load((hf_model, processor)).")
    asked = as_prompt(model, prompt)
    if len(asked["input_ids"]) > 1:
        raise PromptError(
            f"the prompt is a batch of {len(asked['input_ids'])}. Pass prompt.row(index)."
        )
    return asked.row(0)


def _several(method: MethodLike | Sequence[MethodLike] | None) -> list[Method | None]:
    """Return the methods that were given, one or several."""
    if isinstance(method, Sequence) and not isinstance(method, str):
        return [as_method(one) for one in method]
    return [] if method is None else [as_method(method)]


def _record(
    model: LensModel, prompt: Prompt, methods: Sequence[Method | None], decoding: Greedy
) -> dict[str, Any]:
    """Return what decided the arrays, besides the model's weights and this package's code."""
    return {
        "model": model.name,
        "prompt": digest(prompt.inputs),
        "system": prompt.system,
        "methods": [describe(one) for one in methods],
        "decoding": told(decoding, model.hf_model, model.words),
        **machine(model),
    }


def _stacked(looks: Sequence[Look], piece: Piece) -> dict[str, Any]:
    """Return the fields that have an axis of looks, and those that all looks share."""
    names = ("mass", "probabilities", "margins", "knocked", "sensitive", "insensitive")
    arrays = {name: np.stack([getattr(one, name) for one in looks]) for name in names}
    maps = torch.stack([piece.on_grid(one.maps.float().cpu()).flatten(-2) for one in looks])
    return {
        **arrays,
        "curves": np.stack([one.curves for one in looks]),
        "lens": np.stack([one.lens for one in looks]),
        "maps": maps.numpy(),
        "answers": tuple(one.answer for one in looks),
        "anchors": looks[0].anchors,
        "lens_layers": looks[0].lens_layers,
        "lens_words": tuple(one.lens_words for one in looks),
    }


def _outlines(
    prompt: Prompt, looks: Sequence[Look], objects: Bool[Tensor, " visual"] | None, piece: Piece
) -> dict[str, np.ndarray]:
    """Return what can be outlined, over the patches: the object, and a CLVA's anchors."""
    count = looks[0].maps.shape[-1]
    masks: dict[str, Shaped[Tensor, " visual"]] = {}
    if objects is not None:
        masks["object"] = torch.as_tensor(objects)
        if tuple(masks["object"].shape) != (count,):
            raise ParameterError(
                f"objects has shape {tuple(masks['object'].shape)}, but the prompt has {count} "
                "image tokens. Pass cl.patch_mask(model, mask, prompt=prompt)."
            )
    marked = next((one.marked for one in looks if one.marked is not None), None)
    if marked is not None and marked.positive.shape[-1] == count:
        masks["positive anchor"] = marked.positive.reshape(-1)
        masks["negative anchor"] = marked.negative.reshape(-1)
    return {name: piece.on_grid(one.bool().cpu()).flatten().numpy() for name, one in masks.items()}


def _photo(photo: Image.Image) -> np.ndarray:
    """Return a photo's pixels, no more than are drawn."""
    less = min(1.0, _LONGEST / max(photo.size))
    size = (max(1, round(photo.width * less)), max(1, round(photo.height * less)))
    return np.asarray(photo.resize(size).convert("RGB")).copy()


def written(method: Method | None) -> str:
    """Return a method as Python makes it: with those parameters that are not the default ones."""
    if method is None:
        return ALONE
    if isinstance(method, Composed):
        return f"cl.compose({', '.join(map(written, method.methods))})"
    given = {}
    for field in fields(method) if is_dataclass(method) else ():
        usual = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(method, field.name)
        if repr(value) != repr(usual):
            given[field.name] = value
    told = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f"cl.{type(method).__name__}({told})"
