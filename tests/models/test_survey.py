"""Every image-text-to-text class of transformers keeps the laws, or is in the table that says why.

The models are tiny and random; their pictures are random pixels that are fed directly, without a
processor (those are tested in test_processors.py, for two). What the laws are held against is
transformers' own eager attention, and the model without interventions.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_families as tiny
import torch
import transformers
from survey_table import ABSENT, NAMES, OWN, PROVEN, REASONS, SINCE, table

import clva_lens as cl
from clva_lens.engine.run import running
from clva_lens.ground.errors import InterventionError, ModelLoadError, PromptError
from clva_lens.lens.check import check_family
from clva_lens.lens.observers import Observer
from clva_lens.methods.target import shape_of
from clva_lens.models.family import find_family
from clva_lens.models.prompt import Prompt, VisualTokens

STEPS = 3
VARIANTS = ("llava (pixtral)",)
# transformers' own batches of these differ from single prompts by more than rounding.
UNBATCHED = ("hunyuan_vl",)
GRIDS = {
    "gemma3": (4, 4),
    "internvl": (4, 4),
    "llava (pixtral)": (4, 4),
    "mistral3": (4, 4),
    "paligemma": (4, 4),
    "qwen2_vl": (4, 4),
    "qwen2_5_vl": (4, 4),
    "qwen3_vl": (4, 4),
}


@pytest.fixture(params=PROVEN + VARIANTS)
def kind(request):
    return request.param


def anchored(model, **strengths):
    """CLVA with anchors at the first layers that have attention."""
    first, second = find_family(model).sites(model)[0].layers[:2]
    given = {"negative_layer": first, "positive_layer": second, "tau": 0.5}
    return cl.CLVA(**(given | strengths))


def read(model, inputs, *methods):
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model(**inputs).logits[:, -1]


def write(model, inputs, *methods, steps=STEPS, **options):
    with torch.inference_mode(), cl.intervening(model, *methods):
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.stack(out.logits, dim=1)


def apart(one, other):
    return float((one - other).abs().max())


def test_laws(kind):
    """Zero strength = greedy; CLVA moves the logits; cached = uncached; batch = singles."""
    model = tiny.tiny_model(kind)
    inputs, other = tiny.sample(kind, 0), tiny.sample(kind, 1, words=9)
    assert find_family(model).name == "generic"
    kernel = model.get_decoder().config._attn_implementation
    clva = anchored(model)
    greedy, edited = write(model, inputs), write(model, inputs, clva)
    assert torch.equal(write(model, inputs, anchored(model, alpha=0.0, beta=0.0)), greedy)
    effect = apart(edited[:, 0], greedy[:, 0])
    assert effect > 0.05
    assert apart(write(model, inputs, clva, use_cache=False), edited) < effect / 500
    pair = tiny.batch([inputs, other])
    singles = [torch.cat([read(model, one, *m) for one in (inputs, other)]) for m in ((), (clva,))]
    apart_by = [
        apart(read(model, pair, *m), one) for m, one in zip(((), (clva,)), singles, strict=True)
    ]
    if kind in UNBATCHED:
        assert min(apart_by) > 1e-3
    else:
        assert max(apart_by) < effect / 200
    assert torch.equal(write(model, inputs), greedy)
    assert model.get_decoder().config._attn_implementation == kernel


def test_rows_are_those_of_eager_attention(kind):
    """What is read from queries and keys is what the model's own eager attention returns."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    family = find_family(model)
    (site,) = family.sites(model)
    fused = read(model, inputs, anchored(model))
    weights, observer = {}, Observer("all", shape_of(model))

    def keep(layer):
        return lambda module, args, out: weights.update({layer: out[1]})

    hooks = [
        module.register_forward_hook(keep(layer))
        for layer, module in zip(site.layers, site.modules, strict=True)
    ]
    decoder = model.get_decoder()  # a part that has no other kernel keeps its own
    kernel = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        with torch.inference_mode(), running(model, [observer]):
            model(**inputs)
        for hook in hooks:
            hook.remove()
        eager = read(model, inputs, anchored(model))
    finally:
        decoder.set_attn_implementation(kernel)
    maps = observer.trace(batched=True).maps
    (visual,) = family.spans(model, "decoder", inputs).visual_index()
    for index, layer in enumerate(site.layers):
        torch.testing.assert_close(maps[0, index], weights[layer][0, :, -1, visual])
    assert maps.std() > 1e-3
    assert apart(eager, fused) < apart(eager, read(model, inputs)) / 20


