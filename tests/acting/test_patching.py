"""Activation patching: its laws, and the same patches by TransformerLens as an oracle."""

import re
from dataclasses import replace

import pytest
import torch
from test_state import state
from tiny_models import QUESTIONS, picture
from transformer_lens.patching import layer_pos_patch_setter

import clva_lens as cl
from clva_lens.ground.errors import ClvaLensError, InterventionError, ParameterError, PromptError

PARTS = ("resid_pre", "attn_out", "mlp_out", "resid_post", "z")
# The tiny model's MLPs write next to nothing: what is patched in is made louder.
LOUD = {"mlp_out": 100.0}


def logits(lens, prompt, *methods):
    with torch.inference_mode(), cl.intervening(lens.hf_model, *methods):
        return lens.hf_model(**prompt.inputs).logits


def pair(lens, batch=None):
    """The same questions about other pictures."""
    if batch is None:
        return lens.prompt(picture(11), QUESTIONS[0]), lens.prompt(picture(0), QUESTIONS[0])
    asked = [QUESTIONS[i % 3] for i in range(batch)]
    pictures = [[picture(first + i) for i in range(batch)] for first in (11, 0)]
    return tuple(lens.prompt(one, asked) for one in pictures)


def patch(lens, source, **options):
    cache = lens.run_with_cache(source).cache
    return cl.PatchActivations(source=source, cache=cache, **options)


def loud_patch(lens, source, part, **options):
    cache = lens.run_with_cache(source).cache
    louder = {name: value * LOUD.get(part, 1.0) for name, value in cache.items()}
    return cl.PatchActivations(source=source, cache=louder, part=part, **options)


# ── laws ──


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("span", ["image", "all"])
def test_a_prompt_patched_with_itself_is_itself(lens, ask, part, span):
    prompt = ask(lens)
    assert torch.equal(
        logits(lens, prompt, patch(lens, prompt, part=part, span=span)), logits(lens, prompt)
    )


@pytest.mark.parametrize("layer", [0, 6, 11])
def test_everything_of_one_layer_is_the_source(lens, layer):
    source, target = pair(lens, 3)
    wanted, plain = logits(lens, source), logits(lens, target)
    whole = patch(lens, source, part="resid_post", span=range(source["input_ids"].shape[1]))
    found = logits(lens, target, replace(whole, layers=[layer]))
    real = target.spans.real
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-4)
    assert float((wanted - plain)[real].abs().max()) > 0.5


def test_the_image_before_the_first_layer_is_the_source(lens):
    """All that differs is what the vision tower made of the pictures."""
    source, target = pair(lens)
    found = logits(lens, target, patch(lens, source, layers=[0], span="image"))
    torch.testing.assert_close(found, logits(lens, source), rtol=0, atol=1e-4)


def test_order_with_clva(one):
    """CLVA reads its anchors at layer 4; a patch there before it is seen, whatever the order."""
    source, target = pair(one)
    clva, mine = cl.CLVA(tau=1.0), patch(one, source, layers=[4], span="image")
    with torch.inference_mode(), cl.intervening(one.hf_model, mine, clva) as run:
        first = one.hf_model(**target.inputs).logits
    with torch.inference_mode(), cl.intervening(one.hf_model, clva, mine):
        second = one.hf_model(**target.inputs).logits
    assert torch.equal(first, second)
    with torch.inference_mode(), cl.intervening(one.hf_model, clva) as alone:
        unpatched = one.hf_model(**target.inputs).logits
    assert float((first - unpatched).abs().max()) > 0.05
    assert not torch.equal(run.anchors.positive_map, alone.anchors.positive_map)
    assert torch.equal(run.anchors.negative_map, alone.anchors.negative_map)
    # In one place the last edit wins: an ablation of z after the patch undoes it.
    z = patch(one, source, part="z", layers=[6], span="all")
    off = cl.AblateHeads(heads=z_mask(6), rows="all")
    assert torch.equal(logits(one, target, z, off), logits(one, target, off))
    assert torch.equal(logits(one, target, off, z), logits(one, target, z))


def z_mask(layer, heads=(0, 1, 2, 3)):
    mask = torch.zeros(12, 4, dtype=torch.bool)
    mask[layer, list(heads)] = True
    return mask


