"""Direct logit attribution in a trace, of edited runs, and against a cache read by nnsight."""

from functools import cache

import nnsight
import numpy as np
import pytest
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError, PromptError
from clva_lens.lens.attribution import Attributing
from clva_lens.lens.margins import yes_margins
from clva_lens.models.answer_tokens import answer_tokens
from clva_lens.models.family import transformers_model
from clva_lens.toy.scenes import render, sample_scenes

FIELDS = ("embedding", "heads", "mlps", "edits", "bias", "image", "elsewhere", "difference")


@cache
def toy(name):
    return cl.load(name)


def toy_prompt(lens):
    return lens.prompt(render(sample_scenes(1, seed=7)[0]), "Is there a cup in the image?")


def parts_apart(one, other):
    """The largest difference between two attributions, part by part."""
    apart = [getattr(one, name) - getattr(other, name) for name in FIELDS if name != "difference"]
    return max(float(values.abs().max()) for values in apart)


def traced(lens, prompt, *methods):
    """Return the attribution of a traced run, and the yes−no margin of its logits."""
    with lens.trace(prompt):
        if methods:
            cl.intervene(*methods)
        read = cl.direct_logit_attribution()
        logits = lens.output.logits.save()
    return read.parts, torch.tensor(yes_margins(logits[:, -1].detach(), answer_tokens(lens.words)))


@pytest.mark.parametrize("batch", [None, 3])
def test_in_a_trace_as_outside(lens, ask, batch):
    prompt = ask(lens, batch)
    inside, margin = traced(lens, prompt)
    outside = cl.direct_logit_attribution(lens, prompt)
    assert parts_apart(inside, outside) < 1e-5
    assert inside.batched == outside.batched == (batch is not None)
    assert torch.equal(inside.classes.sensitive, outside.classes.sensitive)
    assert (inside.prompt, inside.label) == (None, outside.label)
    assert float((inside.total - margin).abs().max()) < 2e-5
    assert float(inside.edits.abs().max()) < 1e-5
    torch.testing.assert_close(inside.on_grid(), outside.on_grid(), rtol=0, atol=1e-5)


def edited(lens, prompt, method):
    """Check the parts of an edited run; return (residual, effect, the sum's change)."""
    plain, before = traced(lens, prompt)
    found, margin = traced(lens, prompt, method)
    outside = cl.direct_logit_attribution(lens, prompt, method=method)
    with cl.intervening(lens, method):
        open_one = cl.direct_logit_attribution(lens, prompt)
    assert max(parts_apart(found, one) for one in (outside, open_one)) < 1e-5
    written = found.total - found.edits.sum(dim=-1)
    residual = max(
        float((written - margin).abs().max()),
        float((found.image.sum(dim=-1) + found.elsewhere - found.heads).abs().max()),
    )
    effect, moved = parts_apart(found, plain), float((margin - before).abs().max())
    print(f"residual {residual:.1e}, parts move by {effect:.3f}, the margin by {moved:.3f}")
    return residual, effect, moved


@pytest.mark.parametrize("name", ["toy-llava", "toy-instructblip"])
def test_under_clva_on_the_toys(name):
    """The parts add up to the margin of the edited run, which is far from that of greedy."""
    lens = toy(name)
    prompt = toy_prompt(lens)
    residual, effect, moved = edited(lens, prompt, cl.CLVA(site="decoder"))
    assert residual < 2e-4
    assert effect > 100 * residual
    assert moved > 20 * residual


@pytest.mark.parametrize("batch", [None, 3])
def test_under_clva(lens, ask, batch):
    """Full and grouped-query attention, both kernels."""
    residual, effect, moved = edited(lens, ask(lens, batch), cl.CLVA(tau=1.0))
    assert residual < 5e-5
    assert effect > max(0.02, 1000 * residual)
    assert moved > 100 * residual


