"""The cache against TransformerLens itself: its bridge around a copy of the same tiny LLaVA.

The bridge is built around the module, so that nothing is downloaded: booting a LLaVA by name would
have it run pip by itself.
"""

import copy
import subprocess
import warnings

import pytest
import torch
from tiny_models import HEADS, lens_of

ERROR = 1e-4


@pytest.fixture(scope="module", params=HEADS)
def pair(request):
    """A tiny LLaVA as our lens, and a bridge around its copy."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    lens = lens_of(request.param, "eager")
    model = copy.deepcopy(lens.hf_model)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(subprocess, "Popen", None)
        bridge = build_bridge_from_module(
            model, "LlavaForConditionalGeneration", hf_config=model.config
        ).eval()
    bridge.cfg.use_attn_result = True
    return lens, bridge


def both(pair, prompt, names_filter=lambda name: True):
    lens, bridge = pair
    inputs = dict(prompt.inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = bridge.run_with_cache(inputs.pop("input_ids"), **inputs)
    return lens.run_with_cache(prompt, names_filter), theirs


def test_every_entry_of_the_decoder(pair, ask):
    """All names that both have; and all of ours are theirs."""
    prompt = ask(pair[0])
    (logits, cache), (wanted, oracle) = both(pair, prompt)
    assert (logits - wanted).abs().max() < ERROR
    compared = 0
    for name, value in cache.items():
        if name.startswith("vision") or name == "hook_embed":
            continue
        theirs = oracle[name]
        assert value.shape == theirs.shape, name
        if name.endswith("attn_scores"):  # what is masked has any very low score
            allowed = cache[name.replace("attn_scores", "pattern")] > 0
            value, theirs = value[allowed], theirs[allowed]
        assert (value - theirs).abs().max() < ERROR, name
        compared += 1
    assert compared == 12 * 21 + 2


def test_a_padded_batch(pair, ask):
    """The bridge counts positions from the first token that is no padding, so rotations differ."""
    prompt = ask(pair[0], 3)
    (_, cache), (_, oracle) = both(pair, prompt)
    keep = prompt["attention_mask"].bool()
    for name, value in cache.items():
        if name.startswith("vision") or name == "hook_embed" or "rot" in name or "scores" in name:
            continue
        error = value - oracle[name]
        error = error.transpose(1, 2) if name.endswith("pattern") else error
        assert error[keep].abs().max() < ERROR, name


def test_embeddings_differ_at_the_picture_only(pair, ask):
    """Theirs are the words', so that theirs do not sum to the stream; ours have the picture."""
    prompt = ask(pair[0])
    (_, cache), (_, oracle) = both(pair, prompt)
    image = prompt.spans.image
    assert torch.equal(cache["hook_embed"][~image], oracle["hook_embed"][~image])
    assert (cache["hook_embed"] - oracle["hook_embed"])[image].abs().max() > 1
    assert torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])


def test_the_vision_tower(pair, ask):
    """Under their own prefix. Their scores are weights there, and their heads are not split."""
    prompt = ask(pair[0])
    (_, cache), (_, oracle) = both(pair, prompt)
    compared = 0
    for name, value in cache.items():
        other = name.replace("vision.blocks", "vision_encoder.encoder_layers")
        if not name.startswith("vision") or other not in oracle.cache_dict:
            continue
        if name.endswith(("attn_scores", "hook_result")):
            continue
        theirs = oracle[other]
        assert (value.reshape(theirs.shape) - theirs).abs().max() < ERROR, name
        compared += 1
    assert compared >= 2 * 11


def test_analyses_agree(pair, ask):
    prompt = ask(pair[0])
    (_, cache), (_, oracle) = both(pair, prompt, None)
    for stack in ("accumulated_resid", "stack_head_results"):
        ours, theirs = getattr(cache, stack)(), getattr(oracle, stack)()
        assert (ours - theirs).abs().max() < ERROR, stack
    ours, labels = cache.accumulated_resid(apply_ln=True, incl_mid=True, return_labels=True)
    theirs, others = oracle.accumulated_resid(apply_ln=True, incl_mid=True, return_labels=True)
    assert labels == others
    assert (ours - theirs).abs().max() < ERROR
    ours = cache.logit_lens(targets=7).readout.values
    theirs = oracle.logit_lens(targets=7).readout.values
    assert (ours - theirs).abs().max() < ERROR
