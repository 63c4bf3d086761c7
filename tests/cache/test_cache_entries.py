"""Every entry of the cache is what a forward hook, or the eager kernel, sees at its place."""

import copy
import re

import pytest
import torch
import watching
from tiny_models import KERNELS, blip_of, lens_of, tiny_blip, tiny_model

import clva_lens as cl

LAYERS = range(12)
DECODER = {"llava": "model.language_model", "blip": "language_model.model"}
TOWER = {"llava": "model.vision_tower.encoder.layers", "blip": "vision_model.encoder.layers"}


def flat(entry):
    """[batch, pos, head, d_head] as modules have it: [batch, pos, width]."""
    return entry.flatten(2) if entry.ndim == 4 else entry


def compare(cache, seen):
    assert set(seen) <= set(cache.keys())
    for name, value in seen.items():
        torch.testing.assert_close(flat(cache[name]), value, atol=1e-6, rtol=0, msg=name)


def test_llava_in_a_padded_batch(lens, ask):
    """All four variants: full and grouped heads, both kernels."""
    prompt = ask(lens, 3)
    assert (prompt["attention_mask"] == 0).any()
    logits, cache = lens.run_with_cache(prompt)
    places = watching.llama(DECODER["llava"], LAYERS)
    places |= watching.vision(TOWER["llava"], range(2), joint=False)
    compare(cache, watching.watch(lens.hf_model, prompt.inputs, places))
    with torch.no_grad():
        torch.testing.assert_close(logits, lens.hf_model(**prompt.inputs).logits, atol=0, rtol=0)


def test_instructblip_in_a_padded_batch(blip, ask):
    """The vision tower, the Q-Former with its two attentions, and the decoder."""
    prompt = ask(blip, 3)
    assert (prompt["attention_mask"] == 0).any()
    assert (prompt["qformer_attention_mask"] == 0).any()
    _, cache = blip.run_with_cache(prompt)
    places = watching.llama(DECODER["blip"], LAYERS)
    places |= watching.vision(TOWER["blip"], range(2), joint=True) | watching.qformer(LAYERS)
    compare(cache, watching.watch(blip.hf_model, prompt.inputs, places))
    path = "vision_model.encoder.layers.1.self_attn.qkv"
    joint = watching.watch(blip.hf_model, prompt.inputs, {"joint": (path, "out")})["joint"]
    own = [cache[f"vision.blocks.1.attn.hook_{one}"].flatten(2) for one in "qkv"]
    assert torch.equal(torch.cat(own, dim=2), joint)


def test_shapes_are_transformer_lens_own(one_blip, ask):
    lens = lens_of("grouped", "sdpa")
    prompt = ask(lens, 2)
    length = prompt["input_ids"].shape[1]
    _, cache = lens.run_with_cache(prompt, lambda name: "blocks.3." in name or "ln_final" in name)
    shapes = {name.split(".", 2)[-1]: tuple(value.shape) for name, value in cache.items()}
    assert shapes["attn.hook_q"] == shapes["attn.hook_rot_q"] == (2, length, 4, 8)
    for name in ("k", "v", "rot_k"):
        assert shapes[f"attn.hook_{name}"] == (2, length, 2, 8), name
    assert shapes["attn.hook_z"] == (2, length, 4, 8)
    assert shapes["attn.hook_pattern"] == shapes["attn.hook_attn_scores"] == (2, 4, length, length)
    assert shapes["attn.hook_result"] == (2, length, 4, 32)
    assert shapes["hook_resid_mid"] == shapes["ln2.hook_normalized"] == (2, length, 32)
    assert shapes["ln1.hook_scale"] == cache["ln_final.hook_scale"].shape == (2, length, 1)
    prompt = ask(one_blip)
    _, cache = one_blip.run_with_cache(prompt, lambda name: "cross_attn" in name)
    assert cache["qformer.blocks.4.cross_attn.hook_pattern"].shape == (1, 4, 8, 17)
    assert cache["qformer.blocks.4.cross_attn.hook_k"].shape == (1, 17, 4, 8)
    assert not any(re.search(r"qformer\.blocks\.\d*[13579]\.cross", name) for name in cache)


def doubled(inputs):
    return {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}


def test_llava_patterns_are_the_eager_kernels(lens, ask, variant):
    """The reference runs in float64, where eager may not pad: one prompt at a time."""
    exact = copy.deepcopy(tiny_model(variant[0], "eager")).double()
    for first in range(2):
        prompt = ask(lens, None, first)
        _, cache = lens.run_with_cache(prompt, lambda name: name.endswith("hook_pattern"))
        places = {
            f"blocks.{i}.attn.hook_pattern": (
                f"model.language_model.layers.{i}.self_attn",
                "weights",
            )
            for i in LAYERS
        } | {
            f"vision.blocks.{i}.attn.hook_pattern": (
                f"model.vision_tower.encoder.layers.{i}.self_attn",
                "weights",
            )
            for i in range(2)
        }
        seen = watching.watch(exact, doubled(prompt.inputs), places)
        assert set(seen) == set(cache.keys())
        for name, value in seen.items():
            assert (cache[name] - value).abs().max() < 2e-5, name


