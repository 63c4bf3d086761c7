"""Law 6: after a run nothing on the model or in clva_lens differs from before, nor after errors."""

import pytest
import torch
from tiny_models import lens_of
from transformers import AttentionInterface

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE
from clva_lens.models.belonging import HERE

METHOD = cl.CLVA(tau=1.0)


def state(model):
    """Return everything that a run could leave behind, in a form that can be compared."""
    modules = {}
    for name, module in model.named_modules():
        kept = {key: id(value) for key, value in vars(module).items()}
        hooks = {
            key: sorted(value) for key, value in vars(module).items() if key.endswith("_hooks")
        }
        modules[name] = (kept, hooks, module.training, type(module))
    owned = {n: module.config for n, module in model.named_modules() if hasattr(module, "config")}
    told = {id(one): (one.to_dict(), str(one._attn_implementation)) for one in owned.values()}
    configs = {name: id(one) for name, one in owned.items()}, told
    parameters = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    runs = dict(_ACTIVE), dict(HERE.get())
    return modules, configs, parameters, model.generation_config.to_dict(), *runs


@pytest.fixture
def unchanged(lens, ask):
    """Compare the model's state, and its numbers, after the test with those before."""
    with lens.trace(ask(lens)):  # nnsight's own lazy set-up is not ours
        lens.output.logits.save()
    with torch.inference_mode():
        logits = lens.hf_model(**ask(lens).inputs).logits
    before = state(lens.hf_model)
    assert not _ACTIVE
    yield
    after = state(lens.hf_model)
    for one, other in zip(before, after, strict=True):
        assert one == other
    with torch.inference_mode():
        assert torch.equal(lens.hf_model(**ask(lens).inputs).logits, logits)


def test_state_sees_a_run(lens, ask):
    """The comparison is not blind: within a run the state does differ."""
    before = state(lens.hf_model)
    with cl.intervening(lens.hf_model, METHOD):
        during = state(lens.hf_model)
    assert during[0] != before[0]  # a hook
    assert during[1] != before[1]  # the kernel's name
    assert len(during[4]) == 12  # every attention module is routed
    assert state(lens.hf_model) == before


def test_after_a_run(lens, ask, unchanged):
    with torch.inference_mode(), cl.intervening(lens.hf_model, METHOD, cl.KnockOut()):
        lens.hf_model(**ask(lens, 2).inputs)
        lens.hf_model.generate(**ask(lens).inputs, max_new_tokens=3, do_sample=False)
    cl.trace_attention(lens, ask(lens), METHOD)
    cl.generate(lens, ask(lens), METHOD, cl.Greedy(max_new_tokens=2))


def test_after_an_exception_in_the_block(lens, unchanged):
    with pytest.raises(KeyError, match=r"mine"), cl.intervening(lens.hf_model, METHOD):
        raise KeyError("mine")
    with pytest.raises(KeyError, match=r"mine"), cl.observing(lens.hf_model):
        raise KeyError("mine")


def test_after_an_error_of_the_model(lens, ask, unchanged):
    inputs = dict(ask(lens).inputs)
    inputs["pixel_values"] = inputs["pixel_values"][:, :, :16, :16]
    with (
        pytest.raises(Exception, match=r"doesn't match model|match"),
        cl.intervening(lens.hf_model, METHOD),
    ):
        lens.hf_model(**inputs)


def test_after_an_error_in_trace_attention(lens, ask, unchanged):
    with pytest.raises(cl.ClvaLensError, match=r"layers names layer 99"):
        cl.trace_attention(lens, ask(lens), cl.KnockOut(layers=(99,)))
    with pytest.raises(cl.ClvaLensError, match=r"layers names layer 99"):
        cl.trace_attention(lens, ask(lens), layers=(99,))


def test_after_a_trace(lens, ask, unchanged):
    with lens.trace(ask(lens)):
        cl.intervene(METHOD)
        cl.observe()
        lens.output.logits.save()
    with lens.generate(ask(lens), max_new_tokens=3, do_sample=False) as tracer:
        cl.intervene(METHOD)
        tracer.result.save()


def test_after_a_users_error_in_a_trace(lens, ask, unchanged):
    with pytest.raises(ZeroDivisionError), lens.trace(ask(lens)):
        cl.intervene(METHOD)
        lens.model.language_model.layers[6].output.save()
        1 / 0  # noqa: B018


