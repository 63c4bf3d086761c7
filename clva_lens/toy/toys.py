"""The toys that can be trained: a recipe, what follows it, and how the result is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from clva_lens.ground.registry import Registry
from clva_lens.toy.build import processor
from clva_lens.toy.build_instructblip import save as save_instructblip
from clva_lens.toy.train import CONTROL, NATURAL, ORGANISMS, RECIPE, Advance, Recipe
from clva_lens.toy.train import train as train_llava
from clva_lens.toy.train_instructblip import InstructBlipRecipe
from clva_lens.toy.train_instructblip import train as train_instructblip


class Toy(NamedTuple):
    """One toy model.

    ``train(recipe, folder, advance)`` returns the model; ``save(model, folder)`` writes it with its
    processor. ``steps`` is the field of the recipe that has the steps of the longest stage.
    """

    recipe: Any
    train: Callable[[Any, Path, Advance], Any]
    save: Callable[[Any, Path], None]
    steps: str


def of_toy_world(name: str) -> bool:
    """Return whether a model of this name was trained on the toy world.

    It is a toy's name, with or without what is said of it after a comma ("toy-llava, untrained"),
    or a folder that has the recipe which a training writes.
    """
    return name.partition(",")[0] in TOYS.names() or (Path(name) / RECIPE).is_file()


def _save_llava(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


TOYS = Registry[Toy]("toy")
TOYS.register("toy-llava", Toy(Recipe(), train_llava, _save_llava, "decoder_steps"))
TOYS.register("toy-llava-control", Toy(CONTROL, train_llava, _save_llava, "decoder_steps"))
TOYS.register("toy-llava-natural", Toy(NATURAL, train_llava, _save_llava, "decoder_steps"))
for _name, _recipe in ORGANISMS.items():
    TOYS.register(_name, Toy(_recipe, train_llava, _save_llava, "decoder_steps"))
TOYS.register(
    "toy-instructblip",
    Toy(InstructBlipRecipe(), train_instructblip, save_instructblip, "qformer_steps"),
)
