"""Gradients are a promise: through methods and observers, and in layers that are computed twice."""

import copy
from functools import cache, partial

import pytest
import torch
from tiny_models import QUESTIONS, double_of, lens_of, make_processor, picture, tiny_model
from torch.utils.checkpoint import checkpoint

import clva_lens as cl
from clva_lens.ground.errors import InterventionError
from clva_lens.methods.base import METHODS

ACTING = [name for name in METHODS.names() if name != "opera"]  # it decodes by itself
EDITS_LAYERS = {
    *("ablation", "ascd", "averaged-anchors", "clearsight", "clva", "ed", "head-guided", "imccd"),
    *("knockout", "memvr", "only", "pai", "sid", "visflow", "vista"),
}


@cache
def exact():
    """A float64 model of this file's own, since its weights are moved."""
    return cl.load((copy.deepcopy(double_of("full")), make_processor()))


def inputs_of(lens):
    asked = lens.prompt(picture(0), QUESTIONS[0]).inputs
    return {k: v.double() if v.is_floating_point() else v for k, v in asked.items()}


# By default AGLA cuts off all tokens but one here, whose log-probability is 0 whatever the weights.
GIVEN = {"agla": {"beta": 0.01}}


def opened(lens, name):
    return cl.intervening(lens, *([METHODS.get(name)(**GIVEN.get(name, {}))] if name else []))


def of_logits(lens, name):
    with opened(lens, name):
        last = lens.hf_model(**inputs_of(lens)).logits[0, -1]
    wanted = torch.linspace(-1, 1, 64, dtype=torch.float64)
    return (last.log_softmax(dim=-1).where(last.isfinite(), 0.0) * wanted).sum()


def of_attention(lens, name):
    with opened(lens, name), cl.observing(lens) as seen:
        lens.hf_model(**inputs_of(lens))
    return (seen.trace.maps[5:].double() * torch.linspace(0, 1, 16)).sum()


@pytest.mark.parametrize(
    ("loss", "name"),
    [*((of_logits, name) for name in (None, *ACTING))]
    + [(of_attention, name) for name in (None, "clva", "pai")],
)
def test_slope_is_the_difference(loss, name):
    """Autograd's slope along a direction in the weights is what small steps along it give."""
    lens = exact()
    decoder = lens.hf_model.model.language_model
    weights = [decoder.layers[i].self_attn.q_proj.weight for i in (0, 3, 7)]
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(one.shape, generator=generator).double() for one in weights]
    lens.hf_model.zero_grad()
    loss(lens, name).backward()
    slope = sum(float((one.grad * way).sum()) for one, way in zip(weights, ways, strict=True))
    kept, found, step = [one.detach().clone() for one in weights], [], 1e-5
    with torch.no_grad():
        for side in (step, -step):
            for one, old, way in zip(weights, kept, ways, strict=True):
                one.copy_(old + side * way)
            found.append(float(loss(lens, name)))
        for one, old in zip(weights, kept, strict=True):
            one.copy_(old)
    # Norms and methods compute in float32, which leaves some 1e-7 / step of noise.
    assert slope == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.05, abs=1.0)
    assert slope != 0


@cache
def trained():
    lens = cl.load((tiny_model(), make_processor()))
    lens.hf_model.train()
    return lens


def gradient(within, name, run):
    """The gradient of a loss; backward inside of the block, or after it."""
    lens = trained()
    model, asked = lens.hf_model, dict(lens.prompt(picture(0), QUESTIONS[0]).inputs)
    model.zero_grad()
    with opened(lens, name):
        last = run(partial(model, **asked, use_cache=False))
        loss = last.where(last.isfinite(), 0.0).square().sum()
        if within:
            loss.backward()
    if not within:
        loss.backward()
    return model.model.language_model.layers[3].self_attn.q_proj.weight.grad.clone()


def last_of(call):
    return call().logits[0, -1]


def whole(reentrant, call):
    """The whole model in one checkpoint of the caller's own."""
    something = torch.zeros((), requires_grad=True)
    return checkpoint(lambda _: last_of(call), something, use_reentrant=reentrant)


@pytest.fixture(params=[True, False], ids=["re-entrant", "not re-entrant"])
def reentrant(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["within", "after"])
def within(request):
    return request.param


def same_or_refused(wanted, run):
    try:
        found = run()
    except InterventionError as refused:
        assert "under gradient checkpointing" in str(refused)
        return "refused"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    return "same"


@pytest.mark.parametrize("name", [None, *ACTING])
def test_layers_in_checkpoints(name, within, reentrant):
    model, wanted = trained().hf_model, gradient(within, name, last_of)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    try:
        if reentrant:
            model.enable_input_require_grads()
        found = same_or_refused(wanted, lambda: gradient(within, name, last_of))
    finally:
        model.activation_checkpointing_disable()
        if reentrant:
            model.disable_input_require_grads()
    assert (found == "refused") == (name in EDITS_LAYERS)


@pytest.mark.parametrize("name", [None, "clva", "vcd", "deco", "only"])
def test_model_in_a_checkpoint(name, within, reentrant):
    wanted, run = gradient(within, name, last_of), partial(whole, reentrant)
    found = same_or_refused(wanted, lambda: gradient(within, name, run))
    assert (found == "refused") == (name is not None)


def test_observing_in_checkpoints(within, reentrant):
    """What only looks, looks once, and leaves the gradient alone."""
    lens = trained()
    with torch.no_grad(), cl.observing(lens) as seen:
        lens.hf_model(**lens.prompt(picture(0), QUESTIONS[0]))
    wanted, gradients = seen.trace.intensity, gradient(within, None, last_of)
    lens.hf_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    try:
        with cl.observing(lens) as seen:
            found = gradient(True, None, last_of)
    finally:
        lens.hf_model.activation_checkpointing_disable()
    torch.testing.assert_close(seen.trace.intensity, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


def test_what_is_returned_goes_into_autograd():
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    trace = cl.trace_attention(lens, prompt)
    answer = cl.generate(lens, prompt, decoding=cl.Greedy(max_new_tokens=2), progress=False)
    found = [trace.intensity, trace.maps, trace.logits, *answer.ids]
    found += cl.logit_lens(lens, prompt).probabilities, cl.composed_saliency(lens, prompt)
    assert not any(one.is_inference() or one.requires_grad for one in found)
    weight = torch.ones(4, requires_grad=True)
    (trace.intensity * weight).sum().backward()
    torch.testing.assert_close(weight.grad, trace.intensity.sum(dim=0))
