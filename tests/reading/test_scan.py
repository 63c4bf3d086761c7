"""The scan: its numbers are those of the calls that it stands for, and its nulls are nulls."""

import pytest
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.ground.errors import InterventionError, ModelLoadError, PromptError
from clva_lens.toy.scenes import render, sample_scenes


@pytest.fixture(scope="module")
def toy():
    return cl.load("toy-llava", check=False)


def scanned(model, prompt, **options):
    return cl.scan(model, prompt, progress=False, **options)


def by_words(scan):
    """Its findings by what they are about."""
    words = {
        "mass": "looks most",
        "object": "the object",
        "drift": "the last layer",
        "lens": "lens",
    }
    words |= {"parts": "adds", "layers": "image from layers", "heads": "sensitive heads"}
    return {
        name: next((one for one in scan.findings if word in one.sentence), None)
        for name, word in words.items()
    }


def test_a_trained_model_has_findings_beyond_their_nulls(toy):
    sample = next(s for s in BENCHMARKS.get("pope/toy/random").samples() if s.label == "yes")
    prompt = toy.prompt(sample.image, sample.question)
    seen = scanned(toy, prompt)
    found = by_words(seen)
    logits = cl.trace_attention(toy, prompt).logits.softmax(dim=-1)
    assert seen.answer == "yes" and seen.probability == pytest.approx(float(logits.max()))
    first, last, left = min(seen.knock_outs, key=lambda one: one[2])
    method = cl.KnockOut(layers=range(first, last + 1))
    without = cl.trace_attention(toy, prompt, method).logits.softmax(dim=-1)
    assert left == pytest.approx(float(without[logits.argmax()]), abs=1e-6)
    assert found["layers"].value == pytest.approx(seen.probability - left)
    assert f"layers {first}–{last} costs 'yes' {100 * found['layers'].value:.0f}" in repr(seen)
    trace = cl.trace_attention(toy, prompt)
    assert found["mass"].value == pytest.approx(float(trace.intensity.mean(dim=-1).max()))
    parts = cl.direct_logit_attribution(toy, prompt, int(logits.argmax()))
    assert f"adds {float(parts.image.sum()):+.2f}" in found["parts"].sentence
    for name in ("mass", "layers", "heads", "lens", "parts"):
        assert found[name].value > found[name].null + 0.02, name
    gaps = [abs(one.value - one.null) for one in seen.findings]
    assert gaps == sorted(gaps, reverse=True) and seen.left_out == ()
    assert seen._repr_png_().startswith(b"\x89PNG")
    assert scanned(toy, (sample.image, sample.question)).findings == seen.findings


def test_where_there_is_nothing_the_null_is_as_large(toy):
    """A picture of one colour is its own null, and so are random patches for an object."""
    blank = torch.zeros(3, 64, 64)
    means = torch.tensor(toy.images.image_mean)
    prompt = toy.prompt((blank + means[:, None, None]).permute(1, 2, 0).numpy(), QUESTIONS[0])
    assert prompt["pixel_values"].abs().max() < 0.02
    mask = torch.rand(64, generator=torch.Generator().manual_seed(1)) < 0.2
    found = by_words(scanned(toy, prompt, objects=mask))
    for name in ("mass", "lens", "parts"):
        assert found[name].value == pytest.approx(found[name].null, abs=0.02), name
    assert abs(found["object"].value - found["object"].null) < 0.15


def test_the_object_is_pointed_at(toy):
    gains = []
    for scene in sample_scenes(6, 77):
        kind = next(iter(scene.kinds))
        prompt = toy.prompt(render(scene), f"is there a {kind} in the image?")
        found = by_words(scanned(toy, prompt, objects=torch.tensor(scene.patches(kind)).flatten()))
        gains.append(found["object"].value - found["object"].null)
    assert sum(gains) / len(gains) > 0.2


def test_what_a_model_does_not_let_one_look_at_is_left_out():
    seen = scanned(blip_of("sdpa", "t5"), (picture(0), QUESTIONS[0]))
    assert seen.trace.site == "qformer" and len(seen.findings) >= 3
    assert all(": " in one and one.endswith(".") for one in seen.left_out)
    assert all(f"left out: {one}" in repr(seen) for one in seen.left_out)


def test_it_is_refused_in_words():
    lens = lens_of("full", "sdpa")
    both = lens.prompt([picture(0)] * 2, list(QUESTIONS[:2]))
    with pytest.raises(PromptError, match=r"one prompt with its pixels is scanned"):
        scanned(lens, both)
    with pytest.raises(ModelLoadError, match=r"needs the tokenizer. Pass cl.load"):
        scanned(lens.hf_model, both.row(0))
    with (
        pytest.raises(InterventionError, match=r"scan was called inside a trace"),
        lens.trace(both),
    ):
        scanned(lens, both.row(0))
