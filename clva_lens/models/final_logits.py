"""What a model does to its unembedding's output before it calls it logits: a factor, a soft cap."""

import inspect
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from clva_lens.ground.errors import InterventionError
from clva_lens.models.tree import tree

FACTORS = {"logit_scale": "times", "logits_scaling": "over", "output_multiplier": "times"}
"""Settings that logits are multiplied by or divided by, where a model's code names them."""
MULTIPLIED = ("HyperCLOVAX",)
"""Beginnings of the names of classes that multiply by ``logits_scaling``; others divide."""
CAP = "final_logit_softcapping"


class FinalLogits(NamedTuple):
    """logits = cap · tanh(head · times / over / cap); without a ``cap``, head · times / over."""

    times: float = 1.0
    over: float = 1.0
    cap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the head's output is the logits."""
        return self == FinalLogits()

    def of(self, head: Float[Tensor, "*places vocabulary"]) -> Float[Tensor, "*places vocabulary"]:
        """Return the logits of what the unembedding puts out, in its type, as the model does."""
        if self.times != 1.0:
            head = head * self.times
        if self.over != 1.0:
            head = head / self.over
        if self.cap is not None:
            head = torch.tanh(head / self.cap) * self.cap
        return head

    def uncapped(
        self, logits: Float[Tensor, "*places vocabulary"]
    ) -> Float[Tensor, "*places vocabulary"]:
        """Return the logits as they were before the cap."""
        return logits if self.cap is None else torch.atanh(logits / self.cap) * self.cap

    def before(
        self, logits: Float[Tensor, "*places vocabulary"]
    ) -> Float[Tensor, "*places vocabulary"]:
        """Return what the unembedding must put out for these logits.

        Raises:
            InterventionError: if some are beyond the cap, which no output of it makes.
        """
        if self.cap is not None and not bool((logits.abs() <= self.cap).all()):
            raise InterventionError(
                f"the model caps its logits at ±{self.cap}, but a method made larger ones, or "
                "tokens impossible. Use a method that edits attention, or another model."
            )
        return self.uncapped(logits) * (self.over / self.times)


def final_logits(model: nn.Module, head: nn.Module) -> FinalLogits:
    """Return what the modules around an unembedding do to its output, by their code and settings.

    A setting counts if the code that runs the head names it: several models have such a setting in
    their configuration and do not use it.
    """
    owner = _runner(model, head)
    named = set() if owner is None else _names(owner)
    made = {"times": 1.0, "over": 1.0}
    for name, effect in FACTORS.items():
        value = _setting(owner, name) if name in named else None
        if value is not None:
            times = type(owner).__name__.startswith(MULTIPLIED)
            made["times" if times else effect] *= float(value)
    cap = _setting(owner, CAP) if CAP in named else None
    return FinalLogits(**made, cap=None if cap is None else float(cap))


def _runner(model: nn.Module, head: nn.Module) -> PreTrainedModel | None:
    """Return the model that runs an unembedding: the outermost whose code names it."""
    for part in tree(model):
        if isinstance(part, PreTrainedModel):
            named = _names(part)
            below = (hung for one in tree(part) for hung in one._modules.items())
            if any(child is head and name in named for name, child in below):
                return part
    return None


def _names(owner: PreTrainedModel) -> set[str]:
    """Return the names of attributes, and the texts, in the code of a model's ``forward``."""
    code: Any = getattr(inspect.unwrap(type(owner).forward), "__code__", None)
    if code is None:
        return set()
    return {*code.co_names, *(one for one in code.co_consts if isinstance(one, str))}


def _setting(owner: Any, name: str) -> float | None:
    config = owner.config
    places = (owner, config, config.get_text_config())
    found = (getattr(place, name, None) for place in places)
    return next((one for one in found if isinstance(one, int | float)), None)