def test_in_a_trace_as_outside(lens):
    source, target = pair(lens, 2)
    methods = (cl.CLVA(tau=1.0), patch(lens, source, layers=[3]), patch(lens, source, part="z"))
    expected = logits(lens, target, *methods)
    with lens.trace(target):
        cl.intervene(*methods)
        found = lens.output.logits.save()
    assert torch.equal(found, expected)
    assert float((expected - logits(lens, target, methods[0])).abs().max()) > 0.05


@pytest.mark.parametrize("part", PARTS)
def test_generating(lens, part):
    """With the cache, without it, and in a beam: prompt rows are patched, generated ones are not.

    A one-beam search's first logits and the cached run are those of a pass over the prompt.
    """
    source, target = pair(lens, 2)
    method = loud_patch(lens, source, part, span="image", layers=[2, 5])
    given = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = []
    with torch.inference_mode(), cl.intervening(lens.hf_model, method):
        for cached in (True, False):
            out = lens.hf_model.generate(**target.inputs, **given, use_cache=cached)
            found.append(torch.stack(out.logits))
        beams = lens.hf_model.generate(**target.inputs, **given, num_beams=3)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    torch.testing.assert_close(beams.logits[0][::3], found[0][0], rtol=0, atol=1e-4)
    plain = logits(lens, target)[:, -1]
    assert float((found[0][0] - plain).abs().max()) > 0.01


def test_one_source_for_a_batch(one):
    source, _ = pair(one)
    _, targets = pair(one, 3)
    method = patch(one, source, layers=[3])
    together = logits(one, targets, method)[:, -1]
    for item in range(3):
        alone = one.prompt(picture(item), QUESTIONS[item])
        torch.testing.assert_close(
            together[item], logits(one, alone, method)[0, -1], rtol=0, atol=1e-4
        )


def test_state_is_restored(one):
    source, target = pair(one)
    before = state(one.hf_model)
    method = patch(one, source, part="mlp_out")
    logits(one, target, method)
    assert state(one.hf_model) == before
    other = one.prompt(picture(0), QUESTIONS[2])
    with pytest.raises(InterventionError, match="line up"):
        logits(one, other, replace(method, span="text"))
    assert state(one.hf_model) == before


@pytest.mark.parametrize("part", ["resid_pre", "mlp_out", "cross_attn_out", "z"])
def test_qformer(one_blip, part):
    """Patching all queries of the last layer gives the source's picture to the language model."""
    source, target = pair(one_blip, 2)
    plain, wanted = logits(one_blip, target), logits(one_blip, source)
    some = patch(one_blip, source, part=part, span="all", site="qformer")
    assert float((logits(one_blip, target, some) - plain).abs().max()) > 1e-3
    whole = patch(one_blip, source, part="resid_post", span="all", layers=[11], site="qformer")
    found = logits(one_blip, target, whole)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert float((wanted - plain).abs().max()) > 0.05


# ── TransformerLens ──


BRIDGED = {}


@pytest.fixture
def bridged(lens, no_process):
    """The prompts, a bridge, its logits, and its cache of the source: once a model."""
    if lens not in BRIDGED:
        source, target = pair(lens, 3)
        bridge = cl.to_transformer_lens(lens)
        with torch.inference_mode():
            plain = bridge(**bridge.inputs(target))
            _, cache = bridge.run_with_cache(**bridge.inputs(source))
        BRIDGED[lens] = source, target, bridge, plain, cache
    return BRIDGED[lens]


@pytest.mark.parametrize("part", PARTS)
def test_transformer_lens_patches_the_same(lens, bridged, part):
    source, target, bridge, plain, theirs = bridged
    given = bridge.inputs(target)
    name = "blocks.5.attn.hook_z" if part == "z" else f"blocks.5.hook_{part}"
    places = target.spans.image
    with torch.inference_mode():

        def hook(value, hook):
            value[places] = theirs[name][places] * LOUD.get(part, 1.0)
            return value

        expected = bridge.run_with_hooks(**given, fwd_hooks=[(name, hook)])
        method = loud_patch(lens, source, part, layers=[5])
        as_hooks = method.as_hooks(bridge, target)
        hooked = bridge.run_with_hooks(**given, fwd_hooks=as_hooks)
    found = logits(lens, target, method)
    real = target.spans.real
    effect = float((expected - plain)[real].abs().max())
    for one in (found, hooked):
        error = float((one - expected)[real].abs().max())
        print(f"{part}: error {error:.1e}, effect {effect:.3f}")
        assert error < 5e-5
        assert effect > 1000 * error
    assert effect > 0.02


