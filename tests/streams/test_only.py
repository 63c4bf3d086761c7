"""ONLY is its formulas, on logits, at the prompt and at every later step, in every way of decoding.

The reference (second_opinion.py) is float64, one sample at a time and without a cache. A weight, a
head or a token near its limit could fall on either side in float32: the nearest is printed.
"""

import copy
import math
from dataclasses import replace

import nnsight
import pytest
import reference
import second_opinion
import torch
from test_layer_methods import FED, STEPS, decode, inputs_of, lens_for, reference_rows
from tiny_models import QUESTIONS, blip_of, double_of, exact_blip, lens_of, picture

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE, running
from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import InterventionError, ModelLoadError, ParameterError
from clva_lens.methods.only import text_keys, textual
from clva_lens.methods.target import Target

ERROR = 5e-4
# Distances of the distributions on these models lie on both sides of it.
MIDDLE = 0.62
METHOD = cl.ONLY(gamma=MIDDLE)


def parts_of(family):
    if family == "llava":
        model = double_of("full", FED)
        return model.model.language_model, model.lm_head.weight, model.config.text_config
    model = exact_blip(FED)
    language = model.language_model
    return language.model, language.lm_head.weight, model.config.text_config


def compare(family, lens, method, methods=(), edits=()):
    """Check every step of three prompts; return which way each went, and the heads left."""
    inputs = inputs_of(lens)
    ids, found = decode(lens, inputs, *methods, method)
    plain = decode(lens, inputs, *methods, max_new_tokens=1)[1][:, 0]
    way = {"normed": family == "llava", "layer": method.layer}
    strengths = (method.support, method.contrast, method.gamma)
    error, effects, nearest, ways, heads, cut, tied = 0.0, [], math.inf, [], [], 0, 0
    for item in range(3):
        seen, last = reference_rows(family, inputs, item, ids[item, :-1], edits)
        for step, own in enumerate(seen.logits[last:]):
            other = second_opinion.second(parts_of(family), seen, last + step, **way)
            if other.nearest < 1e-12:  # a generated <pad>, embedded as 0, sees all keys alike
                tied += 1
                continue
            wanted, apart = second_opinion.decide(own, other.logits, *strengths)
            room = own - own.max() - math.log(method.beta)
            row = found[item, step]
            assert torch.equal(row.isinf(), room < 0)
            kept = room >= 0
            error = max(error, float((row - wanted)[kept].abs().max()))
            away = (apart - method.gamma, *room.tolist())
            nearest = min([nearest, other.nearest, *map(abs, away)])
            ways.append(apart < method.gamma)
            heads.append(len(other.heads))
            cut += int((room < 0).sum())
            if step == 0:
                effects.append(float((row - plain[item])[kept].abs().max()))
    print(
        f"{family}: error {error:.1e}, effect {min(effects):.3f}, nearest {nearest:.1e}, "
        f"{sum(ways)} of {len(ways)} agree, heads {heads}, {cut} cut"
    )
    assert error < ERROR
    assert min(effects) > max(0.05, 100 * error)
    assert cut > 0
    assert tied <= 1
    return ways, heads


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "instructblip"])
@pytest.mark.parametrize("gamma", [0.0, MIDDLE, 2.0])
def test_only(family, kernel, gamma):
    ways, heads = compare(family, lens_for(family, kernel), cl.ONLY(gamma=gamma))
    assert {0.0: not any(ways), 2.0: all(ways), MIDDLE: 0 < sum(ways) < len(ways)}[gamma]
    assert min(heads) > 0 and sum(left < 4 for left in heads) > len(heads) / 2


def test_another_layer_and_other_strengths():
    method = cl.ONLY(layer=4, support=0.7, contrast=2.0, beta=0.02, gamma=MIDDLE)
    compare("llava", lens_for("llava"), method)


@pytest.mark.parametrize("first", [True, False])
def test_sees_what_other_methods_do(first):
    """Without the picture in layer 0, every head's image entropy is infinite, and none goes."""
    lens, blind = lens_for("llava"), cl.KnockOut(layers=(0,))
    _, heads = compare("llava", lens, METHOD, [blind], [reference.KnockOut(layers=(0,))])
    assert set(heads) == {4}
    inputs = inputs_of(lens)
    pair = (blind, METHOD) if first else (METHOD, blind)
    assert torch.equal(decode(lens, inputs, *pair)[1], decode(lens, inputs, blind, METHOD)[1])


