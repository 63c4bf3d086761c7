"""Traces for a server: nnsight's dry run passes, and what cannot be sent is refused in words."""

import cloudpickle
import pytest
import torch
from nnsight.intervention.backends import local

import clva_lens as cl
from clva_lens.ground.errors import ModelLoadError


@pytest.fixture
def installed(monkeypatch):
    """The dry run hides what a server does not have; this one has clva_lens."""
    has = local._SERVER_MODULES | {"clva_lens", "jaxtyping", "beartype"}
    monkeypatch.setattr(local, "_SERVER_MODULES", has)


@pytest.fixture(params=["installed", "editable"])
def way(request):
    """The ways to install clva_lens; nnsight registers an editable one to be sent by value."""
    if request.param == "editable":
        cloudpickle.register_pickle_by_value(cl)


def test_a_trace_under_a_method_comes_through_the_dry_run(one, ask, installed, way):
    prompt = ask(one)
    with torch.no_grad(), cl.intervening(one, cl.CLVA()):
        wanted = one.hf_model(**prompt).logits
    with torch.no_grad():
        plain = one.hf_model(**prompt).logits
    with torch.no_grad(), one.trace(prompt, remote="local"):
        cl.intervene(cl.CLVA())
        seen = cl.observe(layers=[4])
        logits = one.output.logits.save()
    assert torch.equal(logits, wanted)
    assert (plain - wanted).abs().max() > 1e-3
    assert seen.trace.intensity.shape[0] == 1
    with torch.no_grad(), one.trace(prompt, remote="local"):
        bare = one.output.logits.save()
    assert torch.equal(bare, plain)


def test_a_server_without_the_package_says_so(one, ask, way):
    with (
        pytest.raises(ModuleNotFoundError, match="clva_lens"),
        one.trace(ask(one), remote="local"),
    ):
        cl.intervene(cl.CLVA())
        one.output.logits.save()


def test_a_loaded_model_is_not_sent(one, ask):
    with (
        pytest.raises(ModelLoadError, match=r"remote=True sends .* TransformersModel\('HUB ID'\)"),
        one.trace(ask(one), remote=True),
    ):
        one.output.logits.save()