def test_a_sweep_is_transformer_lens_patching(one, no_process):
    """By layer and position, with TransformerLens' own setter and a metric that both take."""
    source, target = pair(one)
    bridge = cl.to_transformer_lens(one)
    given = bridge.inputs(target)
    places = target.spans.image[0].nonzero()[:, 0].tolist()

    def metric(logits):
        return logits[0, -1, 8] - logits[0, -1, 9]

    result = cl.patch_activations(
        one, source, target, layers=[2, 7], spans="image", each="position", metric=metric
    )
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(**bridge.inputs(source))
        plain = metric(bridge(**given))
        expected = torch.zeros(2, len(places))
        for row, layer in enumerate((2, 7)):
            for column, place in enumerate(places):
                name = f"blocks.{layer}.hook_resid_pre"

                def hook(value, hook, index=(layer, place)):
                    return layer_pos_patch_setter(value, index, cache[hook.name])

                expected[row, column] = metric(
                    bridge.run_with_hooks(**given, fwd_hooks=[(name, hook)])
                )
    error, effect = (result.values - expected).abs().max(), (expected - plain).abs().max()
    print(f"error {float(error):.1e}, effect {float(effect):.3f}")
    assert error < 5e-5
    assert effect > 1000 * error
    assert result.on_grid().shape == (2, 4, 4)
    assert result.label == "metric"


# ── the sweep ──


def test_a_sweep_is_its_patches(one):
    source, target = (one.prompt([picture(i), picture(i + 1)], QUESTIONS[0]) for i in (11, 0))
    clva = cl.CLVA(tau=1.0)
    result = cl.patch_activations(one, source, target, layers=[3, 8], part="z", method=clva)
    assert result.values.shape == (2, 2, 3)
    cache = one.run_with_cache(source, lambda name: name.endswith("hook_z"), method=clva).cache
    yes, no = 8, 9
    assert one.words.decode([yes]) == "yes"
    assert one.words.decode([no]) == "no"
    for row, layer in enumerate((3, 8)):
        for column, span in enumerate(("image", "text", "last")):
            method = cl.PatchActivations(
                source=source, cache=cache, part="z", layers=[layer], span=span
            )
            made = logits(one, target, clva, method)[:, -1]
            expected = made[:, yes] - made[:, no]
            torch.testing.assert_close(result.values[:, row, column], expected, rtol=0, atol=1e-5)
    effect = result.values - result.target[:, None, None]
    assert float(effect.abs().max()) > 0.05
    share = effect / (result.source - result.target)[:, None, None]
    torch.testing.assert_close(result.normalised, share)
    with pytest.raises(ParameterError, match="of a batch"):
        result.draw()
    assert result._repr_png_() is None


def test_heads_one_by_one(one):
    source, target = pair(one)
    sweep = {"layers": [6], "spans": "all", "part": "z", "each": "head"}
    result = cl.patch_activations(one, source, target, **sweep)
    assert result.columns == ("0", "1", "2", "3")
    cache = one.run_with_cache(source, "blocks.6.attn.hook_z").cache
    for head in range(4):
        options = {"part": "z", "span": "all", "heads": z_mask(6, [head])}
        method = cl.PatchActivations(source=source, cache=cache, **options)
        made = logits(one, target, method)[0, -1]
        assert float(result.values[0, head]) == pytest.approx(float(made[8] - made[9]), abs=1e-5)
    assert len(set(result.values[0].tolist())) == 4


