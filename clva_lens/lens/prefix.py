"""A picture that is read once: the keys and values of all that comes before the questions.

Several questions about a picture have the same beginning: what comes before the picture, and the
picture itself. Its keys and values are computed once, and each question is read onto a copy of
them. That is exact, up to the rounding of another batch size, where nothing in the beginning
depends on the question: attention is causal there, and no method reads or edits its rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.axes import TokenSpans, last_true
from clva_lens.ground.errors import PromptError, SpanError
from clva_lens.ground.parameters import check_arguments
from clva_lens.lens.load import LensModel
from clva_lens.models.beginning import Beginning, read_beginning
from clva_lens.models.kv_cache import CACHE
from clva_lens.models.once import Prepared
from clva_lens.models.pictures import ImageLike
from clva_lens.models.positions import positions_of
from clva_lens.models.prompt import Prompt, readable, visual_tokens
from clva_lens.models.room import Room

# Inputs with a column for each token. Others come with the pictures.
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_ANY_QUESTION = "?"


@dataclass(frozen=True, eq=False, repr=False)
class Prefix:
    """The beginning of prompts, up to the end of the picture, as a model has read it.

    A row a picture, padded on the left. ``prompt`` is the one that was cut, ``beginning`` what was
    read of it, ``prepared`` has its pictures.
    """

    model: LensModel
    prompt: Prompt
    beginning: Beginning
    prepared: Prepared | None = None

    @property
    def ids(self) -> Int[Tensor, "picture position"]:
        """The tokens that were read."""
        return self.beginning.inputs["input_ids"]

    @property
    def spans(self) -> TokenSpans:
        """What the positions are."""
        return self.beginning.spans

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Return the number of pictures and of positions."""
        count = "1 picture" if len(self) == 1 else f"{len(self)} pictures"
        return f"Prefix({count}, {self.ids.shape[1]} positions)"

    def fork(self, pictures: int | Sequence[int] = 1, room: Room | None = None) -> DynamicCache:
        """Return a cache of its own with a row for each question.

        ``pictures`` names the picture that each is about, or is the number of questions about the
        only one. In ``room`` what follows is written in place.

        Raises:
            PromptError: if it is a number, but there are several pictures; if there is no such
                picture; or if the model has other weights or adapters than when it read them.
        """
        return self.beginning.fork(self.model.hf_model, self._rows(pictures), room)

    def _rows(self, pictures: int | Sequence[int]) -> Int[Tensor, " row"]:
        if isinstance(pictures, int):
            if len(self) > 1:
                raise PromptError(
                    f"the prefix has {len(self)} pictures, so say which one each question is "
                    "about: pictures=[0, 0, 1]."
                )
            pictures = [0] * pictures
        if not pictures or not all(0 <= picture < len(self) for picture in pictures):
            raise PromptError(
                f"pictures must name those of {len(pictures)} questions, from 0 to "
                f"{len(self) - 1}, but is {list(pictures)}. Pass one for each question."
            )
        return torch.as_tensor(pictures, device=self.ids.device)

    def ask(
        self, question: str | Sequence[str], pictures: Sequence[int] | None = None
    ) -> "Continued":
        """Return the prompt that asks a question, or several, about what was read.

        ``pictures`` names the picture that each question is about; without, the only one.

        Raises:
            PromptError: if a question is empty or has a control token, ``pictures`` does not fit,
                or a prompt does not begin as the prefix does.
        """
        questions = [question] if isinstance(question, str) else list(question)
        owners = self._rows(len(questions) if pictures is None else pictures).tolist()
        if len(owners) != len(questions):
            raise PromptError(
                f"there are {len(questions)} questions, but pictures names {len(owners)}. Pass one "
                "for each question."
            )
        whole = self._whole_prompts(owners, questions)
        return self.continued(owners, whole, questions, batched=not isinstance(question, str))

    def _whole_prompts(self, owners: list[int], questions: list[str]) -> list[dict[str, Tensor]]:
        """Return the inputs of each whole prompt, unpadded: made together where they can be."""
        prepared = self.prepared or Prepared(self.model.processor)
        shown = prepared.show(self.prompt.images)
        given = {"system": self.prompt.system, "processor": prepared.processor}
        try:
            batch = self.model.prompt([shown[owner] for owner in owners], questions, **given).inputs
        except SpanError:  # pictures of unequal numbers of tokens go into no batch
            batch = {}
        if batch and all(len(one) == len(questions) for one in batch.values()):
            starts = batch["attention_mask"].argmax(dim=1).tolist()
            rows = [slice(row, row + 1) for row in range(len(questions))]
            return [
                {
                    name: one[row, start:] if name in BY_TOKEN else one[row]
                    for name, one in batch.items()
                }
                for row, start in zip(rows, starts, strict=True)
            ]
        asked = zip(owners, questions, strict=True)
        return [self.model.prompt(shown[owner], text, **given).inputs for owner, text in asked]

    def continued(
        self,
        owners: list[int],
        whole: list[dict[str, Tensor]],
        questions: list[str],
        *,
        batched: bool,
    ) -> "Continued":
        """Return what to read of whole prompts, each about the picture that its owner names.

        ``whole`` has the inputs of each, unpadded; padding stands before the questions.

        Raises:
            PromptError: if one does not begin as the prefix does.
        """
        rows = self._rows(owners)
        before, known_real = self.ids[rows], self.spans.real[rows]
        columns: dict[str, list[Tensor]] = {}
        for owner, inputs in zip(owners, whole, strict=True):
            known = self.ids[owner][self.spans.real[owner]]
            if not torch.equal(inputs["input_ids"][0, : len(known)], known):
                raise PromptError(
                    "a prompt does not begin as its picture's prefix does. Read the picture again, "
                    "with the same system message."
                )
            for name, values in by_token(self.model.hf_model, inputs).items():
                columns.setdefault(name, []).append(values[..., len(known) :])
        length = max(one.shape[-1] for one in columns["input_ids"])
        inputs = {name: _padded(values, length) for name, values in columns.items()}
        ids = inputs["input_ids"]
        inputs["attention_mask"] = torch.cat([known_real.long(), inputs["attention_mask"]], dim=1)
        model, family = self.model.hf_model, self.model.family
        everything = {**inputs, "input_ids": torch.cat([before, ids], dim=1)}
        sites = {
            site.name: visual_tokens(model, site.name, family.spans(model, site.name, everything))
            for site in family.sites(model)
        }
        images = self.prompt.images
        shown = tuple(images[owner] for owner in owners) if images else ()
        return Continued(
            inputs, sites, batched, shown, tuple(questions), self.prompt.system, self, owners
        )


