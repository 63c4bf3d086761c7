"""Attribution patching: its numbers are slopes, few passes, and it ranks as exact patching."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from test_state import state
from tiny_models import QUESTIONS, blip_of, double_of, lens_of, make_processor, picture

import clva_lens as cl
from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.lens import edge_attribution as edges
from clva_lens.lens.edge_attribution import patch_edges
from clva_lens.models.family import FAMILIES
from clva_lens.science.ranks import rank_correlation
from clva_lens.toy.scenes import render, sample_scenes

WANTED = torch.linspace(-1, 1, 64, dtype=torch.float64)


def tilt(logits):
    """A smooth metric of all logits."""
    return (logits[:, -1].double().log_softmax(dim=-1) * WANTED).sum(dim=-1)


def in_float64(norm):
    """An RMS norm that does not round to float32 on its way."""

    def forward(x):
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    return forward


@cache
def exact_lens():
    model = copy.deepcopy(double_of("full", 8.0)).requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = in_float64(module)
    return cl.load((model, make_processor()))


def pair(lens, batch=1, question=0):
    made = [
        lens.prompt([picture(first + i) for i in range(batch)], [QUESTIONS[question]] * batch)
        for first in (0, 5)
    ]
    if next(lens.hf_model.parameters()).dtype == torch.float64:
        for one in made:
            one.inputs["pixel_values"] = one.inputs["pixel_values"].double()
    return made


@cache
def estimates():
    lens = exact_lens()
    return cl.attribution_patching(lens, *pair(lens, 2), metric=tilt)


def moved(lens, prompt, part, layer, change):
    """The metric of a run where ``change`` is added, by a plain hook."""
    block = lens.hf_model.model.language_model.layers[layer]
    module = {
        "resid_pre": block,
        "resid_post": block,
        "attn_out": block.self_attn.o_proj,
        "mlp_out": block.mlp,
        "z": block.self_attn.o_proj,
    }[part]
    if part in ("resid_pre", "z"):
        handle = module.register_forward_pre_hook(lambda _, args: (args[0] + change, *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: out + change)
    try:
        with torch.no_grad():
            return tilt(lens.hf_model(**prompt.inputs, use_cache=False).logits)
    finally:
        handle.remove()


def activations(lens, prompt, part, layer):
    name = f"blocks.{layer}." + ("attn.hook_z" if part == "z" else f"hook_{part}")
    return lens.run_with_cache(prompt, [name]).cache[name].flatten(2)


@pytest.mark.parametrize("part", ["resid_pre", "attn_out", "mlp_out", "resid_post", "z"])
@pytest.mark.parametrize("layer", [1, 7])
def test_an_estimate_is_the_slope(part, layer):
    """Along the way from target to source, at a span, by central differences in float64."""
    lens, found = exact_lens(), estimates()
    source, target = pair(lens, 2)
    change = activations(lens, source, part, layer) - activations(lens, target, part, layer)
    for span in ("image", "text", "last"):
        places = target.spans.places(span)
        mask = torch.zeros(change.shape[:2], dtype=torch.bool)
        mask[torch.arange(2)[:, None], places] = True
        way = change * mask[..., None]
        small = 1e-5
        slope = moved(lens, target, part, layer, small * way)
        slope = (slope - moved(lens, target, part, layer, -small * way)) / (2 * small)
        mine = found.patching(part, span, layers=[layer])
        error = float((mine.effect[:, 0, 0] - slope).abs().max())
        print(f"{part} {layer} {span}: error {error:.1e}, slope {float(slope.abs().max()):.2e}")
        torch.testing.assert_close(mine.effect[:, 0, 0], slope, rtol=1e-5, atol=1e-7)
    assert float(found.patching(part, "image", layers=[layer]).effect.abs().max()) > 0.005


def test_one_head_and_one_position_are_parts_of_the_whole():
    found, (_, target) = estimates(), pair(exact_lens(), 2)
    every = found.patching("z", "text").effect
    heads = found.patching("z", "text", each="head").effect
    assert heads.shape == (2, 12, 4)
    torch.testing.assert_close(heads.sum(dim=-1, keepdim=True), every)
    alone = found.patching("resid_pre", "image", each="position").effect
    assert alone.shape == (2, 12, target.spans.visual_count)
    whole = found.patching("resid_pre", "image").effect
    torch.testing.assert_close(alone.sum(dim=-1, keepdim=True), whole)


def test_patching_with_itself_is_estimated_as_nothing():
    lens = lens_of("full", "sdpa")
    _, target = pair(lens)
    before = state(lens.hf_model)
    found = cl.attribution_patching(lens, target, target)
    assert all(float(one.abs().max()) == 0 for by in found.parts.values() for one in by.values())
    assert state(lens.hf_model) == before
    assert float(cl.edge_attribution(lens, target, target).scores.abs().max()) == 0


class Passes:
    """Counts the prompts that a model reads, and the backward passes."""

    def __init__(self, model, monkeypatch):
        self.rows = self.backward = 0
        self.handle = model.get_decoder().layers[-1].register_forward_hook(self.count)
        grad = torch.autograd.grad

        def counted(*args, **kwargs):
            self.backward += 1
            return grad(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", counted)

    def count(self, module, args, out):
        self.rows += len(out)


@pytest.mark.parametrize("size", [(12, 4), (32, 32)])
def test_passes_of_heads_by_layers(size, monkeypatch):
    """Exact patching reads a prompt for each head of each layer, and the two as they are.

    32 × 32 is LLaVA-1.5-7B's: there it is more than 50 times what an estimate takes, at one span.
    """
    layers, heads = size
    lens = lens_of("full", "sdpa")
    if size != (12, 4):
        shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": 64}
        model = FAMILIES.get("llava").tiny(num_key_value_heads=heads, head_dim=2, **shape)
        lens = cl.load((model.eval(), make_processor()))
    source, target = pair(lens)
    passes = Passes(lens.hf_model, monkeypatch)
    try:
        found = cl.attribution_patching(lens, source, target)
        mine = passes.rows, passes.backward, found.passes
        passes.rows = 0
        exact = cl.patch_activations(
            lens, source, target, spans="last", part="z", each="head", progress=False
        )
    finally:
        passes.handle.remove()
    times = passes.rows / 3
    print(f"{layers} × {heads}: 2 + 1 passes against {passes.rows}, {times:.0f} times as many")
    assert exact.values.shape[-2:] == found.patching("z", "last", each="head").values.shape[-2:]
    assert exact.values.shape[-2:] == size
    assert mine == (2, 1, 3)
    assert layers * heads + 2 <= passes.rows <= layers * heads + 20  # what batches share besides
    assert (times >= 50) == (size == (32, 32))


@cache
def toy():
    model = cl.load("toy-llava")
    scene = sample_scenes(1, seed=7)[0]
    kind = scene.things[0].kind
    rest = scene.__class__(
        scene.place, tuple(one for one in scene.things if one.kind != kind), scene.noise_seed
    )
    question = f"is there a {kind} in the image?"
    return model, *(model.prompt(render(one), question) for one in (scene, rest))


def test_it_ranks_heads_as_exact_patching_does():
    """On the toy, with an interval; layers apart from it are a null."""
    model, there, gone = toy()
    found = cl.attribution_patching(model, there, gone)
    exact = cl.patch_activations(
        model, there, gone, layers=[6, 8, 10], spans="last", part="z", each="head", progress=False
    )
    mine = found.patching("z", "last", each="head", layers=[6, 8, 10])
    rank = rank_correlation(mine.effect, exact.effect)
    null = np.random.default_rng(0).permutation(mine.effect.flatten()).reshape(3, 8)
    chance = rank_correlation(null, exact.effect)
    print(f"rho {rank}, shuffled {chance}; effects up to {float(exact.effect.abs().max()):.2f}")
    assert rank.estimate == pytest.approx(
        spearmanr(mine.effect.flatten(), exact.effect.flatten())[0]
    )
    assert rank.low > 0.5 > 0.45 > abs(chance.estimate)


def test_edges_rank_as_exact_edges_do():
    model, there, gone = toy()
    found = cl.edge_attribution(model, there, gone)
    later = [
        (u, v)
        for i, u in enumerate(found.writers)
        for j, v in enumerate(found.readers)
        if found.exists[i, j] and found.scores[0, i, j] != 0 and v in ("a9", "logits")
    ]
    chosen = [later[i] for i in np.random.default_rng(0).permutation(len(later))[:30]]
    exact = patch_edges(model, there, gone, chosen, progress=False)[0]
    for how in ("eap", "eap-ig"):
        one = found if how == "eap" else cl.edge_attribution(model, there, gone, how=how, steps=2)
        mine = [one.scores[0, one.writers.index(u), one.readers.index(v)] for u, v in chosen]
        rank = rank_correlation(torch.stack(mine), exact)
        print(f"{how} ({one.passes} passes): {rank}; effects up to {float(exact.abs().max()):.2f}")
        assert rank.low > 0.2
    assert found.passes == 3
    assert repr(found).startswith("EdgeAttribution(eap: ")
    assert found.draw().axes and found.top(3)[0][0].reader in found.readers


@pytest.mark.parametrize("writer", ["h2.1", "m3", "embed"])
def test_all_edges_of_a_writer_are_its_patch(writer):
    """Where every reader gets the source's writer, the writer is patched."""
    lens = exact_lens()
    source, target = pair(lens)
    graph = edges._Graph(lens, source, target, tilt, None)
    with torch.no_grad():
        own, other = edges._Nodes(graph), edges._Nodes(graph)
        graph.run(source, own)
        plain = graph.run(target, other)
        change = graph.written(own, writer) - graph.written(other, writer)
        every = {v: change for v in graph.readers if graph.has(writer, v)}
        found = graph.run(target, edges._Nodes(graph, every)) - plain
    part, layer = {"h2.1": ("z", 2), "m3": ("mlp_out", 3), "embed": ("resid_pre", 0)}[writer]
    heads = {"heads": [(2, 1)]} if part == "z" else {}
    _, cache = lens.run_with_cache(source)
    patch = cl.PatchActivations(
        source=source, cache=cache, part=part, layers=[layer], span="all", **heads
    )
    with torch.no_grad(), cl.intervening(lens, patch):
        wanted = tilt(lens.hf_model(**target.inputs, use_cache=False).logits) - plain
    print(f"{writer}: error {float((found - wanted).abs()):.1e}, effect {float(wanted.abs()):.2e}")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float(wanted.abs()) > 1e-3


