"""nnsight traces at both sites: the same numbers as around plain code; and all is undone."""

import nnsight
import pytest
import torch
from tiny_models import LANGUAGES, blip_of

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE
from clva_lens.ground.errors import InterventionError, ParameterError

STEPS = 4
ATOL = 1e-6
STRONG = {"qformer": cl.CLVA(tau=1.0), "decoder": cl.CLVA(tau=1.0, site="decoder")}


def logits(model, inputs, *methods):
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model(**inputs).logits


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=ATOL)


def configs(model):
    inner = [m for m in model.modules() if hasattr(m, "config")]
    return [(id(m.config), str(m.config._attn_implementation)) for m in inner]


def hooks(model):
    """Return every hook on every module; nnsight's own are put on for good at its first trace."""
    return {
        name: [sorted(getattr(m, f"_forward{kind}_hooks")) for kind in ("", "_pre")]
        for name, m in model.named_modules()
    }


@pytest.fixture
def unchanged(one_blip, ask):
    """Compare kernels, hooks, routes and numbers after the test with those before."""
    model, inputs = one_blip.hf_model, ask(one_blip, 2).inputs
    with one_blip.trace(ask(one_blip)):  # nnsight's own lazy set-up is not ours
        one_blip.output.logits.save()
    with torch.inference_mode():
        before = model(**inputs).logits
    kept = configs(model), hooks(model)
    assert not _ACTIVE
    yield
    assert not _ACTIVE
    assert (configs(model), hooks(model)) == kept
    language = model.language_model
    for module in (model, model.qformer, language, model.get_input_embeddings()):
        assert not module._forward_pre_hooks
    for config in (model.qformer.config, language.config):
        assert config._attn_implementation in ("sdpa", "eager")
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, before)


def test_the_comparison_sees_a_run(one_blip, site):
    model = one_blip.hf_model
    before = configs(model), hooks(model)
    with cl.intervening(model, STRONG[site]):
        assert configs(model) != before[0]
        assert hooks(model) != before[1]
        assert len(_ACTIVE) == (6 if site == "qformer" else 12)
        part = model.qformer if site == "qformer" else model.language_model
        assert part._forward_pre_hooks
        assert part.config._attn_implementation.startswith("clva_")
        other = model.language_model if site == "qformer" else model.qformer
        assert not other._forward_pre_hooks
        assert not other.config._attn_implementation.startswith("clva_")
    assert (configs(model), hooks(model)) == before


# ── traces ──


def test_trace(one_blip, ask, site, unchanged):
    prompt = ask(one_blip, 2)
    wanted = logits(one_blip.hf_model, prompt.inputs, STRONG[site])
    with one_blip.trace(prompt):
        run = cl.intervene(STRONG[site])
        seen = cl.observe(site=site)
        own = cl.observe()
        found = one_blip.output.logits.save()
    same(found, wanted)
    trace = cl.trace_attention(one_blip, prompt, STRONG[site], site=site)
    same(seen.trace.maps, trace.maps)
    same(trace.logits, wanted[:, -1])
    assert own.trace.site == "qformer"
    with cl.intervening(one_blip, STRONG[site]) as around:
        logits(one_blip.hf_model, prompt.inputs)
    assert torch.equal(run.anchors.positive, around.anchors.positive)
    assert float((found.detach() - logits(one_blip.hf_model, prompt.inputs)).abs().max()) > 0.05


def test_reads_in_the_order_of_the_model(one_blip, ask, site, unchanged):
    """Values of the Q-Former, the decoder and the root, all under the method."""
    stack, decoder = one_blip.qformer.encoder.layer, one_blip.language_model.model.layers
    kept = {}
    for methods in ((), (STRONG[site],)):
        with one_blip.trace(ask(one_blip)):
            if methods:
                cl.intervene(*methods)
            early = stack[4].output.save()
            late = stack[10].output.save()
            features = one_blip.language_projection.output.save()
            low = decoder[4].output.save()
            high = decoder[11].output.save()
            out = one_blip.output.logits.save()
        kept[len(methods)] = (early, late, features, low, high, out)
    gaps = [float((a - b).detach().abs().max()) for a, b in zip(kept[0], kept[1], strict=True)]
    wanted = {
        "qformer": [False, True, True, True, True, True],
        "decoder": [False, False, False, False, True, True],
    }
    assert [gap > 1e-3 for gap in gaps] == wanted[site]
    assert all(gap == 0 or moved for gap, moved in zip(gaps, wanted[site], strict=True))
    same(kept[1][-1], logits(one_blip.hf_model, ask(one_blip).inputs, STRONG[site]))


