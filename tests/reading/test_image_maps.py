"""Maps of other people's formulas: each against float64 and whole matrices, and judged."""

import copy
from functools import cache

import numpy as np
import pytest
import reference
import torch
from tiny_models import QUESTIONS, blip_of, double_of, exact_blip, lens_of, picture

import clva_lens as cl
from clva_lens.experiments.map_judging import judge_maps
from clva_lens.ground.errors import InterventionError, ParameterError, PromptError, UnknownName
from clva_lens.lens.maps import MAPS
from clva_lens.lens.maps.rollout import Rollout
from clva_lens.methods.scores import released_layer
from clva_lens.science.pointing import pointing
from clva_lens.toy.scenes import render, sample_scenes

TOKENS = (7, 9)
SETTINGS = {
    "relative-attention": {"general": QUESTIONS[2]},
    "integrated-gradients": {"steps": 2},  # enough for laws
}
GRADIENTS = ("relevancy", "bi-modal-relevancy", "grad-cam", "integrated-gradients")


def found(lens, prompt, name, **options):
    settings = {"tokens": TOKENS, **SETTINGS.get(name, {}), **options}
    return cl.image_map(lens, prompt, name, **settings)


# ── references: float64, patterns as whole matrices, nothing of the package's formulas ──


@cache
def eager(heads):
    model = copy.deepcopy(double_of(heads))
    model.set_attn_implementation("eager")
    return model


@cache
def read(heads, blank=False, question=0):
    """(the decoder read once more by hand, its ids) of the first picture and a question."""
    prompt = lens_of(heads, "sdpa").prompt(picture(0), QUESTIONS[question])
    pixels = prompt["pixel_values"][0].double()
    pixels = torch.zeros_like(pixels) if blank else pixels
    return reference.run(double_of(heads), prompt["input_ids"][0], pixels), prompt["input_ids"][0]


def told(heads, entered, attentions=False):
    """The logit difference from what enters the decoder [position, width], and all patterns."""
    model = eager(heads)
    made = model.model.language_model(
        inputs_embeds=entered[None], output_attentions=attentions, use_cache=False
    )
    last = model.lm_head(made.last_hidden_state[0, -1])
    return last[TOKENS[0]] - last[TOKENS[1]], made.attentions


def relevancy(heads):
    result, _ = read(heads)
    entered = result.streams[0].clone().requires_grad_()
    difference, patterns = told(heads, entered, attentions=True)
    slopes = torch.autograd.grad(difference, patterns)
    whole = torch.eye(len(entered)).double()
    for pattern, slope in zip(patterns, slopes, strict=True):
        whole = whole + (slope * pattern).clamp(min=0)[0].mean(dim=0) @ whole
    return whole.detach()[-1, result.image]


