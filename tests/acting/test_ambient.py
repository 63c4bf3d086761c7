"""Law 11: what PyTorch holds around a call changes nothing, or is refused in words.

Every public function that meets a model or tensors, in every ambient state; and the model is bit
for bit as before.
"""

import contextlib
import threading
from dataclasses import fields, is_dataclass
from functools import cache

import nnsight
import numpy as np
import pytest
import torch
from test_state import state
from tiny_models import QUESTIONS, blip_of, lens_of, make_processor, picture
from torch import Tensor

import clva_lens as cl
from clva_lens.ground.errors import ClvaLensError
from clva_lens.methods.base import METHODS

pytestmark = pytest.mark.usefixtures("no_process")  # TransformerLens would start an installer
ACTING = [name for name in METHODS.names() if name != "opera"]  # it decodes by itself


def lens():
    return lens_of("full", "sdpa")


@cache
def asked(which=0):
    return lens().prompt(picture(which), QUESTIONS[0])


def traced(method=None):
    return cl.trace_attention(lens(), asked(), method)


def intervened():
    with cl.intervening(lens(), cl.CLVA(tau=1.0)) as run:
        out = lens().hf_model(**asked()).logits
    return out, run.anchors


def observed():
    with cl.observing(lens()) as seen:
        lens().hf_model(**asked())
    return seen.trace


def in_a_trace():
    with lens().trace(asked()):
        run = cl.intervene(cl.CLVA(tau=1.0))
        seen = cl.observe()
        logits = lens().output.logits.save()
    return logits, seen.trace, run.anchors


def moments():
    found = cl.trace_statistics(lens(), [asked(0), asked(1)], progress=False)
    return found.intensity.mean


def answered(method=None):
    how = cl.Greedy(max_new_tokens=3)
    found = cl.generate(lens(), asked(), method, how, progress=False)
    return found.texts, found.ids, found.margins


def evaluated():
    found = cl.evaluate(
        lens(),
        "pope/toy/adversarial",
        cl.CLVA(tau=1.0),
        cl.Greedy(max_new_tokens=2),
        limit=2,
        progress=False,
    )
    return found.metrics, found.rows


def pointed():
    covered = torch.zeros(16, dtype=torch.bool)
    covered[5:9] = True
    return cl.pointing_game(
        RIGHT.saliency("all").double().expand(3, -1, -1), covered.expand(3, -1), resamples=20
    )


def bridged():
    bridge = cl.to_transformer_lens(lens())
    return bridge(**bridge.inputs(asked()))


# What the caller runs himself is in the caller's autocast; the rest is not.
OWN_RUN = {"intervening", "observing", "trace", "to_transformer_lens, run"}
CALLS = {
    "intervening": intervened,
    "observing": observed,
    "trace": in_a_trace,
    "trace_attention": lambda: traced(cl.CLVA(tau=1.0)),
    "head_means": lambda: cl.head_means(lens(), [asked()]),
    "composed_saliency": lambda: cl.composed_saliency(
        blip_of("sdpa"), blip_of("sdpa").prompt(picture(0), QUESTIONS[0])
    ),
    "trace_statistics": moments,
    "generate": lambda: answered(cl.VCD()),
    "generate, beams": lambda: (
        cl.generate(lens(), asked(), cl.OPERA(), cl.Beam(max_new_tokens=3), progress=False).ids
    ),
    "logit_lens": lambda: cl.logit_lens(lens(), asked(), tokens=["yes"]),
    "direct_logit_attribution": lambda: cl.direct_logit_attribution(lens(), asked()),
    "patch_activations": lambda: cl.patch_activations(
        lens(), asked(1), asked(0), layers=(4,), progress=False
    ),
    "run_with_cache": lambda: dict(lens().run_with_cache(asked(), "blocks.3.hook_resid_pre").cache),
    "classify_heads": lambda: cl.classify_heads(RIGHT.intensity),
    "attention_drift": lambda: cl.attention_drift(RIGHT),
    "saliency": lambda: [RIGHT.saliency(one) for one in ("all", "sensitive", "insensitive")],
    "patch_mask": lambda: cl.patch_mask(lens(), np.ones((32, 32), dtype=bool)),
    "evaluate": evaluated,
    "pointing_game": pointed,
    "to_transformer_lens": lambda: list(cl.to_transformer_lens(lens()).parameters()),
    "to_transformer_lens, run": bridged,
    "load": lambda: cl.load((lens().hf_model, make_processor())).num_layers,
}
RIGHT = traced()


