"""Sparse autoencoders: their formulas in float64, SAELens' files, steering, and a trained one.

The one that is trained learns a toy's image rows in seconds, and is judged on pictures that it has
not seen, beside random directions.
"""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from test_state import state
from tiny_models import QUESTIONS, double_of, lens_of, picture

import clva_lens as cl
from clva_lens.experiments.toy_sae import toy_rows, train_sae
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.sae import SETTINGS, WEIGHTS, SetFeatures, SparseAutoencoder
from clva_lens.toy.scenes import render, sample_scenes

WIDTH, FEATURES, LAYER = 32, 20, 5


def made(kind="standard", **given):
    g = torch.Generator().manual_seed(4)
    weights = [
        torch.randn(size, generator=g)
        for size in ((WIDTH, FEATURES), (FEATURES, WIDTH), (FEATURES,), (WIDTH,))
    ]
    more = {"jumprelu": {"threshold": 3 * torch.rand(FEATURES, generator=g)}, "topk": {"k": 3}}
    return SparseAutoencoder(*weights, LAYER, kind=kind, **more.get(kind, {}), **given)


def by_hand(sae, row):
    """The features of one row, from the formula, in Python's numbers."""
    x = [a - b * sae.apply_b_dec_to_input for a, b in zip(row, sae.b_dec.tolist(), strict=True)]
    pre = [
        sum(a * w for a, w in zip(x, column, strict=True)) + bias
        for column, bias in zip(sae.W_enc.T.tolist(), sae.b_enc.tolist(), strict=True)
    ]
    if sae.kind == "topk":
        least = sorted(pre)[-sae.k]
        return [max(z, 0.0) if z >= least else 0.0 for z in pre]
    if sae.kind == "jumprelu":
        return [
            z if z > max(0, t) else 0.0 for z, t in zip(pre, sae.threshold.tolist(), strict=True)
        ]
    return [max(z, 0.0) for z in pre]


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("shifted", [True, False])
def test_features_are_their_formula(kind, shifted):
    lens, sae = lens_of("full", "sdpa"), made(kind, apply_b_dec_to_input=shifted)
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    found = cl.sae_features(lens, prompt, sae, span="text")
    cache_of = lens.run_with_cache(prompt).cache
    whole = cache_of[f"blocks.{LAYER}.hook_resid_post"][0].double()
    rows = whole[prompt.spans.places("text")[0]]
    wanted = torch.tensor([by_hand(sae, row) for row in rows.tolist()])
    torch.testing.assert_close(found.values[0], wanted, rtol=0, atol=1e-3)
    assert 0 < float((wanted > 0).float().mean()) < 1
    rebuilt = wanted.double() @ sae.W_dec.double() + sae.b_dec.double()
    residual, total = (rows - rebuilt).square().sum(), (rows - rows.mean(0)).square().sum()
    assert found.explained == pytest.approx(float(1 - residual / total), rel=1e-4)
    assert found.active == pytest.approx(float((wanted > 0).sum(1).float().mean()), abs=0.2)


@pytest.mark.parametrize("span", ["text", "image"])
def test_setting_features_is_its_formula(span):
    """Against float64, by a plain hook that writes each row anew."""
    lens, sae, exact = lens_of("full", "sdpa"), made(), double_of("full")
    prompt, values = lens.prompt(picture(0), QUESTIONS[0]), {3: 4.0, 11: 0.0}
    places = prompt.spans.places(span)[0].tolist()

    def edit(_, args, out):
        out = out.clone()
        for place in places:
            row = out[0, place]
            own = by_hand(sae, row.tolist())
            for feature, value in values.items():
                row = row + (value - own[feature]) * sae.W_dec[feature].double()
            out[0, place] = row
        return out

    layer = exact.model.language_model.layers[LAYER]
    handle = layer.register_forward_hook(edit)
    given = {k: v.double() if v.is_floating_point() else v for k, v in prompt.inputs.items()}
    try:
        with torch.no_grad():
            wanted = exact(**given).logits[0, -1]
    finally:
        handle.remove()
    before = state(lens.hf_model)
    with torch.no_grad():
        plain = lens.hf_model(**prompt).logits[0, -1]
        with cl.intervening(lens, SetFeatures(sae=sae, features=values, span=span)):
            found = lens.hf_model(**prompt).logits[0, -1]
    error, effect = (float((wanted - one).abs().max()) for one in (found, plain))
    print(f"{span}: error {error:.1e}, effect {effect:.2f}")
    assert error < 2e-4 < 0.05 < effect
    assert state(lens.hf_model) == before


