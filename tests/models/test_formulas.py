"""Attention that is more than softmax(q·k) under a mask: capped scores, sinks, masks of its own.

The reference is written out here: the pattern in float64, its weights multiplied and renormalised.
"""

import copy
from functools import cache

import pytest
import tiny_families as tiny
import torch
from survey_table import PROVEN
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.masking_utils import eager_mask

import clva_lens as cl
from clva_lens.engine.run import running
from clva_lens.engine.session import Session
from clva_lens.lens.cache import run_with_cache
from clva_lens.models.family import find_family

CAP = 1.5
CAPPED, SINKS = "paligemma (gemma2)", "hy_v4_vl"
KINDS = [CAPPED, *({SINKS} & set(PROVEN))]


@cache
def model_of(kind):
    """An eager model: the fused kernel has neither caps nor sinks."""
    if kind == CAPPED:
        text = {**tiny.TEXT, "model_type": "gemma2", "attn_logit_softcapping": CAP}
        text["query_pre_attn_scalar"] = 8
        config = PaliGemmaConfig(
            text_config=Gemma2Config(**{k: v for k, v in text.items() if k != "model_type"}),
            vision_config=SiglipVisionConfig(**{**tiny.PICTURE, "vocab_size": 64}),
            image_token_index=tiny.IMAGE,
            projection_dim=tiny.WIDTH,
        )
        torch.manual_seed(0)
        model = PaliGemmaForConditionalGeneration(config).eval()
        tiny.enliven(model)
        model.get_decoder().set_attn_implementation("eager")
    else:
        model = copy.deepcopy(tiny.tiny_model(kind))
        with torch.no_grad():
            for name, one in model.named_parameters():
                if name.endswith("sinks"):
                    one.copy_(torch.linspace(-1, 2, len(one)))
    return model.double() if kind == CAPPED else model  # experts run in float32 only


@cache
def prompt_of(kind):
    if kind == CAPPED:
        seen = {"pixel_values": torch.randn(1, 3, tiny.SIDE, tiny.SIDE).double()}
        ids = torch.tensor([[1, *[tiny.IMAGE] * 16, *range(10, 16)]])
        kinds = (ids == tiny.IMAGE).long()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": kinds,
        } | seen
    return tiny.sample(kind, 0)


def weights_for(inputs):
    """Weights of keys for the rows after the picture: the image's far from 1."""
    ids = inputs["input_ids"][0]
    image = ids == tiny.IMAGE
    last = int(image.nonzero().max())
    made = torch.ones(len(ids), len(ids)).double()
    noise = torch.rand(len(ids), len(ids), generator=torch.Generator().manual_seed(3)).double()
    rows = torch.arange(len(ids)) > last
    return torch.where(rows[:, None] & image[None], 4 * noise + 0.1, made)


class Weighing(Session):
    """A bias of log-weights at every layer."""

    site = "decoder"

    def __init__(self, weights, layers):
        self.bias, self.layers = weights.log()[None, None], layers

    def attention(self, call):
        return self.bias.float()


def rewritten(weights, seen):
    """Eager attention written out, with weights on the pattern after its softmax."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        given = query.dtype
        query, key, value = query.double(), key.double(), value.double()
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        scores = query @ key.mT * scaling
        cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if attention_mask is not None:
            scores = scores + attention_mask
        exps = (scores - scores.amax(dim=-1, keepdim=True)).exp()
        total = exps.sum(dim=-1, keepdim=True)
        if sinks is not None:
            sink = sinks.double().reshape(1, -1, 1, 1)
            total = total + (sink - scores.amax(dim=-1, keepdim=True)).exp()
        pattern = exps / total
        seen.append(pattern)
        rest = 1 - pattern.sum(dim=-1, keepdim=True)
        moved = pattern * weights
        moved = moved / (moved.sum(dim=-1, keepdim=True) + rest)
        return (moved @ value).transpose(1, 2).contiguous().to(given), moved

    return attend


def by_reference(model, inputs, weights):
    """Logits, and the patterns before the rewriting."""
    seen, other = [], copy.deepcopy(model)
    AttentionInterface.register("written_out", rewritten(weights, seen))
    AttentionMaskInterface.register("written_out", eager_mask)
    for module in find_family(other).sites(other)[0].modules:
        module.config._attn_implementation_internal = "written_out"
    with torch.no_grad():
        return other(**inputs).logits[:, -1], seen


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_the_pattern_rewritten(kind):
    model, inputs = model_of(kind), prompt_of(kind)
    layers = find_family(model).sites(model)[0].layers
    weights = weights_for(inputs)
    with torch.no_grad():
        plain = model(**inputs).logits[:, -1]
        with running(model, [Weighing(weights, layers)]):
            edited = model(**inputs).logits[:, -1]
    same, _ = by_reference(model, inputs, torch.ones_like(weights))
    wanted, _ = by_reference(model, inputs, weights)
    effect = float((wanted - plain).abs().max())
    error = float((edited - wanted).abs().max())
    print(f"{kind}: error {error:.1e}, effect {effect:.3f}")
    assert float((same - plain).abs().max()) < 5e-6
    assert effect > 0.05 and error < effect / 1e4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_pattern(kind):
    model, inputs = model_of(kind), prompt_of(kind)
    layers = find_family(model).sites(model)[0].layers
    _, seen = by_reference(model, inputs, torch.ones_like(weights_for(inputs)))
    _, found = run_with_cache(model, inputs, lambda name: name.endswith("hook_pattern"))
    for layer, pattern in zip(layers, seen, strict=True):
        error = (found[f"blocks.{layer}.attn.hook_pattern"] - pattern).abs().max()
        assert float(error) < 2e-6
    masses = seen[0].sum(dim=-1)
    assert (float(masses.min()) < 0.9) == (kind == SINKS)
    if kind == CAPPED:
        uncapped = copy.deepcopy(model)
        for module in find_family(uncapped).sites(uncapped)[0].modules:
            module.attn_logit_softcapping = None
        _, other = by_reference(uncapped, inputs, torch.ones_like(weights_for(inputs)))
        assert float((other[0] - seen[0]).abs().max()) > 0.05


def test_a_mask_that_a_model_makes_for_its_kernel_is_made_in_a_run():
    """MiniMax M3 picks blocks of keys, if its kernel's name is one that takes a mask."""
    config = tiny.configuration("minimax_m3_vl")
    text = config.text_config
    text.layer_types = ["minimax_m3_sparse"] * tiny.LAYERS
    text.index_n_heads, text.index_head_dim = 2, 8
    text.index_block_size, text.index_topk_blocks = 2, 2
    torch.manual_seed(0)
    model = tiny.made_from(config)
    tiny.enliven(model)
    inputs, found = tiny.sample("minimax_m3_vl", 0), []
    for picked in (2, 64):  # 64 blocks are all
        for name, one in model.named_modules():
            if name.endswith("indexer"):
                one.topk_blocks = picked
        with torch.inference_mode():
            found.append(model(**inputs).logits[:, -1])
            with cl.intervening(model, cl.CLVA(alpha=0.0, beta=0.0, tau=0.5)):
                assert torch.equal(model(**inputs).logits[:, -1], found[-1])
    effect = float((found[0] - found[1]).abs().max())
    print(f"picking blocks moves the logits by {effect:.3f}")
    assert effect > 0.05