def blip_weights(layers):
    places = {
        f"blocks.{i}.attn.hook_pattern": (f"language_model.model.layers.{i}.self_attn", "weights")
        for i in layers
    }
    for i in layers:
        own, block = f"qformer.encoder.layer.{i}", f"qformer.blocks.{i}"
        places[f"{block}.attn.hook_pattern"] = (f"{own}.attention.attention", "weights")
        if i % 2 == 0:
            places[f"{block}.cross_attn.hook_pattern"] = (
                f"{own}.crossattention.attention",
                "weights",
            )
    for i in range(2):
        path = f"vision_model.encoder.layers.{i}.self_attn"
        places[f"vision.blocks.{i}.attn.hook_pattern"] = (path, "weights")
    return places


@pytest.mark.parametrize("kernel", KERNELS)
def test_instructblip_patterns_are_the_eager_kernels(kernel, ask):
    """In a padded batch: each row that is no padding."""
    lens, eager = blip_of(kernel), tiny_blip(kernel="eager")
    prompt = ask(lens, 3)
    _, cache = lens.run_with_cache(prompt, lambda name: name.endswith("hook_pattern"))
    seen = watching.watch(eager, prompt.inputs, blip_weights(LAYERS))
    assert set(seen) == set(cache.keys())
    keep = prompt["attention_mask"].bool()
    for name, value in seen.items():
        error = cache[name] - value
        if name.startswith("blocks"):
            error = error.transpose(1, 2)[keep]
        assert error.abs().max() < 2e-5, name


@pytest.mark.parametrize("language", ["opt", "blip2-opt"])
def test_opt_decoders(language, ask):
    """OPT flattens batch and position before its MLP; its queries are scaled before the kernel."""
    lens, eager = blip_of("sdpa", language), tiny_blip(language, "eager")
    prompt = ask(lens, 2)
    _, cache = lens.run_with_cache(
        prompt, lambda name: name.startswith("blocks.5") or "embed" in name
    )
    own = "language_model.model.decoder.layers.5"
    places = {
        "blocks.5.hook_resid_pre": (own, "in"),
        "blocks.5.attn.hook_q": (f"{own}.self_attn.q_proj", "out"),
        "blocks.5.attn.hook_z": (f"{own}.self_attn.out_proj", "in"),
        "blocks.5.hook_attn_out": (f"{own}.self_attn", "out"),
        "blocks.5.hook_resid_post": (own, "out"),
        "blocks.5.attn.hook_pattern": (f"{own}.self_attn", "weights"),
    }
    seen = watching.watch(eager, prompt.inputs, places)
    keep = prompt["attention_mask"].bool()
    for name, value in seen.items():
        error = cache[name] - value if "pattern" in name else flat(cache[name]) - value
        error = error.transpose(1, 2) if "pattern" in name else error
        assert error[keep].abs().max() < 3e-5, name  # 2.1e-5 on one processor
    mlp = cache["blocks.5.hook_resid_mid"] + cache["blocks.5.hook_mlp_out"]
    torch.testing.assert_close(mlp, cache["blocks.5.hook_resid_post"], atol=1e-6, rtol=0)
    both = cache["hook_embed"] + cache["hook_pos_embed"]
    _, first = lens.run_with_cache(prompt, "blocks.0.hook_resid_pre")
    torch.testing.assert_close(both, first["blocks.0.hook_resid_pre"], atol=0, rtol=0)


def test_the_pattern_weighs_the_values(lens, ask):
    """z is the pattern times the values, and the scores' softmax is the pattern."""
    prompt = ask(lens, 2)
    names = [f"blocks.4.attn.hook_{one}" for one in ("pattern", "attn_scores", "v", "z")]
    _, cache = lens.run_with_cache(prompt, names)
    assert set(cache.keys()) == set(names)
    pattern, scores, value, z = (cache[name] for name in names)
    torch.testing.assert_close(scores.softmax(dim=-1), pattern, atol=1e-6, rtol=0)
    value = value.repeat_interleave(4 // value.shape[2], dim=2)
    keep = prompt["attention_mask"].bool()
    error = (torch.einsum("bhqk,bkhd->bqhd", pattern, value) - z)[keep]
    assert error.abs().max() < 2e-5


def test_a_tower_read_before_its_last_layer(ask):
    """LLaVA-1.5 takes the features of the layer before the last one."""
    model = tiny_model()
    model.config.vision_feature_layer = -2
    lens = cl.load((model, lens_of("full", "sdpa").processor))
    names = ["vision.blocks.1.hook_resid_pre", "vision.blocks.1.hook_resid_post", "hook_embed"]
    prompt = ask(lens)
    _, cache = lens.run_with_cache(prompt, names)
    seen = model.model.multi_modal_projector(cache[names[0]][:, 1:])
    torch.testing.assert_close(cache["hook_embed"][prompt.spans.image], seen[0])


def test_half_precision_keeps_statistics_in_float32(ask):
    model = tiny_model("grouped").bfloat16()
    lens = cl.load((model, lens_of("full", "sdpa").processor))
    wanted = ("hook_pattern", "hook_scale", "hook_q", "hook_resid_post")
    _, cache = lens.run_with_cache(ask(lens), lambda name: name.endswith(wanted))
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in cache.items()}
    assert kinds["hook_pattern"] == kinds["hook_scale"] == torch.float32
    assert kinds["hook_q"] == kinds["hook_resid_post"] == torch.bfloat16
    for name, value in cache.items():
        if name.endswith("pattern"):
            torch.testing.assert_close(value.sum(-1), torch.ones_like(value[..., 0]))
