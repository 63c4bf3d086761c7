"""What clva_lens has to know about a family of models: facts, no algorithms."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from clva_lens.errors import ModelLoadError
from clva_lens.registry import Registry


class Site(NamedTuple):
    """A place where attention can be read and edited.

    ``modules`` are the attention modules in layer order; ``config`` is the configuration object
    that they read the name of their attention function from.
    """

    name: str
    modules: tuple[nn.Module, ...]
    config: PreTrainedConfig


class ModelFamily(ABC):
    """One architecture: where its attention is, what its image tokens are, how it is asked."""

    name: str

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Return whether ``model`` belongs to this family."""

    @abstractmethod
    def site(self, model: PreTrainedModel) -> Site:
        """Return the attention that methods read and edit."""

    @abstractmethod
    def image_token_id(self, model: PreTrainedModel) -> int:
        """Return the token id that stands for one image feature in ``input_ids``."""

    @abstractmethod
    def grid(self, model: PreTrainedModel) -> tuple[int, int]:
        """Return (rows, columns) of one picture's image tokens."""

    @abstractmethod
    def ask(self, processor: ProcessorMixin, question: str, system: str | None) -> str:
        """Return the text of a prompt: image placeholder, question and assistant cue.

        ``system`` is the system message; None leaves the model's own, "" leaves it out.
        """

    @abstractmethod
    def tiny(self, **text_config: Any) -> PreTrainedModel:
        """Return a small model with random weights: 12 layers, 4 heads, 16 image tokens."""


FAMILIES = Registry[ModelFamily]("model family")


def find_family(model: nn.Module) -> ModelFamily:
    """Return the family of a transformers model.

    Raises:
        ModelLoadError: if no registered family knows the model.
    """
    for _, family in FAMILIES.items():
        if family.matches(model):
            return family
    raise ModelLoadError(
        f"{type(model).__name__} belongs to no model family that clva_lens knows "
        f"({', '.join(FAMILIES.names())}). Load one of these, or register a ModelFamily for it "
        "(clva_lens/models/llava.py is an example)."
    )