def test_a_qformer_edit(one_blip, ask):
    residual, effect, _ = edited(one_blip, ask(one_blip), cl.CLVA(tau=1.0))
    assert residual < 5e-5
    assert effect > max(0.02, 500 * residual)


@torch.no_grad()
def test_against_a_cache(lens, ask):
    """Every part once more from nnsight's activations, in float64, under CLVA."""
    prompt, clva = ask(lens), cl.CLVA(tau=1.0)
    found, _ = traced(lens, prompt, clva)
    plain, _ = traced(lens, prompt)
    names = ("hook_z", "hook_v", "hook_pattern", "hook_mlp_out", "hook_embed", "ln_final")
    _, cache = lens.run_with_cache(prompt, lambda n: any(x in n for x in names), method=clva)
    inner = lens.hf_model.model.language_model
    yes, no = 8, 9
    weight = lens.hf_model.lm_head.weight.double()
    direction = (weight[yes] - weight[no]) * inner.norm.weight.double()
    direction = direction / cache["ln_final.hook_scale"][0, -1].double()
    image = prompt.spans.image[0]
    error = 0.0
    for i, layer in enumerate(inner.layers):
        out = layer.self_attn.o_proj.weight.double()
        pattern, v = (cache[f"blocks.{i}.attn.hook_{x}"][0].double() for x in ("pattern", "v"))
        for head in range(4):
            asked = direction @ out[:, head * 8 : head * 8 + 8]
            by_key = pattern[head, -1] * (v[:, head * v.shape[1] // 4] @ asked)
            z = cache[f"blocks.{i}.attn.hook_z"][0, -1, head].double() @ asked
            wanted = [(found.image, by_key[image]), (found.heads, z)]
            wanted += [(found.elsewhere, by_key[~image].sum())]
            errors = [float((part[i, head] - one).abs().max()) for part, one in wanted]
            error = max(error, *errors)
        mlp = cache[f"blocks.{i}.hook_mlp_out"][0, -1].double() @ direction
        error = max(error, abs(float(found.mlps[i] - mlp)))
    embed = cache["hook_embed"][0, -1].double() @ direction
    error = max(error, abs(float(found.embedding - embed)))
    effect = float((found.heads - plain.heads).abs().max())
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-5
    assert effect > 1000 * error


@pytest.mark.parametrize("language", ["llama", "opt"])
def test_other_language_models(language, ask):
    lens = blip_of("sdpa", language)
    found, margin = traced(lens, ask(lens, 2))
    written = found.total - found.edits.sum(dim=-1)
    assert float((written - margin).abs().max()) < 5e-5
    assert float(found.edits.abs().max()) < 1e-5
    with pytest.raises(PromptError):
        found.on_grid()


# ── edits of the stream, of heads, by hand ──


def test_what_was_patched_is_a_part_of_its_own(one, ask):
    source, target = one.prompt(picture(11), QUESTIONS[0]), ask(one)
    cache = one.run_with_cache(source, "blocks.6.hook_resid_post").cache
    patch = cl.PatchActivations(source=source, cache=cache, part="resid_post", span="last")
    found, margin = traced(one, target, patch)
    assert float((found.total - margin).abs().max()) < 2e-5
    others = torch.arange(12) != 6
    assert float(found.edits[others].abs().max()) < 1e-5
    assert float(found.edits[6].abs()) > 0.02
    names = ["blocks.6.hook_resid_post", "ln_final.hook_scale"]
    own = one.run_with_cache(target, names[0]).cache[names[0]]
    scale = one.run_with_cache(target, names[1], method=patch).cache[names[1]]
    weight = one.hf_model.lm_head.weight.detach()
    direction = (weight[8] - weight[9]) * one.model.language_model._module.norm.weight.detach()
    put = (cache[names[0]] - own)[0, -1] @ direction / scale[0, -1]
    assert float(found.edits[6]) == pytest.approx(float(put), abs=1e-5)


def test_by_hand_in_the_trace(one, ask):
    prompt = ask(one)
    with one.trace(prompt):
        read = cl.direct_logit_attribution()
        one.model.language_model.layers[8].output[:] *= 0.5
        logits = one.output.logits.save()
    margin = torch.tensor(yes_margins(logits[:, -1].detach(), answer_tokens(one.words)))
    assert float((read.parts.total - margin).abs().max()) < 2e-5
    assert float(read.parts.edits[8].abs()) > 0.02
    others = torch.arange(12) != 8
    assert float(read.parts.edits[others].abs().max()) < 1e-5


def test_ablated_heads_bring_nothing_from_the_image(lens, ask):
    prompt = ask(lens, 2)
    heads = torch.zeros(12, 4, dtype=torch.bool)
    heads[5, 1] = heads[9, 3] = True
    means = cl.head_means(lens, [ask(lens, 2, first=4)])
    plain, _ = traced(lens, prompt)
    for method in (
        cl.AblateHeads(heads=heads),
        cl.AblateHeads(heads=heads, mode="mean", reference=means),
    ):
        found, margin = traced(lens, prompt, method)
        assert float((found.total - found.edits.sum(-1) - margin).abs().max()) < 5e-5
        assert not found.image[:, heads].any()
        assert torch.equal(found.elsewhere[:, heads], found.heads[:, heads])
        assert bool((found.heads[:, heads] == 0).all()) == (method.mode == "zero")
        assert float(plain.image[:, heads].abs().max()) > 1e-3
        rest = found.image.sum(-1) + found.elsewhere - found.heads
        assert float(rest.abs().max()) < 1e-5


# ── where it stands in a run ──


def test_of_a_generation_the_prompt_is_read(one, ask):
    prompt = ask(one)
    with one.generate(prompt, max_new_tokens=4) as tracer:
        cl.intervene(cl.CLVA(tau=1.0))
        read = cl.direct_logit_attribution()
        ids = tracer.result.save()
    assert ids.shape[1] == prompt["input_ids"].shape[1] + 4
    outside = cl.direct_logit_attribution(one, prompt, method=cl.CLVA(tau=1.0))
    assert parts_apart(read.parts, outside) < 1e-5


def test_two_questions_and_an_observer_in_one_trace(one, ask):
    prompt = ask(one)
    with one.trace(prompt):
        seen = cl.observe()
        cl.intervene(cl.CLVA(tau=1.0))
        first = cl.direct_logit_attribution()
        second = cl.direct_logit_attribution(tokens=("cup", 7))
    assert seen.trace.intensity.shape == (12, 4)
    clva = cl.CLVA(tau=1.0)
    for read, tokens in ((first, ("yes", "no")), (second, ("cup", 7))):
        outside = cl.direct_logit_attribution(one, prompt, tokens, clva)
        assert parts_apart(read.parts, outside) < 1e-5
        assert read.parts.label == outside.label
    assert parts_apart(first.parts, second.parts) > 0.02


def test_a_bare_handle(one, ask):
    prompt, handle = ask(one), nnsight.NNsight(one.hf_model)
    with handle.trace(**prompt):
        read = cl.direct_logit_attribution(tokens=(8, 9))
    outside = cl.direct_logit_attribution(one, prompt, (8, 9))
    assert isinstance(read, Attributing)
    assert parts_apart(read.parts, outside) < 1e-5
    with pytest.raises(ParameterError, match="no tokenizer"), handle.trace(**prompt):
        cl.direct_logit_attribution()


def test_nothing_grows_with_width_or_keys(one, ask):
    """What is kept of a layer is by token asked for: no activation, and no row of the pattern."""
    prompt = ask(one)
    with one.trace(prompt):
        read = cl.direct_logit_attribution()
    session = read._reading.parts
    kept = [*session._stream.values(), *session._heads.values(), *session._elsewhere.values()]
    assert {values.shape[-1] for values in kept} == {len(session.ids)}
    assert {values.shape for values in session._image.values()} == {(1, 4, 16, len(session.ids))}
    assert not transformers_model(one)._forward_hooks


# ── what is refused ──


@pytest.mark.parametrize("method", [cl.VCD(noise_step=400), cl.DeCo()])
def test_no_sum_under_edited_logits(one, ask, method):
    with pytest.raises(InterventionError, match=r"no sum over its parts"), one.trace(ask(one)):
        cl.intervene(method)
        cl.direct_logit_attribution()


def test_at_the_wrong_place(one, ask):
    prompt = ask(one)
    with pytest.raises(InterventionError, match=r"outside a trace.*attribution\(model, prompt\)"):
        cl.direct_logit_attribution()
    with pytest.raises(InterventionError, match=r"without a model and a prompt"):
        cl.direct_logit_attribution(method=cl.CLVA())
    with (
        pytest.raises(InterventionError, match=r"after the model started"),
        one.trace(prompt),
    ):
        one.model.language_model.layers[0].output.save()
        cl.direct_logit_attribution()
    with one.trace(prompt):
        read = cl.direct_logit_attribution()
        early = pytest.raises(InterventionError, match="not known yet")
        with early:
            _ = read.parts


def test_padding_on_the_right(one, ask):
    inputs = dict(ask(one, 3).inputs)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.stack(
            [
                row.roll(-int((mask == 0).sum()))
                for row, mask in zip(inputs[name], ask(one, 3)["attention_mask"], strict=True)
            ]
        )
    with (
        pytest.raises(InterventionError, match=r"padded on the right.*Pad on the left"),
        nnsight.NNsight(one.hf_model).trace(**inputs),
    ):
        cl.direct_logit_attribution(tokens=(8, 9))


RUNS = {
    "trace_attention": (lambda m, p: cl.trace_attention(m, p), r"cl\.observe\(\)"),
    "head_means": (lambda m, p: cl.head_means(m, [p]), "before or after the block"),
    "composed_saliency": (lambda m, p: cl.composed_saliency(m, p), r"cl\.observe\(\)"),
    "trace_attention of many": (lambda m, p: cl.trace_statistics(m, [p]), r"cl\.observe\(\)"),
    "logit_lens": (lambda m, p: cl.logit_lens(m, p), "after cl.intervene"),
    "patch_activations": (lambda m, p: cl.patch_activations(m, p, p), "PatchActivations"),
    "generate": (lambda m, p: cl.generate(m, p), r"model\.generate\(prompt\)"),
    "run_with_cache": (lambda m, p: m.run_with_cache(p), r"\.output\.save\(\)"),
    "direct_logit_attribution": (
        lambda m, p: cl.direct_logit_attribution(m, p),
        r"direct_logit_attribution\(\) in it",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_the_model_says_so_in_a_trace(one, ask, name):
    call, instead = RUNS[name]
    prompt = ask(one)
    with (
        pytest.raises(InterventionError, match=f"{name.split()[0]}.*runs the model.*{instead}"),
        one.trace(prompt),
    ):
        call(one, prompt)


def test_what_runs_nothing_works_in_a_trace(ask):
    """Masks, the pointing game and the logit lens of a layer's output, on values of the run."""
    from clva_lens.lens.logit_lens import lens_logits

    one = lens_of("full", "sdpa")
    prompt = ask(one)
    pixels = np.zeros((32, 32), dtype=bool)
    pixels[:16, :16] = True
    with one.trace(prompt):
        on = nnsight.save(cl.patch_mask(one, pixels))
        game = nnsight.save(cl.pointing_game(torch.ones(1, 16), on))
        last = lens_logits(one, one.model.language_model.layers[11].output).save()
        logits = one.output.logits.save()
    assert on.reshape(4, 4).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert game.chance == 0.25
    torch.testing.assert_close(last, logits, rtol=0, atol=1e-5)
