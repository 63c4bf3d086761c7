"""A method by its name, heads however they are named, and parameters of the wrong kind."""

from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from tiny_models import lens_of

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.ground.errors import ClvaLensError, ParameterError, UnknownName
from clva_lens.lens.decoding import DECODINGS
from clva_lens.methods.base import METHODS, as_method

SCALE = "ln_final.hook_scale"
OWNERS = [*(kind for _, kind in METHODS.items()), *(kind for _, kind in DECODINGS.items())]
OWNERS += sorted({type(one) for _, one in BENCHMARKS.items()}, key=lambda kind: kind.__name__)


class Odd:
    """No parameter is of this kind."""


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(owner, field.name, id=f"{owner.__name__}-{field.name}")
        for owner in OWNERS
        for field in fields(owner)
        if field.init
    ],
)
def test_a_parameter_of_the_wrong_kind_is_named(untyped, owner, name):
    """Every field of every method, decoding and benchmark."""
    needed = {f.name: "coco" for f in fields(owner) if f.default is MISSING and f.init}
    with pytest.raises(ClvaLensError, match=rf"\b{name} must be "):
        owner(**{**needed, name: Odd()})
    hint = get_type_hints(owner)[name]
    if str not in (hint, *get_args(hint)):
        with pytest.raises(ClvaLensError, match=rf"\b{name} must be "):
            owner(**{**needed, name: "a word"})


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**70])
def test_a_number_that_no_tensor_holds(untyped, value):
    for make in (
        lambda: cl.CLVA(alpha=value),
        lambda: cl.Sampling(seed=value),
        lambda: cl.Beam(num_beams=value),
    ):
        with pytest.raises(ParameterError, match=rf"must fit into 64 bits, but is {value}"):
            make()
    assert cl.Sampling(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize("size", ["8", 2.5, None, True])
def test_a_batch_size_of_the_wrong_kind(one, ask, untyped, size):
    for call in (
        lambda: cl.generate(one, ask(one), batch_size=size),
        lambda: cl.evaluate(one, "pope/toy/random", batch_size=size),
    ):
        with pytest.raises(ParameterError, match="batch_size must be an integer, but is"):
            call()


def test_numbers_and_sequences_of_others_become_pythons_own(untyped):
    made = cl.CLVA(alpha=np.float32(0.5), layers=np.array([7, 8]), negative_layer=np.int64(1))
    assert made == cl.CLVA(alpha=0.5, layers=(7, 8), negative_layer=1)
    assert [type(one) for one in (made.alpha, made.layers, made.negative_layer)] == [
        float,
        tuple,
        int,
    ]
    assert cl.KnockOut(layers=range(3, 5)).layers == (3, 4)


# ── names ──


@pytest.mark.parametrize("name", METHODS.names())
def test_a_name_is_the_method_with_its_defaults(name):
    for spelled in (name, name.upper(), name.title()):
        assert as_method(spelled) == METHODS.get(name)()
    assert cl.compose(name, None, "none") == cl.compose(METHODS.get(name)())


def test_every_function_takes_a_name(one, ask):
    prompt, method = ask(one), cl.KnockOut()

    def plain(given):
        with torch.inference_mode(), cl.intervening(one, given):
            return one.hf_model(**prompt.inputs).logits

    def traced(given):
        with one.trace(prompt):
            cl.intervene(given)
            seen = one.output.logits.save()
        return seen.clone()

    calls = {
        "intervening": plain,
        "intervene": traced,
        "trace_attention": lambda given: cl.trace_attention(one, prompt, given).intensity,
        "composed_saliency": lambda given: cl.composed_saliency(one, prompt, given),
        "head_means": lambda given: cl.head_means(one, [prompt], given).values,
        "logit_lens": lambda given: cl.logit_lens(one, prompt, method=given).margin,
        "run_with_cache": lambda given: one.run_with_cache(
            prompt, "ln_final.hook_scale", method=given
        )[0],
        "generate": lambda given: torch.tensor(cl.generate(one, prompt, given).margins),
    }
    for name, call in calls.items():
        by_name, bare = call("KnockOut"), call(None)
        assert torch.equal(by_name, call(method)), name
        assert not torch.equal(by_name, bare), name
        with pytest.raises(UnknownName, match="Did you mean 'knockout'"):
            call("knokout")


def test_a_run_under_a_name_is_recorded_as_the_method(one):
    made = [
        cl.evaluate(one, name, method, limit=2, progress=False)
        for name, method in (("pope/toy/random", cl.CLVA()), ("POPE/Toy/random", "Clva"))
    ]
    for report in made:
        report.record.pop("seconds")
    assert made[0].record == made[1].record
    assert made[0].rows == made[1].rows


@pytest.mark.parametrize(("given", "advice"), [(cl.CLVA, r"CLVA\(\)"), (3, "'clva'")])
def test_neither_a_method_nor_a_name(untyped, given, advice):
    with pytest.raises(ParameterError, match=f"method must be a method.*Pass method={advice}"):
        as_method(given)


# ── heads ──

PAIRS = [(6, 1), (6, 3), (9, 0)]


def same_heads() -> dict:
    """The same three heads, named in every way."""
    mask = torch.zeros(12, 4, dtype=torch.bool)
    mask[tuple(zip(*PAIRS, strict=True))] = True
    return {
        "mask": mask,
        "array": mask.numpy(),
        "table": mask.tolist(),
        "pairs": PAIRS,
        "lists": [list(pair) for pair in PAIRS],
        "indices": mask.nonzero(),
        "by layer": {6: [1, 3], 9: [0]},
        "by layer, tuples": {9: (0,), 6: (3, 1)},
    }


@pytest.mark.parametrize("way", same_heads())
def test_heads_are_the_same_however_they_are_named(untyped, way):
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(np.full((8, 8, 3), 90, dtype=np.uint8), "Is there a cup?")
    other = lens.prompt(np.full((8, 8, 3), 200, dtype=np.uint8), "Is there a cup?")
    given, mask = same_heads()[way], same_heads()["mask"]
    trace = cl.trace_attention(lens, prompt)
    assert torch.equal(trace.saliency(given), trace.saliency(mask))
    assert torch.equal(
        cl.composed_saliency(lens, prompt, heads=given),
        cl.composed_saliency(lens, prompt, heads=mask),
    )
    cache = lens.run_with_cache(other, lambda name: name.endswith("hook_z")).cache

    def logits(heads, make):
        with torch.inference_mode(), cl.intervening(lens, make(heads)):
            return lens.hf_model(**prompt.inputs).logits

    for make in (
        lambda heads: cl.KnockOut(heads=heads),
        lambda heads: cl.AblateHeads(heads=heads),
        lambda heads: cl.CLVA(tau=1.0, positive_layer=9, negative_layer=6, heads=heads),
        lambda heads: cl.PatchActivations(source=other, cache=cache, part="z", heads=heads),
    ):
        assert torch.equal(logits(given, make), logits(mask, make))


def test_clva_takes_each_anchors_heads_from_its_layer(one, ask):
    classes = cl.HeadClasses.from_indices({6: [1]}, {0: [2]}, layers=12, heads=4)
    size = {"tau": 1.0, "positive_layer": 6}
    by_pairs = cl.trace_attention(one, ask(one), cl.CLVA(heads=[(6, 1), (0, 2)], **size))
    by_classes = cl.trace_attention(one, ask(one), cl.CLVA(heads=classes, **size))
    other = cl.trace_attention(one, ask(one), cl.CLVA(heads=[(6, 0), (0, 2)], **size))
    assert torch.equal(by_pairs.intensity, by_classes.intensity)
    assert not torch.equal(by_pairs.intensity, other.intensity)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(12, 0)], "heads names layer 12, but the layers are 0 to 11"),
        ({3: [4]}, "heads names head 4 of layer 3, but the heads are 0 to 3"),
        ([(3, -1)], "heads names head -1 of layer 3"),
        (torch.ones(3, 4, dtype=torch.bool), r"heads is for \(3, 4\).*has \(12, 4\)"),
        ([(1, 2, 3)], r"pairs \(layer, head\)"),
        ({3: 1}, r"pairs \(layer, head\)"),
        (5, r"pairs \(layer, head\)"),
    ],
)
def test_heads_that_are_not_there(one, ask, untyped, heads, message):
    trace = cl.trace_attention(one, ask(one))
    with pytest.raises(ParameterError, match=message):
        trace.saliency(heads)
    for kind in (cl.KnockOut, cl.AblateHeads, cl.CLVA):
        with pytest.raises(ParameterError, match=message), cl.intervening(one, kind(heads=heads)):
            pass