def test_results_print_and_draw_themselves(one):
    source, target = pair(one)
    spans = cl.patch_activations(one, source, target, layers=[0, 11])
    assert repr(spans).startswith("PatchingResult(resid_pre: 2 layers × 3 spans; logit(yes)")
    assert "layer 0, image: " in repr(spans)
    drawn = spans.draw()
    assert drawn.axes[0].get_xlabel() == "patched span"
    assert [row["column"] for row in drawn.rows[:3]] == ["image", "text", "last"]
    assert drawn.rows[0]["value"] == pytest.approx(1.0, abs=1e-4)
    assert (spans._repr_png_() or b"").startswith(b"\x89PNG")
    tokens = cl.patch_activations(one, source, target, layers=[3], spans="image", each="position")
    assert len(tokens.draw().axes) == 2
    text = cl.patch_activations(one, source, target, layers=[3], spans="text", each="position")
    assert text.draw().axes[0].get_xlabel().startswith("patched position of the span 'text'")
    with pytest.raises(ParameterError, match="one by one lie on a grid"):
        text.on_grid()
    same = cl.patch_activations(one, target, target, layers=[3])
    torch.testing.assert_close(same.values, same.target.expand(1, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(same.effect, torch.zeros(1, 3), rtol=0, atol=1e-5)


def test_shares_of_almost_nothing_are_given_in_nats(one):
    source, target = pair(one)
    found = cl.patch_activations(one, source, target, layers=[0, 3])
    gap = float(found.source - found.target)
    assert found.divides
    for largest, divided in ((30 * gap, False), (10 * gap, True)):
        shifted = replace(found, values=found.target + torch.full((2, 3), largest))
        assert bool(shifted.divides) == divided
        label = shifted.draw().axes[-1].get_ylabel()
        assert ("1: source" in label) == divided
        assert (f"in nats, as source − target is only {gap:+.2g}" in label) != divided
        drawn = [row["value"] for row in shifted.draw().rows]
        assert drawn == pytest.approx([10 if divided else largest] * 6, rel=1e-4)
    same = cl.patch_activations(one, target, target, layers=[3], spans="image", each="position")
    with pytest.raises(ParameterError, match=r"almost the same for source and target.*\.effect"):
        _ = same.normalised
    assert "in nats" in same.draw().axes[-1].get_ylabel()


# ── refusals ──


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "resid_mid"}, r"part must be one of.*'resid_mid'"),
        ({"heads": torch.ones(12, 4, dtype=torch.bool)}, "part='resid_pre', but single heads"),
        ({"layers": [12]}, "layers names layer 12"),
        ({"span": "picture"}, "span must be 'last'"),
        ({"span": [99]}, "names positions 99 to 99"),
        ({"span": "image", "site": "qformer"}, "no attention site 'qformer'"),
        ({"layers": [1]}, r"cache has no 'blocks.1.hook_resid_pre'.*run_with_cache\(source\)"),
        ({"part": "mlp_out"}, "cache has no 'blocks.0.hook_mlp_out' nor that of another layer"),
    ],
)
def test_refused(one, ask, untyped, options, message):
    source, target = pair(one)
    cache = one.run_with_cache(source, "blocks.0.hook_resid_pre").cache
    with pytest.raises(ClvaLensError, match=message):
        logits(one, target, cl.PatchActivations(source=source, cache=cache, **options))


def test_prompts_that_do_not_line_up(one, untyped):
    source, target = pair(one)
    longer = one.prompt(picture(0), QUESTIONS[2])
    with pytest.raises(InterventionError, match="'text' has 7 positions in the source but 13"):
        cl.patch_activations(one, source, longer)
    with pytest.raises(ParameterError, match="do not line up"):
        cl.patch_activations(one, source, longer, spans="text", each="position")
    for each in ("head", "position"):
        with pytest.raises(ParameterError, match="one span and part='z'") as refused:
            cl.patch_activations(one, source, target, layers=[6], each=each)
        # What the error advises works.
        options = dict(re.findall(r"(\w+)='(\w+)'", str(refused.value).split("Pass ")[1]))
        made = cl.patch_activations(one, source, target, layers=[6], **{"each": each, **options})
        assert made.each == each
    with pytest.raises(ParameterError, match="2 numbers from the logits of 1 samples"):
        cl.patch_activations(one, source, target, metric=lambda logits: logits[0, 0, :2])
    two, _ = pair(one, 2)
    with pytest.raises(InterventionError, match="source is 2 prompts, but 1 are run"):
        logits(one, target, patch(one, two))
    with pytest.raises(ParameterError, match="but the source prompt has"):
        logits(one, target, cl.PatchActivations(source=target, cache=patch(one, two).cache))
    with pytest.raises(PromptError, match="must have input_ids"):
        logits(one, target, replace(patch(one, source), source={}))
    as_made = replace(patch(one, source), source=dict(source.inputs))
    assert torch.equal(logits(one, target, as_made), logits(one, target, patch(one, source)))