def test_textual_by_hand():
    """Two heads over a sink, two text keys, padding, and three image keys.

    Head 0: text (.1, .3), mean .2, deviation .1414: both stay below .3414. Image (.1, .1, .4):
    mean .2, deviation .1732, so .4 goes. H_text = .25 ln 4 + .75 ln 4/3 = .5623, H_image = ln 2.
    Head 1: text (.2, .2), ln 2; image (.2, .2, .2), ln 3. No weight is *above* its limit.
    TVER .8113 and .6309; their mean is .7211, so head 1 goes.
    """
    pattern = torch.tensor([[[0.0, 0.0, 0.1, 0.1, 0.4, 0.1, 0.3], [0.0, 0.0, *[0.2] * 5]]])
    spans = TokenSpans.from_ids(
        torch.tensor([[0, 1, 5, 5, 5, 7, 8]]), 5, torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    )
    text = text_keys(spans)
    assert text.tolist() == [[False, False, False, False, False, True, True]]
    kept = textual(pattern, text, spans.image)
    wanted = torch.tensor([[[0.0, 0.0, 0.1, 0.1, 0.0, 0.1, 0.3], [0.0] * 7]])
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_caches_and_batches(family):
    lens = lens_for(family)
    inputs = inputs_of(lens)
    ids, found = decode(lens, inputs, METHOD)
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({"use_cache": False}, static):
        others, logits = decode(lens, inputs, METHOD, **options)
        assert torch.equal(ids, others)
        torch.testing.assert_close(found, logits, rtol=0, atol=ERROR)
    for item in range(3):
        single = lens.prompt(picture(item), QUESTIONS[item]).inputs
        alone, logits = decode(lens, single, METHOD)
        assert torch.equal(alone[0], ids[item])
        torch.testing.assert_close(logits[0], found[item], rtol=0, atol=ERROR)


def test_beams():
    """A beam alone in its batch is what it is in a batch, and with a cache as without."""
    lens = lens_for("llava")
    inputs = inputs_of(lens)
    options = {"num_beams": 3, "max_new_tokens": 4}
    ids = decode(lens, inputs, METHOD, **options)[0]
    assert torch.equal(ids, decode(lens, inputs, METHOD, use_cache=False, **options)[0])
    assert not torch.equal(ids, decode(lens, inputs, **options)[0])
    prompt = lens.prompt(picture(1), QUESTIONS[1]).inputs
    assert torch.equal(ids[1], decode(lens, prompt, METHOD, **options)[0][0])


def test_sampling_stays_above_the_cut_off():
    lens = lens_for("llava")
    torch.manual_seed(0)
    ids, found = decode(lens, inputs_of(lens), METHOD, do_sample=True, top_k=0)
    assert found.gather(2, ids[:, :, None]).isfinite().all()
    assert found.isinf().any()


@pytest.mark.parametrize("clva", [(), (cl.CLVA(tau=1.0),)], ids=["alone", "with CLVA"])
def test_in_traces(ask, clva):
    """A trace shows the decided logits, and each module of the last layer once."""
    lens = lens_for("llava")
    prompt = ask(lens, 3)
    with torch.inference_mode():
        with cl.intervening(lens.hf_model, *clva, METHOD):
            expected = lens.hf_model(**prompt.inputs).logits
        with cl.intervening(lens.hf_model, *clva):
            alone = lens.hf_model(**prompt.inputs).logits
    handle = nnsight.NNsight(lens.hf_model)
    with handle.trace(**prompt):
        cl.intervene(*clva, METHOD)
        fed = handle.model.language_model.layers[11].mlp.output.save()
        final = handle.model.language_model.norm.output.save()
        found = handle.output.logits.save()
    assert torch.equal(found, expected)
    assert final.shape[:2] == fed.shape[:2] == prompt["input_ids"].shape
    change = (expected - alone)[:, -1].abs()
    assert float(change[change.isfinite()].max()) > 0.05
    assert torch.equal(expected[:, :-1], alone[:, :-1])
    ids, _ = decode(lens, prompt.inputs, *clva, METHOD)
    with lens.generate(prompt, max_new_tokens=STEPS, do_sample=False) as tracer:
        cl.intervene(*clva, METHOD)
        result = tracer.result.save()
    assert torch.equal(result[:, prompt.answer_start :], ids)