def test_an_edge_is_the_slope_of_its_patch():
    """EAP's score is the slope of the exact edge as the change goes to 0."""
    lens = exact_lens()
    source, target = pair(lens)
    found = cl.edge_attribution(lens, source, target, metric=tilt)
    graph, small = edges._Graph(lens, source, target, tilt, None), 1e-4
    with torch.no_grad():
        own, other = edges._Nodes(graph), edges._Nodes(graph)
        graph.run(source, own)
        graph.run(target, other)
        for writer, reader in [("h2.1", "a5"), ("m3", "m8"), ("embed", "m0"), ("h8.3", "logits")]:
            change = small * (graph.written(own, writer) - graph.written(other, writer))
            ends = [graph.run(target, edges._Nodes(graph, {reader: s * change})) for s in (1, -1)]
            slope = float((ends[0] - ends[1]) / (2 * small))
            place = found.writers.index(writer), found.readers.index(reader)
            assert float(found.scores[0][place]) == pytest.approx(slope, rel=1e-5, abs=1e-7)
            assert slope != 0


def test_refusals():
    lens = lens_of("full", "sdpa")
    source, target = pair(lens)
    other = lens.prompt(picture(0), QUESTIONS[2])
    with pytest.raises(ParameterError, match="do not line up"):
        cl.attribution_patching(lens, other, target)
    with pytest.raises(ParameterError, match="no gradient"):
        cl.attribution_patching(lens, source, target, metric=lambda x: x[:, -1, 0].detach())
    with pytest.raises(ParameterError, match="were estimated"):
        cl.attribution_patching(lens, source, target).patching("mlp_in")
    with pytest.raises(ParameterError, match="how is 'acdc'"):
        cl.edge_attribution(lens, source, target, how="acdc")
    with pytest.raises(ParameterError, match="no edge from 'm5' to 'a5'"):
        patch_edges(lens, source, target, [("m5", "a5")])
    with pytest.raises(ParameterError, match="same things"):
        rank_correlation([1, 2], [1, 2])
    t5 = blip_of("sdpa", "t5")
    with pytest.raises(ModelLoadError):
        cl.edge_attribution(t5, (picture(0), QUESTIONS[0]), (picture(1), QUESTIONS[0]))


def test_a_method_holds_in_the_estimates():
    """Under a knock-out of the image, the picture's last rows change nothing."""
    lens = lens_of("full", "sdpa")
    source, target = pair(lens)
    blind = cl.attribution_patching(lens, source, target, method=cl.KnockOut(layers=range(12)))
    seeing = cl.attribution_patching(lens, source, target)
    late = [
        float(one.patching("resid_pre", "image", layers=[4]).effect.abs())
        for one in (blind, seeing)
    ]
    assert late[0] < 1e-6 < 1e-3 < late[1]