@dataclass(frozen=True, eq=False, repr=False)
class Continued(Prompt):
    """Questions about what was read before: their own tokens, and a cache with all the others.

    It can be run as often as you like: each ``model(**prompt)`` gets a fork of its own.
    """

    prefix: Prefix
    pictures: list[int]
    room: Room | None = None
    """What its runs use one after another; each makes its own without."""

    @property
    def reader(self) -> PreTrainedModel:
        """The model that has read the pictures."""
        return self.prefix.model.hf_model

    def __getitem__(self, name: str) -> Any:
        """Return one of the model's inputs."""
        return self.prefix.fork(self.pictures) if name == CACHE else self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the model's inputs."""
        return iter((*self.inputs, CACHE))

    def __len__(self) -> int:
        """Return the number of model inputs."""
        return len(self.inputs) + 1

    def row(self, index: int) -> "Continued":
        """Return one prompt of a batch, padding included.

        Raises:
            PromptError: if there is no such row.
        """
        batch, rows = len(self["input_ids"]), slice(index, index + 1)
        if not 0 <= index < batch:
            raise PromptError(f"there is no prompt {index} in a batch of {batch}. Pass 0 or more.")
        return replace(
            self,
            # The batch is the last axis but one: of positions there may be three for each token.
            inputs={name: one[..., rows, :] for name, one in self.inputs.items()},
            sites={name: found.row(index) for name, found in self.sites.items()},
            batched=False,
            images=self.images[rows],
            questions=self.questions[rows],
            pictures=self.pictures[rows],
            room=None,
        )

    def by_beam(self, beams: int) -> dict[str, Any]:
        """Return the model's inputs with a cache that has as many rows for each prompt."""
        if beams > 1:  # their cache is copied whenever they are reordered
            rows = [picture for picture in self.pictures for _ in range(beams)]
            return {**self.inputs, CACHE: self.prefix.fork(rows)}
        room = self.room or self._own_room()
        return {**self.inputs, CACHE: self.prefix.fork(self.pictures, room)}

    def for_several_runs(self) -> "Continued":
        """Return the same, whose runs use one room after another."""
        return replace(self, room=self._own_room())

    def _own_room(self) -> Room:
        return Room(self.inputs["input_ids"].shape[1])