def through_queries(inputs):
    """Eqs. 5 to 11 of arXiv:2103.15679 with whole matrices, of all attention of an eager model."""
    model, kept = exact_blip(), {}
    layers = model.qformer.encoder.layer
    read = [layer for layer in layers if layer.has_cross_attention]
    modules = {
        "within": [layer.attention.attention for layer in layers],
        "across": [layer.crossattention.attention for layer in read],
        "decoder": [layer.self_attn for layer in model.language_model.model.layers],
    }
    several = [(kind, at, one) for kind, all_ in modules.items() for at, one in enumerate(all_)]

    def keep(kind, at):
        return lambda module, args, output: kept.__setitem__((kind, at), output[1])

    hooks = [one.register_forward_hook(keep(kind, at)) for kind, at, one in several]
    doubles = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    last = model(**doubles).logits[0, -1]
    for hook in hooks:
        hook.remove()
    slopes = torch.autograd.grad(last[TOKENS[0]] - last[TOKENS[1]], list(kept.values()))
    bar = {
        place: (slope * kept[place]).clamp(min=0)[0].mean(dim=0).detach()
        for place, slope in zip(kept, slopes, strict=True)
    }
    own = torch.eye(len(bar["within", 0])).double()
    patches = torch.zeros(len(own), bar["across", 0].shape[1]).double()
    queries = len(bar["across", 0])
    for at, layer in enumerate(layers):
        own, patches = own + bar["within", at] @ own, patches + bar["within", at] @ patches
        if layer.has_cross_attention:
            beside = own - torch.eye(len(own))
            for row in beside:
                if row.sum() > 0:
                    row /= row.sum()
            weighed = torch.zeros_like(patches)
            weighed[:queries] = bar["across", read.index(layer)]
            patches = patches + (beside + torch.eye(len(own))).T @ weighed
    image = (inputs["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]
    whole = torch.eye(len(bar["decoder", 0])).double()
    begun = torch.zeros(len(whole), patches.shape[1]).double()
    begun[image] = patches[:queries]
    for at in range(len(modules["decoder"])):
        begun = begun + bar["decoder", at] @ begun  # Eq. 7
    return begun[-1, 1:]  # the first key is the tower's CLS


def rollout(heads):
    result, _ = read(heads)
    whole = torch.eye(len(result.logits)).double()
    for pattern in result.patterns:
        layer = (pattern.mean(dim=0) + torch.eye(len(whole))) / 2
        whole = layer / layer.sum(dim=1, keepdim=True) @ whole
    return whole[-1, result.image]


def slope_at(heads, entered):
    entered = entered.clone().requires_grad_()
    return torch.autograd.grad(told(heads, entered)[0], entered)[0]


def grad_cam(heads):
    result, _ = read(heads)
    entered = result.streams[0]
    weights = slope_at(heads, entered)[result.image].mean(dim=0)
    return (entered[result.image] @ weights).clamp(min=0)


def integrated_gradients(heads, steps=2):
    (full, _), (none, _) = read(heads), read(heads, blank=True)
    total = 0
    for step in range(steps):
        at = full.streams[0].clone()
        between = full.streams[0] - none.streams[0]
        at[full.image] = (none.streams[0] + (step + 0.5) / steps * between)[full.image]
        total = total + slope_at(heads, at) * between / steps
    return total[full.image].sum(dim=1)


def looks(heads, layers, question=0):
    result, _ = read(heads, question=question)
    several = torch.stack([result.patterns[layer][:, -1] for layer in layers])
    return several.mean(dim=(0, 1))[result.image]


def relative_attention(heads):
    layer = [released_layer(14, 12)]
    return looks(heads, layer) / looks(heads, layer, question=2)


def visual_ratio(heads):
    return looks(heads, range(2, 8))  # 5 to 18 of 32 layers, in 12


def token_activation(heads):
    """In loops, by the release's steps."""
    result, ids = read(heads)
    model = double_of(heads)
    states = model.model.language_model.norm(result.streams[-1]).detach().numpy()
    words, ids = model.lm_head.weight.detach().numpy(), ids.tolist()
    image, text = result.image, result.text[:-1]
    own = np.array([max(0.0, states[i] @ words[TOKENS[0]]) for i in image])
    said = np.array([max(0.0, states[t] @ words[TOKENS[0]]) for t in text])
    weights = np.array([s if ids[t] != TOKENS[0] else 0.0 for s, t in zip(said, text, strict=True)])
    others = np.zeros(len(image))
    for weight, t in zip(weights, text, strict=True):
        others += weight * np.array([max(0.0, states[i] @ words[ids[t]]) for i in image])
    if others.any():  # the size of the weights cancels
        own = np.maximum(0, own - (own @ others) / (others @ others) * others)
    everything = np.concatenate([own, said])
    own = (own - everything.min()) / (everything.max() - everything.min())
    padded = np.pad(own.reshape(4, 4), 1, mode="reflect")
    ranks, made = np.arange(-4, 5), np.zeros((4, 4))
    for row in range(4):
        for column in range(4):
            window = np.sort(padded[row : row + 3, column : column + 3].ravel())
            if window.std() == 0:
                made[row, column] = window[0]
                continue
            weigh = np.exp(-(ranks**2) / (2 * (window.std() / window.mean()) ** 2))
            made[row, column] = (weigh * window).sum() / weigh.sum()
    return torch.from_numpy(made.ravel())


REFERENCES = {
    "bi-modal-relevancy": relevancy,  # a decoder alone has no cross-attention
    "grad-cam": grad_cam,
    "integrated-gradients": integrated_gradients,
    "relative-attention": relative_attention,
    "relevancy": relevancy,
    "rollout": rollout,
    "token-activation": token_activation,
    "visual-ratio": visual_ratio,
}


def test_every_map_has_a_reference():
    assert tuple(REFERENCES) == MAPS.names()


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("heads", ["full", "grouped"])
def test_as_the_formula_says_in_float64(heads, name):
    lens = lens_of(heads, "sdpa")
    made = found(lens, lens.prompt(picture(0), QUESTIONS[0]), name)
    wanted = REFERENCES[name](heads)
    effect = float(wanted.max() - wanted.min())
    error = float((made.values.double() - wanted).abs().max())
    print(f"{name}, {heads}: error {error:.1e}, of values {effect:.3g} apart")
    assert made.values.isfinite().all() and effect > 0
    assert error < 2e-4 * effect
    assert made.signed or bool((made.values >= 0).all())


# ── laws ──


@pytest.mark.parametrize("name", MAPS.names())
def test_a_batch_is_its_samples_and_a_method_acts(name, one, ask):
    prompt = ask(one, 2)
    several = found(one, prompt, name, tokens=None)
    single = found(one, ask(one, None, 1), name, tokens=None)
    effect = float(single.values.max() - single.values.min())
    torch.testing.assert_close(several[1].values, single.values, rtol=0, atol=1e-3 * effect)
    again = found(one, ask(one, None, 1), name, tokens=None, method=cl.KnockOut(layers=()))
    torch.testing.assert_close(again.values, single.values, rtol=0, atol=1e-4 * effect)
    blind = found(one, ask(one, None, 1), name, tokens=None, method=cl.PAI(alpha=2.0))
    assert (blind.values - single.values).abs().max() > 1e-3 * effect


@pytest.mark.parametrize("name", GRADIENTS)
def test_no_gradient_is_left_and_none_is_needed_around(name, one, ask):
    plain = found(one, ask(one), name)
    with torch.inference_mode():
        within = found(one, one.prompt(picture(0), QUESTIONS[0]), name)
    assert all(weight.grad is None for weight in one.hf_model.parameters())
    assert not plain.values.requires_grad and not within.values.is_inference()
    torch.testing.assert_close(within.values, plain.values)


def test_integrated_gradients_add_up(one, ask):
    prompt = ask(one)
    made = found(one, prompt, "integrated-gradients", steps=24)
    ends = []
    for blank in (False, True):
        inputs = dict(prompt.inputs)
        if blank:
            inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
        with torch.no_grad():
            last = one.hf_model(**inputs).logits[0, -1]
        ends.append(float(last[TOKENS[0]] - last[TOKENS[1]]))
    whole = ends[0] - ends[1]
    print(f"adds up to {float(made.values.sum()):.3f} of {whole:.3f}")
    assert abs(whole) > 0.1
    assert float(made.values.sum()) == pytest.approx(whole, rel=0.05)
    zero = found(one, prompt, "integrated-gradients", baseline="zero").values
    assert (zero - made.values).abs().max() > 0.01


def test_rollout_of_nothing_but_the_stream_is_nothing():
    lens = lens_of("full", "sdpa")
    made = found(lens, lens.prompt(picture(0), QUESTIONS[0]), "rollout", residual=1.0)
    assert torch.equal(made.values, torch.zeros(16))


def test_a_q_formers_maps_are_passed_on_as_composed_saliency_is():
    blip = blip_of("sdpa")
    prompt = blip.prompt(picture(0), QUESTIONS[0])
    composed = cl.composed_saliency(blip, prompt, layers=[5])[0]
    made = cl.image_map(blip, prompt, "visual-ratio", layers=[5])
    torch.testing.assert_close(made.values, composed)
    assert prompt.on_grid(cl.image_map(blip, prompt).values).shape == (4, 4)
    with pytest.raises(ParameterError, match="encoder-decoder"):
        cl.image_map(blip_of("sdpa", "t5"), blip_of("sdpa", "t5").prompt(picture(0), QUESTIONS[0]))


def test_bi_modal_relevancy_goes_through_a_q_former_by_all_rules_in_float64():
    blip = blip_of("sdpa")
    prompt = blip.prompt(picture(0), QUESTIONS[0])
    made = found(blip, prompt, "bi-modal-relevancy")
    wanted = through_queries(prompt.inputs)
    effect = float(wanted.max() - wanted.min())
    error = float((made.values.double() - wanted).abs().max())
    plain = found(blip, prompt, "relevancy").values
    apart = float((plain / plain.sum() - wanted / wanted.sum()).abs().max())
    print(f"error {error:.1e}, of values {effect:.3g} apart; shares {apart:.2g} from relevancy's")
    assert error < 2e-4 * effect and bool((made.values >= 0).all()) and apart > 0.01
    # A longer question pads the first one, in the Q-Former on its right.
    several = [QUESTIONS[0], QUESTIONS[0] + " and " + QUESTIONS[2]]
    both = found(blip, blip.prompt([picture(0)] * 2, several), "bi-modal-relevancy")
    torch.testing.assert_close(both[0].values, made.values, rtol=0, atol=1e-3 * effect)
    acted = found(blip, prompt, "bi-modal-relevancy", method=cl.CLVA())
    assert float((acted.values - made.values).abs().max()) > 1e-2 * effect
    assert not any(layer._forward_hooks for layer in blip.family.asking(blip.hf_model))
    asked = blip_of("sdpa", "opt")  # BLIP-2's Q-Former need not read the question
    other = found(asked, asked.prompt(picture(0), QUESTIONS[0]), "bi-modal-relevancy")
    assert other.values.shape == (16,) and float(other.values.max()) > 0


def test_it_draws_itself(one, ask):
    made = found(one, ask(one), "relevancy")
    assert (made._repr_png_() or b"").startswith(b"\x89PNG")
    assert made.draw(scale="shared").axes[0].get_title() == "relevancy"
    assert repr(made).startswith("ImageMap(Relevancy() of logit(7) − logit(9): 16 image tokens, 1 ")
    assert made.saliency().shape == (16,) and not made.batched
    several = found(one, ask(one, 2), "rollout")
    assert several._repr_png_() is None and "ImageMap(" in repr(several)
    with pytest.raises(ParameterError, match="of a batch"):
        several.draw()
    with pytest.raises(ParameterError, match="single prompt"):
        made[0]


def test_refused(one, ask):
    prompt = ask(one)
    for ask_wrongly, error, words in (
        (lambda: cl.image_map(one, prompt, "relevance"), UnknownName, "Did you mean 'relevancy'"),
        (lambda: cl.image_map(one, prompt, "rollout", steps=3), ParameterError, "has: residual"),
        (lambda: cl.image_map(one, prompt, Rollout(), residual=1), ParameterError, "of its own"),
        (lambda: found(one, prompt, "integrated-gradients", steps=0), ParameterError, "steps is 0"),
        (lambda: found(one, prompt, "relative-attention", general=" "), ParameterError, "empty"),
        (lambda: found(one, dict(prompt), "relative-attention"), PromptError, "made of one"),
        (lambda: cl.KnockOut(tokens=[-1]), ParameterError, "from 0 on"),
        (
            lambda: cl.image_map(one, prompt, method=cl.KnockOut(tokens=[16])),
            ParameterError,
            "has 16 image tokens",
        ),
    ):
        with pytest.raises(error, match=words):
            ask_wrongly()
    with pytest.raises(InterventionError, match="inside a trace"), one.trace(prompt):
        cl.image_map(one, prompt)


# ── judging ──


def test_knocked_out_tokens_are_the_ones_named(one, ask):
    def logits(method):
        with torch.no_grad(), cl.intervening(one, *([] if method is None else [method])):
            return one.hf_model(**ask(one)).logits[0, -1]

    layers = tuple(range(12))
    assert torch.equal(logits(cl.KnockOut(layers=layers, tokens=())), logits(None))
    every = logits(cl.KnockOut(layers=layers, tokens=range(16)))
    assert torch.equal(every, logits(cl.KnockOut(layers=layers)))
    with cl.intervening(one, cl.KnockOut(layers=layers, tokens=(3, 8))), cl.observing(one) as seen:
        one.hf_model(**ask(one))
    gone = seen.trace.maps.sum(dim=(0, 1)) == 0
    assert gone.nonzero()[:, 0].tolist() == [3, 8]


@pytest.fixture(scope="module")
def judged():
    model = cl.load("toy-llava")
    scenes = sample_scenes(3, seed=7)
    kinds = [scene.things[0].kind for scene in scenes]
    prompts = [
        model.prompt(render(scene), f"is there a {kind} in the image?")
        for scene, kind in zip(scenes, kinds, strict=True)
    ]
    objects = torch.stack(
        [
            torch.from_numpy(scene.patches(kind).ravel())
            for scene, kind in zip(scenes, kinds, strict=True)
        ]
    )
    maps = {name: MAPS.get(name)() for name in ("relevancy", "rollout")}
    return model, prompts, objects, judge_maps(model, prompts, objects, maps, progress=False)


def test_relevancy_points_at_what_the_answer_needs_and_the_nulls_do_not(judged):
    *_, rows = judged
    by = {(row["map"], row["model"]): row for row in rows}
    assert len(by) == 6
    best, twin = by["relevancy", "trained"], by["relevancy", "untrained"]
    print(best, twin, sep="\n")
    assert best["hits"] == 1.0 and best["share"] > 0.7 and best["share low"] > best["chance"]
    assert best["beyond"] > 2 and best["beyond"] > by["rollout", "trained"]["beyond"]
    assert twin["share"] < 0.3 and abs(twin["beyond"]) < 0.2


def test_a_map_that_knows_nothing_is_at_chance_exactly(judged):
    model, prompts, objects, rows = judged
    for row in rows:
        if row["map"] == "even":
            assert row["share"] == pytest.approx(row["chance"]) and row["hits"] == row["chance"]
            assert row["beyond"] == 0.0 and row["empty"] == row["prompts"] == 3
    none = judge_maps(
        model, prompts[:1], objects[:1], {}, fraction=0.0, untrained=0, progress=False
    )
    assert [row["lost"] for row in none] == [0.0]
    with pytest.raises(ParameterError, match="as many of each"):
        judge_maps(model, prompts, objects[:1])


def test_the_pointing_game_plays_with_a_map(judged):
    model, prompts, objects, _ = judged
    made = torch.stack([cl.image_map(model, one).saliency() for one in prompts])
    game = cl.pointing_game(made, objects)
    assert float(game.shares) == pytest.approx(float(pointing(made, objects).share.mean()))