def test_nothing_of_the_model_runs_twice(one, ask):
    """The second opinion goes through twins: hooks of others see the model's own pass only."""
    model, calls = one.hf_model, []
    parts = [model.lm_head, model.model.language_model.norm, model.model.language_model.layers[11]]
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in parts]
    hooks += [
        part.register_forward_hook(lambda *_: calls.append(1))
        for part in (parts[2].mlp, parts[2].self_attn.o_proj, parts[2].input_layernorm)
    ]
    try:
        with torch.inference_mode(), cl.intervening(model, METHOD):
            model(**ask(one).inputs)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 6


def test_uncut_is_kept_for_margins(one, ask):
    session = METHOD.sessions(Target(one.hf_model))[0]
    with torch.inference_mode(), running(one.hf_model, [session]):
        found = one.hf_model(**ask(one, 3).inputs).logits[:, -1]
    assert session.uncut is not None and session.uncut.isfinite().all()
    kept = found.isfinite()
    assert not kept.all()
    assert torch.equal(found[kept], session.uncut[kept])


@pytest.mark.parametrize("other", [cl.VCD(), cl.DeCo(), METHOD], ids=lambda m: m.name)
def test_one_owner_of_the_cut_off(one, other):
    with (
        pytest.raises(InterventionError, match=r"cut implausible tokens off"),
        cl.intervening(one, METHOD, other),
    ):
        pass
    assert not _ACTIVE


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_other_language_models(ask, language):
    lens = blip_of("sdpa", language)
    if language == "t5":
        with pytest.raises(ModelLoadError, match=r"'t5'"):
            METHOD.sessions(Target(lens.hf_model))
        return
    inputs = ask(lens, 2).inputs
    found = decode(lens, inputs, METHOD, max_new_tokens=3)[1]
    again = decode(lens, inputs, METHOD, max_new_tokens=3, use_cache=False)[1]
    torch.testing.assert_close(found, again, rtol=0, atol=ERROR)
    change = (found - decode(lens, inputs, max_new_tokens=3)[1])[:, 0].abs()
    assert float(change[change.isfinite()].max()) > 0.05


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision(kind, ask):
    """It runs in the model's own type, and decides in float32."""
    lens = lens_of("grouped", "sdpa", FED)
    half = copy.deepcopy(lens.hf_model).to(kind)
    inputs = dict(ask(lens, 2).inputs)
    inputs["pixel_values"] = inputs["pixel_values"].to(kind)
    with torch.inference_mode(), cl.intervening(half, METHOD):
        found = half(**inputs).logits[:, -1]
    assert found.dtype == kind
    assert not found.isnan().any()
    assert found.isinf().any(dim=1).all() and found.isfinite().any(dim=1).all()


def test_as_hooks_is_refused(one, ask, no_process):
    """It edits logits by weights of the last layer, which hooks of a bridge's pass cannot."""
    bridge = cl.to_transformer_lens(one)
    with pytest.raises(InterventionError, match=r"edits logits.*cl\.intervening"):
        METHOD.as_hooks(bridge, ask(one))


def test_strengths_of_0_have_no_cut_off_either(one, ask):
    inputs = ask(one, 3).inputs
    zero = replace(METHOD, support=0.0, contrast=0.0)
    assert torch.equal(decode(one, inputs, zero)[1], decode(one, inputs)[1])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"support": -1.0}, r"support must be a finite number >= 0, but is -1\.0"),
        ({"support": float("inf")}, r"support must be a finite number"),
        ({"contrast": float("nan")}, r"contrast must be a finite number"),
        ({"gamma": 2.1}, r"gamma must be in \[0, 2\], but is 2\.1\. Pass gamma=0\.2"),
        ({"gamma": -0.1}, r"gamma must be in"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\]"),
        ({"layer": 12}, r"layer names layer 12.*0 to 11"),
        ({"layer": -1}, r"layer names layer -1"),
        ({"layer": 11}, r"layer=11 is the decoder's last one.*layer=0"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_refused(one, parameters, message):
    with pytest.raises(ParameterError, match=message):
        cl.ONLY(**parameters).sessions(Target(one.hf_model))