def read(
    model: LensModel,
    image: ImageLike | Sequence[ImageLike],
    *,
    system: str | None = None,
    prepared: Prepared | None = None,
) -> Prefix:
    """Return a picture, or several, as ``model`` has read it, with what comes before it.

    ``prepared`` knows what it has prepared of pictures before.

    ``image``: a picture, or a list of them for a batch; ``system``: the message before it, where
    the template has a place for one.

    Raises:
        PromptError: if a picture cannot be read, or nothing can be read ahead of the question.

    >>> prefix = cl.read(model, image)
    >>> questions = ["is there a cup in the image?", "is there a car in the image?"]
    >>> cl.generate(model, [(prefix, one) for one in questions]).texts
    ['no', 'no']
    """
    check_arguments(read, model=model)
    prepared = prepared or Prepared(model.processor)
    shown: Any = image
    if image is not None:
        several = isinstance(image, list | tuple)
        shown = prepared.show(image) if several else prepared.show([image])[0]
    once = prepared.processor
    prompt = model.prompt(shown, _ANY_QUESTION, system=system, processor=once)
    return read_prefix(model, prompt, prepared)


@undisturbed()
def read_prefix(model: LensModel, prompt: Prompt, prepared: Prepared | None = None) -> Prefix:
    """Return what a prompt has up to the end of its picture, read by the model.

    ``prepared`` has its pictures, if it was made of some.

    Raises:
        PromptError: if it cannot be read by itself.
    """
    refuse_prefix(model)
    spans = prompt.spans
    ends, starts = last_true(spans.image) + 1, spans.real.long().argmax(dim=1)
    length = int((ends - starts).max())
    place = torch.arange(length, device=ends.device) - length + ends[:, None]
    real = place >= starts[:, None]
    inputs = dict(prompt.inputs)
    for name, values in by_token(model.hf_model, prompt.inputs).items():
        inputs[name] = values.gather(-1, place.clamp_min(0).expand(*values.shape[:-1], -1))
    inputs["attention_mask"] = real.long()
    cut = spans.each(lambda span: span.gather(1, place.clamp_min(0)) & real)
    with readable(prompt):
        return Prefix(model, prompt, read_beginning(model.hf_model, inputs, cut), prepared)


def refuse_prefix(model: LensModel) -> None:
    """Raise PromptError if the beginning of a prompt cannot be read by itself."""
    if model.site.name != "decoder":
        raise PromptError(
            "the Q-Former of this model reads the question with the picture, or is edited for it, "
            "so there is nothing to read ahead of it. Pass model.prompt(image, question)."
        )
    cache = DynamicCache(config=model.hf_model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise PromptError(
            "some layers of this model keep a window or a recurrent state in place of every "
            "position's keys, so what was read cannot be continued from. Pass "
            "model.prompt(image, question)."
        )


def by_token(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs that have a column for each token, positions among them."""
    found = {name: inputs[name] for name in BY_TOKEN if name in inputs}
    positions = positions_of(model, inputs)
    return found if positions is None else {**found, "position_ids": positions}


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Return rows of one prompt each as a batch, padded on the left."""
    padded = [functional.pad(row, (length - row.shape[-1], 0)) for row in rows]
    return torch.cat(padded, dim=-2)
