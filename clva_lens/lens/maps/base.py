"""What a map is: a formula over the image tokens of one pass, its registry, and how it is asked."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.run import running
from clva_lens.engine.session import Session
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.ground.parameters import Parameters
from clva_lens.ground.registry import Registry
from clva_lens.lens.attribution import chosen_tokens
from clva_lens.lens.intervene import intervening
from clva_lens.lens.trace import last_logits
from clva_lens.methods.base import MethodLike
from clva_lens.methods.target import Shape, shape_of
from clva_lens.models.activations import Readout
from clva_lens.models.family import find_family, transformers_model
from clva_lens.models.prompt import Prompt
from clva_lens.models.readout import CacheModel


class Reading:
    """One prompt of one model under one method, as a map reads it, and the logit that it explains.

    ``tokens`` are those of ``cl.image_map``. What is likeliest is so on the prompt as it is, which
    is the first that is read.
    """

    def __init__(self, model: Any, prompt: Prompt, tokens: Any, method: MethodLike | None) -> None:
        """Refuse what has no decoder that reads the image tokens among its own.

        Raises:
            ParameterError: if the tokens are none, or the model is an encoder-decoder.
        """
        self.handle, self.model, self.method = model, transformers_model(model), method
        if "decoder_input_ids" in prompt:
            raise ParameterError(
                "this language model is an encoder-decoder, and the maps' formulas are those of a "
                "decoder that reads picture and text in one row of tokens. Use "
                "cl.trace_attention(model, prompt), or cl.composed_saliency(model, prompt)."
            )
        # Tensors that were made in inference mode cannot be kept for a gradient; copies can.
        copies = {name: value.clone() for name, value in prompt.inputs.items()}
        self.prompt = prompt
        self.inputs = copies
        self.shape: Shape = shape_of(self.model, "decoder")
        self.likeliest: Int[Tensor, " batch"] | None = None
        self.groups, self.label = None, "the likeliest token's logit"
        if tokens is not None:
            words = getattr(model, "words", None)
            standing = CacheModel(self.readout, words, self.model.config.get_text_config(), "")
            self.groups, self.label = chosen_tokens(standing, words, tokens)

    @property
    def readout(self) -> Readout:
        """The modules that make logits of the residual stream."""
        return find_family(self.model).activations(self.model).readout

    def run(
        self, *sessions: Session, gradients: bool = False, blank: bool = False
    ) -> Float[Tensor, " batch"]:
        """Return the logit that is explained, from a pass that the sessions see after the method.

        With ``gradients`` they are recorded. ``blank``: with a picture of one colour, the mean of
        the processor's, in place of the prompt's.

        Raises:
            PromptError: if it is to be blank and has no pixels.
        """
        inputs = dict(self.inputs)
        if blank:
            if "pixel_values" not in inputs:
                raise PromptError(
                    "the prompt has no pixel_values, so there is no blank picture to start from. "
                    "Pass baseline='zero'."
                )
            inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        prompt = replace(self.prompt, inputs=inputs)
        recorded = torch.enable_grad() if gradients else nullcontext()
        with recorded, intervening(self.handle, self.method), running(self.model, sessions):
            return self.wanted(last_logits(self.model, prompt))

    def wanted(self, logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, " batch"]:
        """Return the logit that is explained, or the difference of two."""
        logits = logits.float()
        if self.groups is None:
            if self.likeliest is None:
                self.likeliest = logits.detach().argmax(dim=-1)
            return logits.gather(1, self.likeliest[:, None])[:, 0]
        first, *second = (logits[:, ids].amax(dim=-1) for ids in self.groups)
        return first - second[0] if second else first

    def word_ids(self) -> list[int]:
        """Return, for each sample, the id of the token that is explained (the first of two)."""
        if self.groups is None:
            assert self.likeliest is not None
            return self.likeliest.tolist()
        return [self.groups[0][0]] * len(self.inputs["input_ids"])

    def need_all_layers(self, name: str) -> None:
        """Raise ParameterError if a layer of the decoder has no attention."""
        if len(self.shape.layers) < self.shape.depth:
            raise ParameterError(
                f"'{name}' follows attention from layer to layer, but {self.shape.depth} − "
                f"{len(self.shape.layers)} layers of this decoder mix positions in other ways. "
                "Pass 'grad-cam' or 'integrated-gradients'."
            )


@dataclass(frozen=True, kw_only=True)
class MapFormula(Parameters, ABC):
    """A formula for a map over the image tokens that the decoder reads; its fields are settings.

    ``signed``: values below 0 speak against the answer; otherwise there are none. ``on_patches``:
    where a Q-Former reads the picture, values are over the patches that it reads. ``explains``:
    whether the map is of the logit that is asked for; what follows attention alone has none.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    signed: ClassVar[bool] = False
    on_patches: ClassVar[bool] = False
    explains: ClassVar[bool] = True

    @abstractmethod
    def over(self, reading: Reading) -> Float[Tensor, "batch visual"]:
        """Return the map of each sample, over the decoder's image tokens."""


def _check(name: str, formula: Any) -> None:
    for field in ("name", "paper"):
        if not isinstance(getattr(formula, field, None), str):
            raise ParameterError(
                f"the map '{name}' has no {field}. Write {field} = '…' in the class."
            )
    if formula.name != name:
        raise ParameterError(f"the map '{formula.name}' is registered as '{name}'. Use its name.")


MAPS = Registry[type[MapFormula]]("map", _check)


def register_map(formula: type[MapFormula]) -> type[MapFormula]:
    """Register a map under its own name; write it above the class."""
    return MAPS.register(formula.name, formula)


@undisturbed()
def values_of(formula: MapFormula, reading: Reading) -> Float[Tensor, "batch visual"]:
    """Return the map of a formula, of ordinary tensors whatever the caller is in."""
    return formula.over(reading).detach()