@pytest.mark.filterwarnings("ignore:Module '.*' has a submodule named 'output'")
def test_bare_nnsight(one_blip, ask, site, unchanged):
    handle = nnsight.NNsight(one_blip.hf_model)
    inputs = ask(one_blip).inputs
    with handle.trace(**inputs):
        cl.intervene(STRONG[site])
        found = handle.output.logits.save()
    same(found, logits(one_blip.hf_model, inputs, STRONG[site]))
    with torch.inference_mode(), cl.intervening(one_blip.hf_model, STRONG[site]):
        wanted = one_blip.hf_model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    with handle.trace(**inputs, max_new_tokens=STEPS, do_sample=False, fn="generate") as tracer:
        cl.intervene(STRONG[site])
        ids = tracer.result.save()
    assert torch.equal(ids, wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(one_blip, ask, site, beams, unchanged):
    """The root's forward is never called under generate; the run is there all the same."""
    prompt = ask(one_blip, 2)
    options = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": beams}
    with torch.inference_mode(), cl.intervening(one_blip.hf_model, STRONG[site]):
        wanted = one_blip.hf_model.generate(**prompt.inputs, **options)
    with torch.inference_mode():
        plain = one_blip.hf_model.generate(**prompt.inputs, **options)
    with one_blip.generate(prompt, **options) as tracer:
        run = cl.intervene(STRONG[site])
        seen = cl.observe(site=site)
        ids = tracer.result.save()
    assert torch.equal(ids, wanted)
    assert not torch.equal(ids, plain)
    rows = 2 * beams if site == "decoder" else 2
    assert len(run.anchors.positive) == rows
    assert len(seen.steps) == (STEPS - 1 if site == "decoder" else 0)
    assert seen.trace.batched


def test_reads_of_every_step(one_blip, ask, site):
    inputs = ask(one_blip).inputs
    options = {"max_new_tokens": STEPS, "do_sample": False}
    with torch.inference_mode(), cl.intervening(one_blip.hf_model, STRONG[site]):
        out = one_blip.hf_model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )
    with one_blip.generate(ask(one_blip), **options) as tracer:
        cl.intervene(STRONG[site])
        steps = nnsight.save([])
        for _ in tracer.iter[0:STEPS]:
            steps.append(one_blip.language_model.lm_head.output[:, -1])
    assert len(steps) == STEPS
    for found, wanted in zip(steps, out.logits, strict=True):
        same(found, wanted)


def test_observe_before_and_after(one_blip, ask, site):
    prompt = ask(one_blip)
    with one_blip.trace(prompt):
        before = cl.observe(layers=(4, 8), site=site)
        cl.intervene(cl.KnockOut(layers=(8,), site=site))
        after = cl.observe(layers=(4, 8), site=site)
        one_blip.output.logits.save()
    same(before.trace.intensity[0], after.trace.intensity[0])
    assert float(before.trace.intensity[1].min()) > 0.01
    assert float(after.trace.intensity[1].max()) == 0.0
    assert repr(before.trace).startswith(f"AttentionTrace({site}: 2 layers")


def test_edit(one_blip, ask, site, unchanged):
    wanted = logits(one_blip.hf_model, ask(one_blip).inputs, STRONG[site])
    with one_blip.edit() as (_, edited):
        cl.intervene(STRONG[site])
    with edited.trace(ask(one_blip)):
        found = edited.output.logits.save()
    same(found, wanted)


def test_scan_is_left_alone(ask):
    """nnsight's scan runs on fake tensors: no attention to read, and no error."""
    lens = blip_of("sdpa")
    with lens.scan(**ask(lens).inputs):
        cl.intervene(*STRONG.values())
        cl.observe()
        cl.observe(site="decoder")
        shape = nnsight.save(lens.output.logits.shape)
    assert tuple(shape)[-1] == 64
    assert not _ACTIVE


