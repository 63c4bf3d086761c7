"""What clva_lens has to know about a family of models: facts, no algorithms."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import ClvaLensError, ModelLoadError, ParameterError, PromptError
from clva_lens.ground.registry import Registry
from clva_lens.models.activations import Activations
from clva_lens.models.belonging import hook_before
from clva_lens.models.passes import Passes
from clva_lens.models.wording import Message, continued, conversation, write_by_template

# The decoder of a family's tiny model.
TINY_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


Inputs = dict[str, Tensor]
"""Inputs of a model by name."""


class Site(NamedTuple):
    """A place where attention can be read and edited.

    ``modules`` are the attention modules in layer order and ``layers`` the numbers of their layers,
    0-based, in a stack of ``depth`` layers (not every layer of a Q-Former looks at the picture).
    ``config`` is the configuration object that they read the name of their attention function
    from. ``passes`` makes what tells, during a run, which rows and keys are what. ``ordered``: the
    rows are a sequence with a last one, not a set of queries.
    """

    name: str
    modules: tuple[nn.Module, ...]
    layers: tuple[int, ...]
    depth: int
    config: PreTrainedConfig
    passes: Callable[[], Passes]
    ordered: bool = True


class ModelFamily(ABC):
    """One architecture: where its attention is, what its image tokens are, how it is asked.

    ``chats``: its prompts are conversations with a place for a system message. Benchmarks give
    theirs to such models only. ``fallback``: it takes models that no other family matches.
    ``flat_pictures``: its processor takes the pictures of all texts as one list.
    ``architectures``: the model classes that it takes, by name, those derived from them included.
    """

    name: str
    architectures: tuple[str, ...] = ()
    chats: bool = True
    fallback: bool = False
    flat_pictures: bool = True

    def matches(self, model: nn.Module) -> bool:
        """Return whether ``model`` belongs to this family."""
        return any(kind.__name__ in self.architectures for kind in type(model).__mro__)

    @abstractmethod
    def sites(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """Return the places of attention; the first is the one that methods act on by default.

        Raises:
            ModelLoadError: if a part of the model is of a kind that is not supported.
        """

    @abstractmethod
    def image_token_id(self, model: PreTrainedModel) -> int:
        """Return the token id that stands for one image feature in ``input_ids``."""

    @abstractmethod
    def visual_count(self, model: PreTrainedModel, site: str) -> int | None:
        """Return how many image tokens a prompt has at a site; None if that is the picture's."""

    @abstractmethod
    def grid(self, model: PreTrainedModel, site: str) -> tuple[int, int]:
        """Return (rows, columns) of one picture's image tokens at a site.

        Raises:
            PromptError: if they lie on no grid, saying why.
        """

    def prompt_grid(
        self, model: PreTrainedModel, site: str, inputs: Mapping[str, Tensor]
    ) -> tuple[int, int]:
        """Return (rows, columns) of the image tokens of this prompt's picture at a site.

        Raises:
            PromptError: if they lie on no grid, saying why.
        """
        return self.grid(model, site)

    def picture_size(self, model: PreTrainedModel) -> int | None:
        """Return the side of the square pictures that the model takes; None if they may differ."""
        return model.config.vision_config.image_size

    def notes(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Return what else there is to know of a model, in sentences."""
        return ()

    def spans(self, model: PreTrainedModel, site: str, inputs: Mapping[str, Tensor]) -> TokenSpans:
        """Return the spans of the keys at a site: by default, of the prompt's tokens."""
        mask = inputs.get("attention_mask")
        return TokenSpans.from_ids(inputs["input_ids"], self.image_token_id(model), mask)

    def converse(self, processor: Any, messages: list[Message], system: str | None) -> str:
        """Return the text of a prompt with earlier turns, by the processor's chat template.

        Raises:
            PromptError: if it has none, or the template leaves something out.
        """
        if getattr(processor, "chat_template", None) is None:
            raise PromptError(
                f"the {self.name} processor has no chat template, so earlier turns cannot be "
                "written. Pass the output of the processor for the whole text."
            )
        return write_by_template(processor, messages, system)

    def begin(self, text: str, answer: str) -> str:
        """Return a prompt's text with the beginning of the answer, as ``encode`` takes it."""
        return continued(text, answer)

    def check_begun(self, processor: Any, texts: list[str], inputs: Inputs) -> None:
        """Check that inputs of texts with the beginning of an answer end with it.

        Raises:
            PromptError: if the processor writes something after it.
        """
        return

    @abstractmethod
    def ask(self, processor: ProcessorMixin, question: str, system: str | None) -> str:
        """Return the text of a prompt: image placeholder, question and assistant cue.

        ``system`` is the system message; None leaves the model's own, "" leaves it out.
        """

    def seeing(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """Return the modules that read the picture and nothing of the question, in their order."""
        return ()

    def activations(self, model: PreTrainedModel) -> Activations:
        """Return what has a TransformerLens name in the model, for ``run_with_cache``.

        Raises:
            ModelLoadError: if nobody wrote them down for this family or this language model.
        """
        raise ModelLoadError(
            f"the family '{self.name}' has no table of TransformerLens names, which run_with_cache "
            "needs. Give it one (ModelFamily.activations; clva_lens/models/llava.py is an "
            "example), or read activations inside model.trace(prompt)."
        )

    def encode(
        self, model: PreTrainedModel, processor: Any, images: list[Any], texts: list[str]
    ) -> dict[str, Tensor]:
        """Return the model's inputs for pictures and texts, padded on the left.

        ``images`` has a picture for each text, or a list of them. Labels, which some processors
        always make and which decide no answer, are left out.

        Raises:
            PromptError: if the processor makes more or fewer prompts than there are texts.
        """
        flat = [one for row in images for one in (row if isinstance(row, list) else [row])]
        # A chat template that writes the BOS token itself must not get a second one.
        bos = getattr(processor.tokenizer, "bos_token", None)
        encoded = processor(
            images=flat if self.flat_pictures else images,
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            **_kinds_of_tokens(model, processor),
        )
        rows = len(encoded["input_ids"])
        if rows != len(texts):
            raise PromptError(
                f"the {type(processor).__name__} makes {rows} prompts of {len(texts)}, with texts "
                "of its own, so answers would not be to the question. Load the model with "
                "check=False, and pass what its processor makes: they are prompts."
            )
        return {
            name: value
            for name, value in encoded.items()
            if isinstance(value, Tensor) and name != "labels"
        }

    def watch(self, model: PreTrainedModel, seen: dict[str, Tensor]) -> list[RemovableHandle]:
        """Keep in ``seen`` what the model is given besides token ids, by the names of its inputs.

        The handles stop it. Contrastive methods make their second input from it.

        Raises:
            ModelLoadError: if nobody wrote it down for this family.
        """
        raise ModelLoadError(
            f"the family '{self.name}' does not say where its pictures come in, which contrastive "
            "methods need. Give it a method watch (clva_lens/models/llava.py is an example)."
        )

    def disturb(
        self, model: PreTrainedModel, processor: Any, inputs: Inputs, instruction: str
    ) -> Inputs:
        """Return a prompt's inputs with a disturbing instruction where ICD puts it.

        Raises:
            PromptError: if the model has no place for it.
        """
        raise PromptError(
            f"the family '{self.name}' does not say where a disturbing instruction goes, which ICD "
            "needs. Give it a method disturb (clva_lens/models/llava.py is an example)."
        )

    def explain(self, error: Exception) -> ClvaLensError | None:
        """Return a clearer error for one that the model raised, if there is one."""
        return None

    @abstractmethod
    def tiny(self, **text_config: Any) -> PreTrainedModel:
        """Return a small model with random weights: 12 layers, 4 heads, 16 image tokens."""

    def tiny_inputs(self, model: PreTrainedModel, seed: int = 0, words: int = 6) -> Inputs:
        """Return inputs of the tiny model, without a processor: BOS, image, random words.

        The picture is random pixels. A family whose models take more inputs adds them here.
        """
        noise = torch.Generator().manual_seed(seed)
        side = self.picture_size(model) or 32
        site = self.sites(model)[-1].name
        count = self.visual_count(model, site) or math.prod(self.grid(model, site))
        image = torch.full((count,), self.image_token_id(model))
        ids = torch.cat([torch.tensor([1]), image, torch.randint(8, 60, (words,), generator=noise)])
        return {
            "input_ids": ids[None],
            "attention_mask": torch.ones_like(ids)[None],
            "pixel_values": torch.randn(1, 3, side, side, generator=noise),
        }


def _kinds_of_tokens(model: PreTrainedModel, processor: Any) -> dict[str, bool]:
    """Return the option that says which tokens are of pictures, where the model is to be told.

    A processor may name it among its outputs and yet make it only if asked (Cosmos3-Edge's).
    """
    name = "mm_token_type_ids"
    taken = inspect.signature(type(model).forward).parameters
    made = getattr(processor, "model_input_names", ())
    return {f"return_{name}": True} if name in taken and name in made else {}


def ask_by_template(processor: Any, question: str, system: str | None) -> str:
    """Return the prompt that a processor's chat template makes of a picture and a question.

    Raises:
        PromptError: if there is a system message and the template drops it.
    """
    return write_by_template(processor, conversation([], question)[0], system)


def note_inputs(
    module: nn.Module, read: Callable[[dict[str, Any]], Inputs], seen: dict[str, Tensor]
) -> RemovableHandle:
    """Keep in ``seen`` what ``read`` finds among a module's arguments; the handle stops it.

    A first argument without a name is called ``pixel_values``.
    """

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(read({"pixel_values": args[0], **kwargs} if args else kwargs))

    return hook_before(module, note)


def replace_lead(inputs: Inputs, head: list[int], starts: Iterable[int], pad: int) -> Inputs:
    """Return a prompt whose rows begin with ``head`` and go on from their ``starts``."""
    starts, device = list(starts), inputs["input_ids"].device
    rows, real = (
        [lead + row[start:].tolist() for row, start in zip(inputs[name], starts, strict=True)]
        for name, lead in (("input_ids", head), ("attention_mask", [1] * len(head)))
    )
    (ids, _), (mask, _) = pad_left(rows, pad), pad_left(real, 0)
    return inputs | {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def pad_left(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids of one length, and the mask that is 0 on their padding."""
    length = max(len(row) for row in rows)
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _check_family(name: str, family: Any) -> None:
    """Raise ParameterError, naming what a family lacks to be registered."""
    if not isinstance(family, ModelFamily):
        raise ParameterError(
            f"'{name}' would be {family!r}, which is no ModelFamily. Register an instance: "
            "FAMILIES.register(name, MyFamily())."
        )
    if vars(type(family)).get("name") != name:
        found = getattr(family, "name", None)
        raise ParameterError(
            f"{type(family).__name__} is to be registered as '{name}', but the name it has is "
            f'{found!r}. Write name = "{name}" in the class itself.'
        )
    if not family.architectures and type(family).matches is ModelFamily.matches:
        raise ParameterError(
            f"{type(family).__name__} takes no model. Write the names of its model classes as "
            "architectures, or say in matches() which models it takes."
        )


FAMILIES = Registry[ModelFamily]("model family", _check_family)


def matching_family(model: nn.Module) -> ModelFamily | None:
    """Return the family of a model, a fallback only if no other matches; None if none does."""
    families = sorted((family for _, family in FAMILIES.items()), key=lambda one: one.fallback)
    return next((family for family in families if family.matches(model)), None)


def find_family(model: nn.Module) -> ModelFamily:
    """Return the family of a transformers model.

    Raises:
        ModelLoadError: if no registered family knows the model.
    """
    family = matching_family(model)
    if family is not None:
        return family
    raise ModelLoadError(
        f"{type(model).__name__} belongs to no model family that clva_lens knows "
        f"({', '.join(FAMILIES.names())}). Load one of these, or register a ModelFamily for it "
        "(clva_lens/models/llava.py is an example)."
    )


def transformers_model(model: Any) -> PreTrainedModel:
    """Return the transformers model behind a handle, or within a module.

    Raises:
        ModelLoadError: if there is none of a known family.
    """
    module = getattr(model, "_module", model)
    if not isinstance(module, nn.Module):
        raise ModelLoadError(
            f"expected a transformers model or an nnsight handle of one, but got "
            f"{type(model).__name__}. Pass the object that cl.load() or from_pretrained() returned."
        )
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and matching_family(part) is not None:
            return part
    find_family(module)
    raise AssertionError("find_family() accepted a module that no family matches")


def find_site(model: PreTrainedModel, name: str | None = None) -> Site:
    """Return a site of a model by name; None is the one that methods act on by default.

    Raises:
        ModelLoadError: if no family knows the model.
        ParameterError: if it has no such site.
    """
    sites = find_family(model).sites(model)
    for site in sites:
        if name in (None, site.name):
            return site
    known = " and ".join(f"'{site.name}'" for site in sites)
    raise ParameterError(
        f"{type(model).__name__} has no attention site {name!r}; it has {known}. Pass site= one of "
        "these, or leave it out."
    )
