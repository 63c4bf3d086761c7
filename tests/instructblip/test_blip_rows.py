"""Law 5 at both sites: what is observed is what the eager float64 model computes."""

import pytest
import queries
import reference
import torch
from tiny_models import LANGUAGES, blip_of, exact_blip, picture

import clva_lens as cl
from clva_lens.ground.errors import ParameterError

ATOL = 2e-5
STRONG = {"qformer": cl.CLVA(tau=1.0), "decoder": cl.CLVA(tau=1.0, site="decoder")}


def recorded(inputs, item):
    """Return both sites' patterns [layer, head, query, key] of one sample, by hooks, in float64."""
    model, alone = exact_blip(), queries.single(inputs, item)
    alone["pixel_values"] = alone["pixel_values"].double()
    stack, decoder = model.qformer.encoder.layer, model.language_model.model.layers
    modules = {
        "qformer": [layer.crossattention.attention for layer in stack[::2]],
        "decoder": [layer.self_attn for layer in decoder],
    }
    kept = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(lambda *call, into=kept[name]: into.append(call[2][1][0]))
        for name, some in modules.items()
        for module in some
    ]
    with torch.inference_mode():
        model(**alone)
    for handle in handles:
        handle.remove()
    assert [len(kept[name]) for name in modules] == [6, 12]
    return {name: torch.stack(some) for name, some in kept.items()}


def image_columns(ids):
    return (ids == 5).nonzero()[:, 0]


def reduced(patterns, inputs, site, item):
    """Return (image, system, text) masses and maps of one sample's patterns, by their meaning."""
    if site == "qformer":
        cls, patches = patterns[..., 0], patterns[..., 1:]
        nothing = torch.zeros(6, 4)
        return patches.sum(dim=-1).mean(dim=-1), cls.mean(dim=-1), nothing, patches.mean(dim=2)
    ids = queries.single(inputs, item)["input_ids"][0]
    image = image_columns(ids)
    system, text = torch.arange(int(image[0])), torch.arange(int(image[-1]) + 1, len(ids))
    masses = [
        patterns[:, :, text][..., span].sum(dim=-1).mean(dim=-1) for span in (image, system, text)
    ]
    return (*masses, patterns[:, :, -1][..., image])


def check(trace, wanted):
    found = (trace.intensity, trace.system, trace.text, trace.maps)
    for name, ours, theirs in zip(("image", "system", "text", "maps"), found, wanted, strict=True):
        torch.testing.assert_close(
            ours, theirs.float(), rtol=0, atol=ATOL, msg=lambda m, n=name: f"{n}: {m}"
        )


# ── observed rows ──


def test_batch_is_the_eager_models(blip, ask, site):
    prompt = ask(blip, 3)
    trace = cl.trace_attention(blip, prompt, site=site)
    assert trace.site == site
    assert trace.maps.shape == ((3, 6, 4, 16) if site == "qformer" else (3, 12, 4, 8))
    for item in range(3):
        patterns = recorded(prompt.inputs, item)[site]
        check(trace[item], reduced(patterns, prompt.inputs, site, item))
    # Not vacuous: heads, layers and pictures differ.
    assert float(trace.intensity.std(dim=2).min()) > 0.005
    assert float((trace.maps[:, 0] - trace.maps[:, 4]).abs().max()) > 0.05
    assert float((trace.maps[0] - trace.maps[1]).abs().max()) > 0.05


