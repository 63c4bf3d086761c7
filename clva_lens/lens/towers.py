"""A picture that the vision tower reads once, for the questions of a batch and of the next ones.

Where a Q-Former stands between picture and language model, no beginning of a prompt is the same for
all questions about a picture: InstructBLIP's reads the question with it. What comes before the
question is the vision tower (and BLIP-2's Q-Former, which reads none). It is run on the pictures
that differ, and its outputs are repeated for the rows that show them: exactly what it puts out for
a batch of them.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from clva_lens.engine.run import open_sessions
from clva_lens.models.belonging import Owned, hook_after, hook_before, opening
from clva_lens.models.family import find_family
from clva_lens.models.prompt import Prompt
from clva_lens.models.weights import weights_state


class TowerReadings:
    """What the modules that see pictures only made of the last pictures, by picture."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._made: dict[int, dict[Hashable, list[Any]]] = {}
        self._weights: int | None = None

    def keep(self, model: PreTrainedModel, pictures: Sequence[Hashable]) -> None:
        """Forget all other pictures, and everything if the model's weights were changed."""
        weights = weights_state(model)
        for made in self._made.values():
            for key in made.keys() - (set(pictures) if weights == self._weights else set()):
                del made[key]
        self._weights = weights

    def of(self, module: nn.Module) -> dict[Hashable, list[Any]]:
        """Return what a module has put out, a row each; the caller adds to it."""
        return self._made.setdefault(id(module), {})


@dataclass(frozen=True, eq=False, repr=False)
class TowerPrompt(Prompt):
    """A batch whose rows show ``pictures``; what was read of them stands in ``readings``."""

    pictures: tuple[Hashable, ...]
    readings: TowerReadings

    @classmethod
    def of(
        cls, prompt: Prompt, pictures: Sequence[Hashable], readings: TowerReadings
    ) -> "TowerPrompt":
        """Return a prompt that knows which picture each of its rows shows."""
        own = {field.name: getattr(prompt, field.name) for field in fields(prompt)}
        return cls(**own, pictures=tuple(pictures), readings=readings)


@contextmanager
def pictures_read_once(model: PreTrainedModel, prompt: Prompt) -> Iterator[None]:
    """Have a picture of a ``TowerPrompt`` read once in the ``with`` block, other prompts as ever.

    It begins after the run's methods, which see the pictures of all rows. A module where one of
    them acts is left alone, and all are where one edits the tower.
    """
    sessions = open_sessions(model)
    if not isinstance(prompt, TowerPrompt) or any(one.edits_tower for one in sessions):
        yield
        return
    family = find_family(model)
    acting = {session.site for session in sessions}
    taken = [site.passes().entry for site in family.sites(model) if site.name in acting]
    modules = [one for one in family.seeing(model) if not any(one is other for other in taken)]
    prompt.readings.keep(model, prompt.pictures)
    readings = [_Reading(module, prompt) for module in modules]
    try:
        for reading in readings:
            reading.begin()
        yield
    finally:
        for reading in readings:
            reading.end()


class _Reading(Owned):
    """One module in one block: rows of pictures that were not read yet go in, all rows come out."""

    def __init__(self, module: nn.Module, prompt: TowerPrompt) -> None:
        super().__init__([module])
        self.module, self.pictures = module, prompt.pictures
        self.made = prompt.readings.of(module)
        self._new: list[int] | None = None
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        self.enter()
        with opening(self):
            self._handles = [
                hook_before(self.module, self._narrow),
                hook_after(self.module, self._widen),
            ]
            layers = getattr(self.module, "encoder", None)
            if layers is not None:
                self._handles.append(hook_before(layers, self._shrink))

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.leave()

    def _narrow(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Leave the rows of new pictures in the arguments; all, if they are not of these rows."""
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        self._new = None
        if not given or any(one.ndim == 0 or len(one) != len(self.pictures) for one in given):
            return None
        first = {key: self.pictures.index(key) for key in self.pictures}
        self._new = [row for key, row in first.items() if key not in self.made]
        # No module takes a batch of none: where nothing is new, one row goes in for nothing.
        chosen = torch.tensor(self._new or [0], device=given[0].device)
        return tree_map(lambda one: _rows(one, chosen), (args, kwargs or {}))

    def _shrink(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        """Have a tower read one token where nothing is new: what it makes is not taken."""
        tokens = (kwargs or {}).get("inputs_embeds")
        if self._new != [] or tokens is None:
            return None
        return args, {**kwargs, "inputs_embeds": tokens[:, :1]}

    def _widen(self, _: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Keep what was made of new pictures; return what belongs to each row."""
        if self._new is None:
            return None
        leaves, shape = tree_flatten(out)
        for place, row in enumerate(self._new):
            self.made[self.pictures[row]] = [
                one[place : place + 1] if isinstance(one, Tensor) else one for one in leaves
            ]
        rows = zip(*(self.made[key] for key in self.pictures), strict=True)
        whole = [torch.cat(one) if isinstance(one[0], Tensor) else one[0] for one in rows]
        return tree_unflatten(whole, shape)


def _rows(value: Any, rows: Int[Tensor, " row"]) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) else value
