"""The procedural world: what is asked agrees with what is drawn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clva_lens.benchmarks.toy_pope import ToyPope
from clva_lens.toy.questions import (
    SPLITS,
    caption,
    count_questions,
    pope_questions,
    side_questions,
    skill_questions,
)
from clva_lens.toy.scenes import (
    COLORS,
    GLYPHS,
    IMAGE_SIZE,
    KINDS,
    PATCH_SIZE,
    Scene,
    Thing,
    presence,
    render,
    sample_scenes,
)


@settings(max_examples=25)
@given(st.integers(0, 2**20))
def test_a_seed_is_a_scene_and_its_pixels(seed):
    first, second = sample_scenes(1, seed)[0], sample_scenes(1, seed)[0]
    assert first == second
    np.testing.assert_array_equal(render(first), render(second))
    assert 2 <= len(first.kinds) <= 5
    assert len(first.things) <= 6
    for thing in first.things:
        assert 0 <= thing.x <= IMAGE_SIZE - thing.size
        assert 0 <= thing.y <= IMAGE_SIZE - thing.size


def test_glyphs_are_distinct():
    pairs = [(a, b) for a in KINDS for b in KINDS if a < b]
    assert min(int((GLYPHS[a] ^ GLYPHS[b]).sum()) for a, b in pairs) >= 8


def test_an_object_changes_the_pixels_where_its_mask_is():
    thing = Thing("ball", "red", 16, 24, 16, 1.0)
    with_ball, without = render(Scene(0, (thing,), 5)), render(Scene(0, (), 5))
    changed = (with_ball != without).any(axis=2)
    patches = Scene(0, (thing,), 5).patches("ball")
    # 16 pixels from a corner on the 8-pixel grid: exactly 2 × 2 patches.
    assert patches.sum() == 4
    grown = patches.repeat(PATCH_SIZE, 0).repeat(PATCH_SIZE, 1)
    assert changed[grown].mean() > 0.5
    assert not changed[~grown].any()


@pytest.mark.parametrize("split", SPLITS)
def test_pope_questions_are_balanced_and_true(split):
    scenes = sample_scenes(60, 11)
    asked = pope_questions(scenes, split, seed=3)
    answers = [question.answer for _, question in asked]
    assert answers.count("yes") * 2 == len(answers)
    for index, question in asked:
        assert (question.kind in scenes[index].kinds) == (question.answer == "yes")
    assert len(asked) == len({(i, q.kind) for i, q in asked})


def test_splits_share_positives_and_grow_harder():
    scenes = sample_scenes(200, 12)
    asked = {split: pope_questions(scenes, split, seed=3) for split in SPLITS}
    yes = {s: [pair for pair in asked[s] if pair[1].answer == "yes"] for s in SPLITS}
    assert yes["random"] == yes["popular"] == yes["adversarial"]
    prior = {
        split: np.mean(
            [
                presence(scenes[i].place)[KINDS.index(q.kind)]
                for i, q in asked[split]
                if q.answer == "no"
            ]
        )
        for split in SPLITS
    }
    assert prior["random"] < prior["popular"] < prior["adversarial"]


def test_a_caption_names_every_kind_once():
    for scene in sample_scenes(30, 5):
        words = caption(scene).answer.replace(",", "").replace(".", "").split()
        assert [word for word in words if word in KINDS] == list(scene.kinds)


@pytest.mark.parametrize("skill", ["color", "count", "side"])
def test_skill_tests_are_balanced(skill):
    asked = skill_questions(skill, sample_scenes(400, 6), seed=1, count=60)
    answers = [question.answer for _, question in asked]
    assert len(set(answers)) == {"color": len(COLORS), "count": 3, "side": 2}[skill]
    assert len({answers.count(answer) for answer in set(answers)}) == 1


def test_counts_and_sides_are_those_of_the_scene():
    for scene in sample_scenes(60, 8):
        for question in count_questions(scene):
            number = ("one", "two", "three").index(question.answer) + 1
            assert len(scene.of_kind(question.kind)) == number
        for question in side_questions(scene):
            (thing,) = scene.of_kind(question.kind)
            assert (thing.x + thing.size / 2 < IMAGE_SIZE / 2) == (question.answer == "left")


def test_the_benchmark_is_the_questions():
    benchmark = ToyPope("adversarial", count=20)
    samples = benchmark.samples()
    assert samples == benchmark.samples()
    assert {s.group for s in samples} == {str(i) for i in range(20)}
    limited = benchmark.samples(limit=18, seed=1)
    assert len(limited) == 18
    assert {s.id for s in limited} <= {s.id for s in samples}


def test_held_out_scenes_are_not_training_scenes():
    held = {scene.noise_seed for scene in ToyPope("random").scenes}
    drawn = set()
    for stage in (0, 1, 2):
        for step in range(50):
            from clva_lens.toy.scenes import sample_scene

            drawn.add(sample_scene(np.random.default_rng([0, stage, step])).noise_seed)
    assert not held & drawn


def test_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    render(sample_scenes(1, 3)[0])
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