def test_batch_is_singles(one_blip, ask, site):
    together = cl.trace_attention(one_blip, ask(one_blip, 3), STRONG[site], site=site)
    for item in range(3):
        alone = cl.trace_attention(one_blip, ask(one_blip, first=item), STRONG[site], site=site)
        check(together[item], (alone.intensity, alone.system, alone.text, alone.maps))
        torch.testing.assert_close(together[item].logits, alone.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("edited", ["qformer", "decoder"])
def test_under_a_method_is_the_references(blip, ask, site, edited):
    """A method at either site is seen at both: the decoder looks at what the Q-Former read."""
    prompt = ask(blip, 3)
    trace = cl.trace_attention(blip, prompt, STRONG[edited], site=site)
    plain = cl.trace_attention(blip, prompt, site=site)
    for item in range(3):
        result = queries.run(exact_blip(), prompt.inputs, item, **{edited: [reference.Clva(tau=1)]})
        patterns = torch.stack(getattr(result, site).patterns)
        check(trace[item], reduced(patterns, prompt.inputs, site, item))
    moved = (trace.maps - plain.maps).abs().amax(dim=(0, 2, 3))
    first = {"qformer": 3, "decoder": 5}[site] if site == edited else 0
    if (site, edited) == ("qformer", "decoder"):
        assert float(moved.max()) == 0  # nothing flows back
    else:
        assert float(moved[:first].sum()) == 0
        assert float(moved[first:].min()) > 0.01


def test_rows_sum_to_one(blip, ask, site):
    for method in (None, *STRONG.values(), cl.KnockOut(), cl.KnockOut(site="decoder")):
        trace = cl.trace_attention(blip, ask(blip, 3), method, site=site)
        total = trace.intensity + trace.system + trace.text
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_generated_rows_are_the_eager_models(blip, ask):
    """Each step's maps at the decoder equal the eager model's; the Q-Former has no steps."""
    prompt = ask(blip, 2)
    options = {"max_new_tokens": 4, "do_sample": False}
    with (
        torch.inference_mode(),
        cl.observing(blip, layers=(0, 6), site="decoder") as seen,
        cl.observing(blip) as reading,
    ):
        blip.hf_model.generate(**prompt.inputs, **options)
    with torch.inference_mode():
        out = blip_of("eager").hf_model.generate(
            **prompt.inputs, **options, output_attentions=True, return_dict_in_generate=True
        )
    assert reading.steps == []
    assert len(seen.steps) == len(out.attentions) - 1 == 3
    for step, patterns in zip(seen.steps, out.attentions[1:], strict=True):
        for item in range(2):
            image = image_columns(prompt.inputs["input_ids"][item])
            wanted = torch.stack([patterns[0], patterns[6]])[:, item][..., image]
            torch.testing.assert_close(step[:, item], wanted, rtol=0, atol=ATOL)


# ── why CLS is not an image token ──


def test_phi_with_cls_is_one(one_blip, ask):
    """All keys of the Q-Former are the picture's: over CLS + patches, Φ (Eq. 1) is 1 everywhere.

    σ over the heads is then 0, Eqs. 2-3 select nobody, and only the policy for empty sets would
    decide. So V is the patches, and Φ differs from head to head.
    """
    trace = cl.trace_attention(one_blip, ask(one_blip, 3))
    whole = trace.intensity + trace.system
    assert float(trace.text.abs().max()) == 0
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-6)
    for item in range(3):
        phi = recorded(ask(one_blip, 3).inputs, item)["qformer"].sum(dim=-1).mean(dim=-1)
        torch.testing.assert_close(phi, torch.ones_like(phi), rtol=0, atol=1e-12)
    assert float(trace.intensity.std(dim=-1).min()) > 0.005
    degenerate = cl.classify_heads(torch.ones(6, 4), empty="skip")
    assert not degenerate.sensitive.any()
    assert not degenerate.insensitive.any()
    for classes in (degenerate, cl.classify_heads(torch.ones(6, 4))):
        assert classes.sensitive_fallback.all()
        assert classes.insensitive_fallback.all()
    usable = trace.heads(empty="skip")
    assert usable.sensitive[:, trace.layers.index(4)].any()
    assert usable.insensitive[:, trace.layers.index(0)].any()


# ── saliency on the picture ──


def composed(inputs, item, layers=slice(None)):
    """Return Σ over queries of decoder-to-query times query-to-patch, by hand."""
    patterns = recorded(inputs, item)
    image = image_columns(queries.single(inputs, item)["input_ids"][0])
    looks = patterns["qformer"][layers][..., 1:].mean(dim=(0, 1))
    onto = patterns["decoder"][:, :, -1][..., image].mean(dim=1)
    return torch.einsum("lq,qv->lv", onto, looks).float()


def test_composed_saliency(one_blip, ask):
    prompt = ask(one_blip, 3)
    found = cl.composed_saliency(one_blip, prompt)
    some = cl.composed_saliency(one_blip, prompt, qformer_layers=(0, 8), layers=(11, 3))
    assert found.shape == (3, 12, 16)
    assert some.shape == (3, 2, 16)
    for item in range(3):
        wanted = composed(prompt.inputs, item)
        torch.testing.assert_close(found[item], wanted, rtol=0, atol=ATOL)
        wanted = composed(prompt.inputs, item, layers=[0, 4])[[3, 11]]
        torch.testing.assert_close(some[item], wanted, rtol=0, atol=ATOL)
        alone = cl.composed_saliency(one_blip, ask(one_blip, first=item))
        assert alone.shape == (12, 16)
        torch.testing.assert_close(found[item], alone, rtol=0, atol=ATOL)
        assert prompt.on_grid(found[item]).shape == (12, 4, 4)
    assert float(found.std(dim=2).min()) > 1e-3


@pytest.mark.parametrize("edited", ["qformer", "decoder"])
def test_composed_saliency_under_a_method(one_blip, ask, edited):
    prompt = ask(one_blip, 3)
    found = cl.composed_saliency(one_blip, prompt, STRONG[edited])
    for item in range(3):
        result = queries.run(exact_blip(), prompt.inputs, item, **{edited: [reference.Clva(tau=1)]})
        looks = torch.stack(result.qformer.patterns)[..., 1:].mean(dim=(0, 1))
        onto = torch.stack(result.decoder.patterns)[:, :, -1, result.decoder.image].mean(dim=1)
        wanted = (onto @ looks).float()
        torch.testing.assert_close(found[item], wanted, rtol=0, atol=ATOL)
    plain = cl.composed_saliency(one_blip, prompt)
    assert float((found - plain).abs().max()) > 0.01


