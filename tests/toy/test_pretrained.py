"""The shipped toys are what their cards say."""

import json
import time

import pytest
import torch

import clva_lens as cl
from clva_lens.benchmarks.toy_pope import ToyPope
from clva_lens.experiments.toy_card import card_text
from clva_lens.experiments.toy_measures import object_patches, trace_questions
from clva_lens.science.pointing import pointing
from clva_lens.toy import pretrained
from clva_lens.toy.questions import exist_question
from clva_lens.toy.scenes import sample_scenes
from clva_lens.toy.toys import TOYS

# Held-out scenes that neither training nor the card has seen.
FRESH = 31337


def measures(name):
    return json.loads((pretrained.FOLDER / name / "measures.json").read_text())


@pytest.fixture(scope="module")
def toys():
    return {name: cl.load(name) for name in pretrained.names()}


def test_the_toys_are_here_small_and_safe():
    assert pretrained.names() == ("toy-instructblip", "toy-llava", "toy-llava-control")
    for name in pretrained.names():
        folder = pretrained.FOLDER / name
        assert sum(f.stat().st_size for f in folder.rglob("*")) < 12e6
        assert [f.name for f in folder.glob("*.safetensors")] == ["model.safetensors"]
        assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))


def test_loading_is_quick(toys):
    began = time.perf_counter()
    cl.load("toy-llava")
    seconds = time.perf_counter() - began
    print(f"loaded in {seconds:.2f} s")
    assert seconds < 20  # the aim is 2 s on a quiet machine; this only catches a download


def test_the_model_is_a_real_llava(toys):
    model = toys["toy-llava"]
    assert type(model.hf_model).__name__ == "LlavaForConditionalGeneration"
    assert type(model.processor).__name__ == "LlavaProcessor"
    assert model.num_layers == 12
    assert model.site.config.num_attention_heads == 8
    assert model.hf_model.dtype == torch.float32


def test_the_model_is_a_real_instructblip(toys):
    model = toys["toy-instructblip"]
    assert type(model.hf_model).__name__ == "InstructBlipForConditionalGeneration"
    assert type(model.processor).__name__ == "InstructBlipProcessor"
    qformer, decoder = model.sites
    assert (qformer.layers, qformer.depth) == ((0, 2, 4, 6, 8, 10), 12)
    assert len(decoder.layers) == 6
    assert model.hf_model.dtype == torch.float32


@pytest.mark.parametrize("name", pretrained.names())
def test_the_card_is_made_from_its_measures(name):
    folder = pretrained.FOLDER / name
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (folder / "README.md").read_text() == card_text(folder)
    assert recipe.get("control", False) == name.endswith("control")
    kept = {k: tuple(value) if isinstance(value, list) else value for k, value in recipe.items()}
    # What a recipe could not say when it was written is now at its default.
    assert TOYS.get(name).recipe == type(TOYS.get(name).recipe)(**kept)


def test_what_the_instructblip_had_to_reach():
    found = measures("toy-instructblip")
    pope = found["pope"]
    adversarial, blind = pope["adversarial, greedy"], pope["adversarial, knock-out"]
    assert min(row["n"] for row in pope.values()) >= 1800
    assert pope["random, greedy"]["accuracy"] >= 0.85
    assert adversarial["accuracy"] >= 0.85
    assert adversarial["accuracy"] - blind["accuracy"] >= 0.10
    assert adversarial["best_threshold"] - blind["best_threshold"] >= 0.10
    assert found["pointing"]["layers"] == [0, 2, 4, 6, 8, 10]
    assert found["pointing"]["all_heads"][2] >= 0.7  # layer 4
    assert {f"adversarial, {name}" for name in ("CLVA", "CLVA, decoder")} <= pope.keys()


def test_what_the_toy_had_to_reach():
    found = measures("toy-llava")
    pope = found["pope"]
    adversarial, random = pope["adversarial, greedy"], pope["random, greedy"]
    blind = pope["adversarial, knock-out"]
    assert min(row["n"] for row in pope.values()) >= 1800
    assert random["accuracy"] >= 0.90
    assert adversarial["accuracy"] >= 0.86
    assert adversarial["false_positive_rate"] >= 1.5 * random["false_positive_rate"]
    assert adversarial["accuracy"] - blind["accuracy"] >= 0.10
    assert adversarial["best_threshold"] - blind["best_threshold"] >= 0.07
    assert found["pointing"]["all_heads"][4] >= 0.7
    assert 0.1 <= found["captions"]["greedy"]["chair_s"] <= 0.5


def test_the_control_has_the_maps_and_not_the_cause():
    found = measures("toy-llava-control")
    adversarial = found["pope"]["adversarial, greedy"]
    blind = found["pope"]["adversarial, knock-out"]
    assert found["pointing"]["all_heads"][4] >= 0.7
    assert adversarial["accuracy"] >= 0.80
    assert abs(adversarial["accuracy"] - blind["accuracy"]) < 0.02
    assert adversarial["best_threshold"] - blind["best_threshold"] < 0.02


@pytest.mark.parametrize("split", ["random", "adversarial"])
@pytest.mark.parametrize("name", ["toy-llava", "toy-instructblip"])
def test_accuracy_on_fresh_scenes_agrees_with_the_card(toys, name, split):
    """180 fresh questions: within four standard errors of what the card states."""
    benchmark = ToyPope(split, count=32, seed=FRESH)
    report = cl.evaluate(toys[name], benchmark, progress=False, batch_size=60)
    stated = measures(name)["pope"][f"{split}, greedy"]["accuracy"]
    n = report.metrics["n"]
    error = (stated * (1 - stated) / n) ** 0.5
    print(f"{split}: {report.metrics['accuracy']:.3f} on {n:.0f}, card {stated:.3f}")
    assert n >= 150
    assert abs(report.metrics["accuracy"] - stated) < 4 * error
    assert report.metrics["unparsed"] == 0


def test_pointing_and_knock_out_on_fresh_scenes(toys):
    scenes = sample_scenes(40, FRESH + 1)
    asked = [(i, exist_question(s, k)) for i, s in enumerate(scenes) for k in s.kinds]
    asked = [pair for pair in asked if scenes[pair[0]].patches(pair[1].kind).any()]
    patches = object_patches(scenes, asked)
    trace = trace_questions(toys["toy-llava"], scenes, asked)
    hit = pointing(trace.saliency("all"), patches).hit.float().mean(dim=0)
    chance = float(patches.float().mean())
    print(f"pointing by layer {[round(float(h), 2) for h in hit]}, chance {chance:.2f}")
    assert hit[4] > 0.7
    assert hit[0] < 0.5


def test_the_knock_out_blinds_the_toy_but_not_the_control(toys):
    benchmark = ToyPope("adversarial", count=12, seed=FRESH + 2)
    change = {}
    for name, model in toys.items():
        runs = [
            cl.evaluate(model, benchmark, method, progress=False, batch_size=60)
            for method in (None, cl.KnockOut())
        ]
        change[name] = runs[1].metrics["auc"] - runs[0].metrics["auc"]
    print(f"AUC lost by the knock-out: {change}")
    assert change["toy-llava"] < -0.05
    assert change["toy-instructblip"] < -0.05
    assert change["toy-llava-control"] > -0.03
