"""What a processor makes of a picture that it was given before is what it makes of it again."""

import numpy as np
import pytest
import torch
from real_families import REAL
from real_processors import make_model, make_processor
from survey_table import PROVEN
from test_real_processors import QUESTION, available, photo, pytestmark  # noqa: F401

import clva_lens as cl
from clva_lens.ground.errors import ClvaLensError
from clva_lens.models import once
from clva_lens.models.once import Prepared


def as_asked(lens, images, questions, processor=None):
    """The inputs of a batch, or of each by itself where a batch is refused."""
    try:
        return [lens.prompt(images, questions, processor=processor).inputs]
    except (ClvaLensError, ValueError):
        asked = zip(images, questions, strict=True)
        return [lens.prompt(*one, processor=processor).inputs for one in asked]


@pytest.mark.parametrize("kind", available(set(PROVEN) & set(REAL) - {"shieldgemma2"}))
def test_prepared_is_what_it_was(kind):
    """By every real processor: alone, together, unequal, twice, one after another."""
    lens = cl.load((make_model(kind, REAL[kind]), make_processor(REAL[kind])), check=False)
    prepared = Prepared(lens.processor)
    wide, other, high = photo(64, 112), photo(64, 112, 1), photo(112, 64, 2)
    several = ([wide], [wide, wide, other], [other], [high, wide, wide], [wide])
    for images in several:
        questions = [f"{QUESTION} {i}" for i in range(len(images))]
        wanted = as_asked(lens, images, questions)
        found = as_asked(lens, prepared.show(images), questions, prepared.processor)
        for one, made in zip(found, wanted, strict=True):
            assert one.keys() == made.keys()
            assert all(torch.equal(one[name], made[name]) for name in made)


class Padding:
    """An image processor that brightens pictures by their number in the call."""

    def __call__(self, images, **_):
        made = [torch.full((3, 4, 4), float(i)) for i, _ in enumerate(images)]
        return once.BatchFeature({"pixel_values": torch.stack(made)})


def test_pictures_that_depend_on_one_another():
    """Two of noise tell: such a processor is given all pictures of a call, as it was."""
    pair = [np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)]
    prepared = Prepared(type("Its", (), {"image_processor": Padding()})())
    shown = [one.read() for one in prepared.show(pair)]
    found = prepared.processor.image_processor(shown)["pixel_values"]
    assert found.amax(dim=(1, 2, 3)).tolist() == [0, 1]