def test_spans_are_where_the_features_are(kind):
    """The decoder's inputs at the image tokens are what the model makes of the picture."""
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    spans = find_family(model).spans(model, "decoder", inputs)
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        read(model, inputs)
    finally:
        hook.remove()
    found = seen["inputs_embeds"][spans.image]
    assert torch.equal(found, tiny.features(model, tiny.pictures(inputs)))
    assert found.std(dim=0).mean() > 1e-3


def test_check_at_the_door(kind):
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    spans = find_family(model).spans(model, "decoder", inputs)
    tokens = VisualTokens(spans, "none is looked at")

    def prompt(image: np.ndarray, question: str) -> Prompt:
        return Prompt(inputs, {"decoder": tokens}, False, (), (question,), None)

    assert check_family(model, prompt) > 0.01


@pytest.mark.parametrize(("kind", "grid"), GRIDS.items())
def test_grids(kind, grid):
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    assert find_family(model).prompt_grid(model, "decoder", inputs) == grid


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("idefics3", "cut into tiles"),
        ("llava_next", "says where its 52"),
        ("aria", "says where its 8"),
    ],
)
def test_no_grid_is_said(kind, message):
    model, inputs = tiny.tiny_model(kind), tiny.sample(kind, 0)
    with pytest.raises(PromptError, match=message):
        find_family(model).prompt_grid(model, "decoder", inputs)


def test_every_class_is_in_one_table():
    """A class that is new in transformers must keep the laws; one that is gone must go."""
    assert set(OWN) | set(REASONS) <= set(NAMES)
    assert not set(OWN) & set(REASONS)
    assert set(SINCE) - set(NAMES) == ABSENT
    assert set(tiny.TINY) - set(NAMES) == set(VARIANTS) | ABSENT & set(tiny.TINY)


@pytest.mark.parametrize(("kind", "family"), OWN.items())
def test_families_of_their_own_win(kind, family):
    assert find_family(tiny.default_model(kind)).name == family


@pytest.mark.parametrize("kind", REASONS)
def test_reasons_hold(kind):
    reason = REASONS[kind]
    if reason.kind == "refused":
        model = tiny.default_model(kind)
        with pytest.raises(ModelLoadError, match=reason.message):
            find_family(model).sites(model)
    elif reason.kind == "refused as it runs":
        model = tiny.tiny_model(kind)
        with pytest.raises(InterventionError, match=reason.message):
            read(model, tiny.sample(kind, 0), anchored(model))
    elif reason.kind == "does not build":
        with pytest.raises(
            (AttributeError, ImportError, KeyError, TypeError), match=reason.message
        ):
            tiny.default_model(kind)
    else:
        model = tiny.default_model(kind)
        assert find_family(model).sites(model)[0].layers
        with pytest.raises(Exception, match=reason.message) as caught:
            read(tiny.tiny_model(kind), tiny.sample(kind, 0))
        assert not isinstance(caught.value, cl.ClvaLensError)


def test_the_page_shows_the_table():
    """That of docs/models.md is of one version, which it names."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (version,) = re.findall(r"every image-text-to-text class in transformers (\d+\.\d+)", page)
    if not transformers.__version__.startswith(f"{version}."):
        pytest.skip(f"un-skip with transformers {version}")
    assert table() in page