@contextlib.contextmanager
def default(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES = {
    "bfloat16": lambda: default(torch.bfloat16),
    "float64": lambda: default(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def numbers(found):
    """Every tensor and number in a result."""
    if isinstance(found, Tensor):
        yield found.detach()
    elif isinstance(found, dict):
        yield from numbers(list(found.values()))
    elif isinstance(found, list | tuple):
        for one in found:
            yield from numbers(one)
    elif is_dataclass(found):
        yield from numbers([getattr(found, one.name) for one in fields(found)])
    elif isinstance(found, int | float | str):
        yield found


def same(found, wanted, within=0.0):
    found, wanted = list(numbers(found)), list(numbers(wanted))
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Tensor):
            if within == 0.0:
                assert one.dtype == other.dtype
            torch.testing.assert_close(
                one.float(), other.float(), rtol=0, atol=within, equal_nan=True
            )
        else:
            assert one == other or (one != one and other != other)  # NaN


@cache
def wanted_of(name):
    """What a call says in no ambient state."""
    return CALLS[name]()


@pytest.fixture(scope="module")
def untouched():
    """Both models, and their state before any of these tests."""
    models = [lens().hf_model, blip_of("sdpa").hf_model]
    with lens().trace(asked()):  # nnsight's own lazy set-up is not ours
        lens().output.logits.save()
    return models, [state(model) for model in models]


@pytest.fixture(autouse=True)
def unchanged(untouched):
    models, before = untouched
    yield
    assert torch.get_default_dtype() == torch.float32
    assert [state(model) for model in models] == before


@pytest.mark.parametrize("around", STATES)
@pytest.mark.parametrize("name", CALLS)
def test_ambient_state(name, around):
    wanted = wanted_of(name)
    with STATES[around]():
        found = CALLS[name]()
    if around == "autocast" and name in OWN_RUN:
        return
    same(found, wanted)
    if around == "inference_mode" and name not in OWN_RUN and CALLS[name] is not CALLS["saliency"]:
        # Made of the caller's tensors, or when the caller reads a property.
        made = {"classify_heads", "attention_drift", "patch_mask", "trace_statistics"}
        made.add("pointing_game")
        tensors = [one for one in numbers(found) if isinstance(one, Tensor)]
        assert name in made or not any(one.is_inference() for one in tensors)


@cache
def traced_without(name):
    return traced(METHODS.get(name)())


@pytest.mark.parametrize("around", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", ACTING)
def test_methods_under_another_default_dtype(name, around):
    wanted = traced_without(name)
    with STATES[around]():
        same(traced(METHODS.get(name)()), wanted)


@pytest.mark.parametrize("name", ACTING)
def test_methods_under_autocast(name):
    """The model's own run is in bfloat16; what is formed of it in float32 stays so."""
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.no_grad(),
        cl.intervening(lens(), METHODS.get(name)()),
        cl.observing(lens()) as seen,
    ):
        lens().hf_model(**asked())
    assert seen.trace.intensity.dtype == torch.float32
    total = seen.trace.intensity + seen.trace.system + seen.trace.text
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ACTING)
def test_methods_in_a_scan(name):
    """A method is made in the block, where every new tensor is a fake one."""
    with lens().scan(asked()):
        cl.intervene(METHODS.get(name)())
        shape = nnsight.save(lens().output.logits.shape)
    assert shape[-1] == 64


@pytest.mark.parametrize("name", CALLS)
def test_in_a_second_thread(name):
    wanted, found = wanted_of(name), []
    thread = threading.Thread(target=lambda: found.append(CALLS[name]()))
    thread.start()
    thread.join()
    same(found[0], wanted)


@pytest.mark.parametrize("name", CALLS)
def test_after_an_exception_in_a_run(name):
    wanted = wanted_of(name)
    with pytest.raises(KeyError), cl.intervening(lens(), cl.CLVA(tau=1.0), cl.VCD()):
        lens().hf_model(**asked())
        raise KeyError
    same(CALLS[name](), wanted)


def test_loaded_in_inference_mode():
    """Whoever loads a model there may train it later, or is told."""
    with torch.inference_mode():
        try:
            model = cl.load("toy-llava").hf_model
        except ClvaLensError:
            return
    assert not any(one.is_inference() for one in model.parameters())
