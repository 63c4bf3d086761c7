"""Where toy-llava keeps an object: the same scene with and without it, patched layer by layer."""

from dataclasses import replace

import pytest
import torch

import clva_lens as cl
from clva_lens.toy.scenes import render, sample_scenes


@pytest.fixture(scope="module")
def model():
    return cl.load("toy-llava")


@pytest.fixture(scope="module")
def pairs(model):
    """(scene, thing, prompt with it, prompt without it) that the model answers yes and no."""
    found = []
    for scene in sample_scenes(60, seed=7):
        single = [t for t in scene.things if not t.faint and len(scene.of_kind(t.kind)) == 1]
        if len(scene.things) < 3 or not single:
            continue
        thing = single[0]
        rest = replace(scene, things=tuple(one for one in scene.things if one is not thing))
        question = f"Is there a {thing.kind} in the image?"
        prompts = [model.prompt(render(one), question) for one in (scene, rest)]
        margins = cl.generate(model, prompts, decoding=cl.Greedy(max_new_tokens=1)).margins
        with_it, without = (float(margin or 0) for margin in margins)
        if with_it > 1 and without < -1:
            found.append((scene, thing, *prompts))
        if len(found) == 2:
            return found
    raise AssertionError(f"only {len(found)} pairs")


def test_the_image_tokens_hold_the_object_early_and_the_last_row_late(model, pairs):
    for _, thing, source, target in pairs:
        result = cl.patch_activations(model, source, target)
        image, _, last = result.normalised.T
        print(thing.kind, [round(float(x), 2) for x in image], [round(float(x), 2) for x in last])
        assert (image[:5] > 0.95).all()  # all that differs: "yes" is restored
        assert (result.values[:5, 0] > 0).all()
        assert (last[:4].abs() < 0.1).all()
        assert (last[9:] > 0.9).all()
        assert (image[10:].abs() < 0.1).all()


def test_of_the_image_tokens_those_of_the_object(model, pairs):
    for scene, thing, source, target in pairs:
        result = cl.patch_activations(
            model, source, target, layers=[4], spans="image", each="position"
        )
        effect = result.on_grid()[0]
        on = torch.from_numpy(scene.patches(thing.kind))
        assert on.flatten()[effect.flatten().argmax()]
        touched = torch.zeros(64, 64, dtype=torch.bool)
        touched[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size] = True
        touched = touched.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).any(dim=2)
        off = effect[~touched].abs()
        print(f"on it {float(effect[on].max()):.2f}, off {float(off.quantile(0.95)):.3f}")
        assert float(effect[on].max()) > 0.5
        # The vision tower's own attention carries some of it to a patch or two elsewhere.
        assert float(off.quantile(0.95)) < 0.1