def test_after_a_users_error_before_the_model_starts(lens, ask, unchanged):
    with pytest.raises(ZeroDivisionError), lens.trace(ask(lens)):
        cl.intervene(METHOD)
        1 / 0  # noqa: B018


def test_after_reading_out_of_order(lens, ask, unchanged):
    with pytest.raises(Exception, match=r"already ran past"), lens.trace(ask(lens)):
        cl.intervene(METHOD)
        lens.model.language_model.layers[6].output.save()
        lens.model.language_model.layers[2].output.save()


def test_after_an_error_of_the_model_in_a_trace(lens, ask, unchanged):
    inputs = dict(ask(lens).inputs)
    inputs["pixel_values"] = inputs["pixel_values"][:, :, :16, :16]
    with pytest.raises(Exception, match=r"match"), lens.trace(**inputs):
        cl.intervene(METHOD)
        lens.output.logits.save()


def test_after_stop(lens, ask, unchanged):
    with lens.trace(ask(lens)) as tracer:
        cl.intervene(METHOD)
        lens.model.language_model.layers[6].output.save()
        tracer.stop()


def test_after_a_refused_intervention(lens, ask, unchanged):
    with pytest.raises(cl.ClvaLensError, match=r"layer 99"), lens.trace(ask(lens)):
        cl.intervene(METHOD)
        cl.intervene(cl.KnockOut(layers=(99,)))
        lens.output.logits.save()


def test_nested_blocks_undo_one_at_a_time(lens, ask, unchanged):
    """Inner methods end with the inner block; the outer ones stay."""
    inputs = ask(lens).inputs
    with torch.inference_mode():
        plain = lens.hf_model(**inputs).logits
        with cl.intervening(lens.hf_model, METHOD):
            outer = lens.hf_model(**inputs).logits
            with cl.intervening(lens.hf_model, cl.KnockOut()):
                both = lens.hf_model(**inputs).logits
            again = lens.hf_model(**inputs).logits
    assert torch.equal(outer, again)
    assert float((outer - both).abs().max()) > 0.05
    assert float((outer - plain).abs().max()) > 0.05


def test_blocks_closed_in_any_order(lens, ask, unchanged):
    """The first block may end before the second: what is left is the second's method alone."""
    inputs = ask(lens).inputs
    first = cl.intervening(lens.hf_model, METHOD)
    second = cl.intervening(lens.hf_model, cl.KnockOut())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with torch.inference_mode():
        left = lens.hf_model(**inputs).logits
        second.__exit__(None, None, None)
        with cl.intervening(lens.hf_model, cl.KnockOut()):
            alone = lens.hf_model(**inputs).logits
    assert torch.equal(left, alone)


def test_two_prompts_in_one_block_are_two_runs(lens, ask):
    """A second prompt is read afresh: neither its anchors nor its spans are those of the first."""
    one, other = ask(lens, first=0).inputs, ask(lens, first=2).inputs
    with torch.inference_mode():
        with cl.intervening(lens.hf_model, METHOD):
            lens.hf_model(**one)
            lens.hf_model.generate(**one, max_new_tokens=3, do_sample=False)
            found = lens.hf_model(**other).logits
        with cl.intervening(lens.hf_model, METHOD):
            wanted = lens.hf_model(**other).logits
    assert torch.equal(found, wanted)


def test_two_models_at_once(ask):
    """Each model has its own run."""
    pair = [lens_of("full", "sdpa"), lens_of("grouped", "eager")]
    methods = [METHOD, cl.KnockOut()]
    wanted = []
    with torch.inference_mode():
        for lens, method in zip(pair, methods, strict=True):
            with cl.intervening(lens.hf_model, method):
                wanted.append(lens.hf_model(**ask(lens).inputs).logits)
        with (
            cl.intervening(pair[0].hf_model, methods[0]),
            cl.intervening(pair[1].hf_model, methods[1]),
        ):
            found = [lens.hf_model(**ask(lens).inputs).logits for lens in pair]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_import_registers_under_its_own_names():
    """transformers' own kernels are not replaced."""
    names = AttentionInterface().valid_keys()
    assert {"clva_sdpa", "clva_eager"} <= set(names)
    assert AttentionInterface()["sdpa"].__module__.startswith("transformers.")