@pytest.mark.parametrize("language", LANGUAGES)
def test_traces_of_every_language_model(language, ask):
    lens = blip_of("sdpa", language)
    prompt = ask(lens, 2)
    for method in STRONG.values():
        with lens.trace(prompt):
            cl.intervene(method)
            found = lens.output.logits.save()
        wanted = logits(lens.hf_model, prompt.inputs, method)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert float((found - logits(lens.hf_model, prompt.inputs)).detach().abs().max()) > 0.05


# ── what is left after errors ──


def test_after_an_error_in_the_block(one_blip, ask, site, unchanged):
    both = cl.compose(*STRONG.values())
    with pytest.raises(KeyError, match=r"mine"), cl.intervening(one_blip.hf_model, both):
        raise KeyError("mine")
    with pytest.raises(KeyError, match=r"mine"), cl.observing(one_blip, site=site):
        raise KeyError("mine")
    with pytest.raises(ZeroDivisionError), one_blip.trace(ask(one_blip)):
        cl.intervene(both)
        one_blip.qformer.encoder.layer[8].output.save()
        1 / 0  # noqa: B018
    with (
        pytest.raises(ZeroDivisionError),
        one_blip.generate(ask(one_blip), max_new_tokens=3) as tracer,
    ):
        cl.intervene(both)
        for step in tracer.iter[0:3]:
            one_blip.language_model.lm_head.output.save()
            1 / (1 - step)


def test_after_an_error_of_the_model(one_blip, ask, unchanged):
    """A picture too large, or no text for the Q-Former: nothing of the run is left."""
    both = cl.compose(*STRONG.values())
    large = dict(ask(one_blip).inputs)
    large["pixel_values"] = torch.zeros(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(65\) must match.* \(17\)"):
        logits(one_blip.hf_model, large, both)
    with pytest.raises(Exception, match=r"must match"), one_blip.trace(**large):
        cl.intervene(both)
        one_blip.output.logits.save()
    silent = {k: v for k, v in ask(one_blip).inputs.items() if not k.startswith("qformer")}
    with pytest.raises(Exception, match=r"qformer_input_ids"), one_blip.trace(**silent):
        cl.intervene(both)
        one_blip.output.logits.save()


def test_after_a_refused_method(one_blip, ask, unchanged):
    """The second site's method is refused: the first one's is undone."""
    wrong = cl.KnockOut(site="decoder", layers=(99,))
    with pytest.raises(ParameterError, match=r"layer 99"), one_blip.trace(ask(one_blip)):
        cl.intervene(STRONG["qformer"])
        cl.intervene(wrong)
        one_blip.output.logits.save()
    with pytest.raises(ParameterError, match=r"layer 99"):
        cl.trace_attention(one_blip, ask(one_blip), cl.compose(STRONG["qformer"], wrong))
    one_blip.hf_model.language_model.config._attn_implementation_internal = "flash_attention_3"
    try:
        with (
            pytest.raises(
                InterventionError, match=r"decoder runs attention kernel 'flash_attention_3"
            ),
            cl.intervening(one_blip, *STRONG.values()),
        ):
            pass
        assert not _ACTIVE
        assert not one_blip.hf_model.qformer._forward_pre_hooks
        with cl.intervening(one_blip, STRONG["qformer"]):  # the other site is not concerned
            assert len(_ACTIVE) == 6
    finally:
        kernel = one_blip.hf_model.qformer.config._attn_implementation
        one_blip.hf_model.language_model.config._attn_implementation_internal = kernel


def test_after_a_stop(one_blip, ask, site, unchanged):
    with one_blip.trace(ask(one_blip)) as tracer:
        cl.intervene(STRONG[site])
        one_blip.qformer.encoder.layer[8].output.save()
        tracer.stop()


def test_blocks_closed_in_any_order(one_blip, ask, unchanged):
    """Each site's run ends with its own last session."""
    inputs = ask(one_blip).inputs
    first, second = (cl.intervening(one_blip.hf_model, method) for method in STRONG.values())
    first.__enter__()
    second.__enter__()
    assert len(_ACTIVE) == 18
    first.__exit__(None, None, None)
    assert len(_ACTIVE) == 12
    with torch.inference_mode():
        left = one_blip.hf_model(**inputs).logits
    second.__exit__(None, None, None)
    assert torch.equal(left, logits(one_blip.hf_model, inputs, STRONG["decoder"]))