@pytest.mark.parametrize("heads", ["all", "sensitive", "insensitive"])
def test_composed_saliency_is_a_part_of_the_decoders_mass(one_blip, ask, heads):
    """What is passed on to CLS is lost; nothing is won."""
    prompt = ask(one_blip, 3)
    mass = cl.trace_attention(one_blip, prompt, site="decoder").saliency(heads).sum(dim=-1)
    found = cl.composed_saliency(one_blip, prompt, heads=heads)
    assert float(found.min()) >= 0
    assert bool((found.sum(dim=-1) < mass).all())
    kept = found.sum(dim=-1) / mass
    assert 0.5 < float(kept.min()) <= float(kept.max()) < 1


def test_composed_saliency_without_a_qformer_is_the_decoders(one, ask):
    for method in (None, cl.CLVA(tau=1.0)):
        wanted = cl.trace_attention(one, ask(one, 3), method, site="decoder").saliency("sensitive")
        found = cl.composed_saliency(one, ask(one, 3), method, heads="sensitive")
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("language", LANGUAGES)
def test_composed_saliency_of_every_language_model(language, ask):
    lens = blip_of("sdpa", language)
    found = cl.composed_saliency(lens, ask(lens, 2))
    assert found.shape == (2, 12, 16)
    assert float(found.min()) >= 0
    assert float(found.sum(dim=-1).max()) < 1


# ── head classes and drift ──


def test_drift_and_heads(one_blip, ask, site):
    trace = cl.trace_attention(one_blip, ask(one_blip, 3), site=site)
    drift = cl.attention_drift(trace)
    layers = (0, 2, 4, 6, 8, 10) if site == "qformer" else tuple(range(12))
    assert trace.layers == drift.layers == layers
    assert trace.num_layers == 12
    assert (drift.positive_layer, drift.negative_layer) == (4, 0)
    assert drift.entropy_normalised.shape == (3, len(layers))
    sensitive = trace.heads().sensitive
    assert sensitive.shape == (3, len(layers), 4)
    # The curves pass through the anchors' own maps.
    where = layers.index(4)
    one, other = trace.saliency("all")[:, where], trace.saliency("sensitive")[:, where]
    for item in range(3):
        r = torch.corrcoef(torch.stack([one[item], other[item]]))[0, 1]
        assert abs(float(drift.toward_positive[item, where] - r)) < 1e-4
    assert f"{site}: 3 samples × {len(layers)} layers" in repr(trace)


def test_head_classes_of_a_trace_are_accepted(one_blip, ask, site):
    """Heads measured beforehand are those that Eqs. 2-3 would choose, so the run is the same."""
    prompt = ask(one_blip)
    classes = cl.trace_attention(one_blip, prompt, site=site).heads()
    own = cl.trace_attention(one_blip, prompt, cl.CLVA(tau=1.0, site=site))
    given = cl.trace_attention(one_blip, prompt, cl.CLVA(tau=1.0, site=site, heads=classes))
    swapped = cl.HeadClasses.from_indices(
        {row: [0] for row in range(classes.sensitive.shape[0])},
        {row: [1] for row in range(classes.sensitive.shape[0])},
        layers=classes.sensitive.shape[0],
        heads=4,
    )
    other = cl.trace_attention(one_blip, prompt, cl.CLVA(tau=1.0, site=site, heads=swapped))
    assert torch.equal(given.logits, own.logits)
    assert float((other.logits - own.logits).abs().max()) > 1e-3


def test_chosen_layers(one_blip, ask):
    whole = cl.trace_attention(one_blip, ask(one_blip))
    some = cl.trace_attention(one_blip, ask(one_blip), layers=(8, 2))
    assert some.layers == (2, 8)
    assert torch.equal(some.maps, whole.maps[[1, 4]])
    with pytest.raises(ParameterError, match=r"layer 3.*qformer has layers 0, 2, 4, 6, 8, 10"):
        cl.trace_attention(one_blip, ask(one_blip), layers=(3,))


def test_pictures_of_two_sites_are_not_put_together(one_blip, ask):
    batch = ask(one_blip, 2)
    traces = [cl.trace_attention(one_blip, batch, site=site) for site in ("qformer", "decoder")]
    with pytest.raises(ParameterError, match=r"different sites or layers"):
        type(traces[0]).concatenate(traces)
    both = type(traces[0]).concatenate([traces[0], traces[0]])
    assert both.site == "qformer"
    assert both.maps.shape == (4, 6, 4, 16)


def test_another_picture_is_seen_by_the_queries(one_blip):
    """The same question about two pictures: both sites see that they differ."""
    prompt = one_blip.prompt([picture(0), picture(1)], "what is it ?")
    for name in ("qformer", "decoder"):
        maps = cl.trace_attention(one_blip, prompt, site=name).maps
        assert float((maps[0] - maps[1]).abs().max()) > 0.05