def test_a_feature_is_a_steering_vector():
    """Where the feature is what it is set to, nothing changes; a push is its decoder row."""
    lens, sae = lens_of("full", "sdpa"), made()
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    own = float(cl.sae_features(lens, prompt, sae, span="last").values[0, 0, 7])
    steer = cl.Steer(vector=sae.vector(7), span="last", strength=2.5)
    with torch.no_grad():
        plain = lens.hf_model(**prompt).logits
        with cl.intervening(lens, SetFeatures(sae=sae, features={7: own}, span="last")):
            torch.testing.assert_close(lens.hf_model(**prompt).logits, plain, rtol=0, atol=1e-4)
        with cl.intervening(lens, SetFeatures(sae=sae, features={7: own + 2.5}, span="last")):
            pushed = lens.hf_model(**prompt).logits
        with cl.intervening(lens, steer):
            torch.testing.assert_close(lens.hf_model(**prompt).logits, pushed, rtol=0, atol=1e-4)
    assert float((pushed - plain).abs().max()) > 0.05


def test_files_in_saelens_layouts(tmp_path):
    sae = made("jumprelu")
    again = SparseAutoencoder.load(sae.save(tmp_path / "new"))
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == [SETTINGS, WEIGHTS]
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(again, name), getattr(sae, name))
    assert (again.layer, again.part, again.kind) == (LAYER, "resid_post", "jumprelu")
    # Older releases keep all settings in one table, and name the activation.
    plain = made()
    tensors = {name: getattr(plain, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    old = tmp_path / "old"
    old.mkdir()
    save_file(tensors, old / WEIGHTS)
    told = {
        "architecture": "standard", "hook_name": "blocks.3.hook_resid_pre", "hook_layer": 3,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2},
        "apply_b_dec_to_input": False,
        "normalize_activations": "none", "finetuning_scaling_factor": False, "d_in": WIDTH,
    }  # fmt: skip
    (old / SETTINGS).write_text(json.dumps(told))
    found = SparseAutoencoder.load(old)
    assert (found.layer, found.part, found.kind, found.k) == (3, "resid_pre", "topk", 2)
    assert found.apply_b_dec_to_input is False
    bare = tmp_path / "bare.safetensors"
    save_file({**tensors, "layer": torch.tensor(4)}, bare)
    assert SparseAutoencoder.load(bare).layer == 4
    save_file(tensors, bare)
    assert SparseAutoencoder.load(bare, layer=2, part="mlp_out").part == "mlp_out"
    with pytest.raises(ParameterError, match="Pass layer="):
        SparseAutoencoder.load(bare)
    for name, value in (
        ("normalize_activations", "layer_norm"),
        ("reshape_activations", "hook_z"),
        ("finetuning_scaling_factor", True),
        ("rescale_acts_by_decoder_norm", True),
    ):
        (old / SETTINGS).write_text(json.dumps({**told, name: value}))
        with pytest.raises(ParameterError, match=f"{name}=.*not computed here"):
            SparseAutoencoder.load(old)
    (old / SETTINGS).write_text(
        json.dumps({**told, "architecture": "gated", "activation_fn_str": None})
    )
    with pytest.raises(ParameterError, match="architecture='gated'"):
        SparseAutoencoder.load(old)
    with pytest.raises(ParameterError, match="no sparse autoencoder can be read"):
        SparseAutoencoder.load(tmp_path / "nothing")


def test_what_does_not_fit_is_refused(untyped):
    lens, sae = lens_of("full", "sdpa"), made()
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    with pytest.raises(ParameterError, match="transpose"):
        SparseAutoencoder(sae.W_dec, sae.W_enc, sae.b_enc, sae.b_dec, 0)
    with pytest.raises(ParameterError, match="'topk' with k"):
        SparseAutoencoder(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, 0, kind="topk")
    with pytest.raises(ParameterError, match="0 to 19"):
        sae.vector(20)
    with pytest.raises(ParameterError, match="0 to 19"):
        SetFeatures(sae=sae, features={-1: 0.0})
    with pytest.raises(ParameterError, match="finite"):
        SetFeatures(sae=sae, features={1: float("nan")})
    narrow = SparseAutoencoder(torch.ones(8, 9), torch.ones(9, 8), torch.ones(9), torch.ones(8), 0)
    with pytest.raises(ParameterError, match="rows of 8"):
        cl.sae_features(lens, prompt, narrow)
    with pytest.raises(ParameterError, match="image tokens of a single prompt"):
        cl.sae_features(lens, prompt, sae, span="text").draw()
    far = SparseAutoencoder(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, 12)
    with pytest.raises(ParameterError, match="12"):
        cl.sae_features(lens, prompt, far)


@cache
def trained():
    model = cl.load("toy-llava")
    return model, train_sae(toy_rows(model, 6, 12, seed=1), 6, features=192, steps=150)


def test_one_trained_on_a_toy_rebuilds_pictures_it_has_not_seen(tmp_path):
    model, sae = trained()
    prompt = model.prompt(render(sample_scenes(1, seed=7)[0]), "is there a cup in the image?")
    found = cl.sae_features(model, prompt, sae)
    null = cl.sae_features(model, prompt, sae.random())
    print(found, null)
    assert found.explained > 0.8 > 0.4 > null.explained
    assert found.active < 96
    weights = sae.save(tmp_path) / WEIGHTS
    assert weights.stat().st_size < 210_000
    assert found.drawable and len(found.draw().axes) >= 4
    assert [i for i, _ in found.top(3)] == found.values.mean((0, 1)).topk(3).indices.tolist()
