"""Whether the questions about a picture may share what the model reads of it, and the sharing."""

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import Session
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import InterventionError, PromptError, SpanError
from clva_lens.lens.asking import Share
from clva_lens.lens.check import QUESTIONS
from clva_lens.lens.faults import machine_fault, own_fault
from clva_lens.lens.load import LensModel
from clva_lens.lens.prefix import Prefix, read, refuse_prefix
from clva_lens.lens.towers import TowerPrompt, TowerReadings
from clva_lens.methods.base import Method
from clva_lens.methods.target import Target
from clva_lens.models.once import Prepared
from clva_lens.models.pictures import ImageLike, picture_keys
from clva_lens.models.prompt import Prompt
from clva_lens.models.twin import twin

# Two prompts differ by this many times what another batch size makes, or this share of the spread.
_TIMES, _SHARE = 8.0, 1e-5
# In half precision a batch moves much, but never this share of the spread.
_MOST = 0.25
_SIZES = ((64, 64), (64, 96))

_PROBED: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""What the probe found for a model; "" where nothing stands against sharing."""


class Prefixes:
    """What was prepared and read last of some pictures, for who asks about the same ones next."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._prepared: tuple[LensModel, Prepared] | None = None
        self._readings = TowerReadings()
        self._last: tuple[list[Hashable], str | None, list[Any], Prefix] | None = None
        self._asked: tuple[Any, Prompt] | None = None

    def ask(
        self,
        model: LensModel,
        images: Sequence[ImageLike],
        questions: Sequence[str],
        system: str | None,
        share: Share | None,
    ) -> Prompt:
        """Return the prompt of a batch; a picture is read once for its questions, if they share it.

        It is prepared once, whether they do or not, and who asks the same again gets the same.
        """
        keys = picture_keys(images)
        what = (model, keys, list(questions), system, share)
        if self._asked is None or self._asked[0] != what:
            self._asked = None  # its memory is free before another picture is read
            self._asked = (what, self._prompt(model, images, questions, system, share, keys))
        return self._asked[1]

    def _prompt(
        self,
        model: LensModel,
        images: Sequence[ImageLike],
        questions: Sequence[str],
        system: str | None,
        share: Share | None,
        keys: list[Hashable],
    ) -> Prompt:
        if self._prepared is None or self._prepared[0] is not model:
            self._prepared = (model, Prepared(model.processor))
        prepared = self._prepared[1]
        shown = prepared.show(images)
        known = list(dict.fromkeys(keys))
        if share != "picture" or len(known) == len(keys):
            once = prepared.processor
            prompt = model.prompt(shown, list(questions), system=system, processor=once)
            return TowerPrompt.of(prompt, keys, self._readings) if share == "tower" else prompt
        if self._last is None or self._last[:2] != (known, system):
            pictures = [shown[keys.index(key)] for key in known]
            # The pictures are kept: an id names an object for as long as it lives.
            reading = read(model, pictures, system=system, prepared=prepared)
            self._last = (known, system, pictures, reading)
        asked = self._last[3].ask(questions, [known.index(key) for key in keys])
        return asked.for_several_runs()


def shared(
    model: LensModel, method: Method | None, share: Share | None
) -> tuple[Share | None, str | None]:
    """Return what questions about a picture can share of ``share``, and why that is not all.

    Where no beginning of the prompts can be read by itself, the vision tower may be (``towers``).
    """
    if share is None:
        return None, None
    unshared = why_unshared(model, method) if share == "picture" else None
    if share == "picture" and unshared is None:
        return "picture", None
    if method is not None and any(one.edits_tower for one in _sessions(model, method)):
        return None, f"{method.name} edits what the vision tower makes of a picture"
    if model.family.seeing(model.hf_model):
        return "tower", unshared
    return None, unshared or f"the family '{model.family.name}' names no vision tower to share"


def why_unshared(model: LensModel, method: Method | None) -> str | None:
    """Return why questions about a picture cannot share what is read of it; None if they can.

    A model is probed once: four questions onto two pictures that were read before, against the same
    prompts read whole. They may differ by what another batch size makes.
    """
    if method is not None:
        sessions = _sessions(model, method)
        if not all(session.leaves_prefix for session in sessions):
            return f"{method.name} reads or edits rows before the question"
        if any(session.rereads for session in sessions):
            try:
                twin(model.hf_model)
            except InterventionError as error:
                return str(error)
    try:
        refuse_prefix(model)
    except PromptError as error:
        return str(error)
    if model.hf_model not in _PROBED:
        _PROBED[model.hf_model] = _probe(model) or ""
    return _PROBED[model.hf_model] or None


def _sessions(model: LensModel, method: Method) -> list[Session]:
    return method.sessions(Target(model.hf_model, model.processor))


@undisturbed()
def _probe(model: LensModel) -> str | None:
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 255, (*size, 3), dtype=np.uint8) for size in _SIZES]
    try:
        try:
            found = _differences(model, pictures)
        except SpanError:  # a batch of unequal pictures is refused: they are asked one by one
            found = _differences(model, pictures[:1] * 2)
    except Exception as error:  # the model's code may raise anything of what it never read
        if machine_fault(error) is not None:
            raise
        if own_fault(error):
            error.add_note(
                "This came up when clva_lens read a picture once for several questions, in its own "
                "code: please report it. share=None (--no-share) asks without."
            )
            raise
        return " ".join(str(error).split()) or type(error).__name__
    null, error, spread = found
    if error <= _TIMES * null + _SHARE * spread and error <= _MOST * spread:
        return None
    return (
        f"in this {type(model.hf_model).__name__} what is read of a picture depends on the "
        f"question: its logits differ by {error:.2g}, where another batch size makes {null:.2g}"
    )


def _differences(model: LensModel, pictures: list[Any]) -> tuple[float, float, float]:
    """Return how far logits move by another batch size and by sharing, and their spread."""
    owners, questions = [0, 0, 1, 1], [*QUESTIONS, *QUESTIONS]
    asked = [(pictures[owner], text) for owner, text in zip(owners, questions, strict=True)]
    singles = torch.cat([_logits(model, model.prompt(*one)) for one in asked])
    batch = _logits(model, model.prompt([one for one, _ in asked], questions))
    shared = _logits(model, read(model, pictures).ask(questions, owners))
    null, error = (float((found - singles).abs().max()) for found in (batch, shared))
    return null, error, float(singles.std())


def _logits(model: LensModel, prompt: Prompt) -> Float[Tensor, "batch vocabulary"]:
    found: Any = model.hf_model
    return found(**prompt, logits_to_keep=1).logits[:, -1].float()
