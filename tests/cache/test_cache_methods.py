"""The cache's own analyses: their parts sum to the model's own stream and logits."""

import pytest
import torch
from tiny_models import blip_of, lens_of

from clva_lens.ground.errors import ParameterError
from clva_lens.lens.load import LensModel

MODELS = {
    "llava": lambda: lens_of("full", "sdpa"),
    "grouped": lambda: lens_of("grouped", "eager"),
    "instructblip": lambda: blip_of("sdpa"),
    "opt": lambda: blip_of("sdpa", "blip2-opt"),
}
ERROR = 1e-4


@pytest.fixture(scope="module", params=MODELS)
def lens(request) -> LensModel:
    return MODELS[request.param]()


@pytest.fixture
def run(lens, ask):
    """A batch of two, so that the batch axis counts."""
    return lens.run_with_cache(ask(lens, 2))


def near(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < ERROR


def test_accumulated_resid_is_the_streams_in_order(run):
    _, cache = run
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"]
    wanted = [cache[f"resid_{part}", i] for i in range(12) for part in ("pre", "mid")]
    assert torch.equal(stack, torch.stack([*wanted, cache["resid_post", 11]]))


def test_the_last_accumulated_stream_reads_as_the_logits(run):
    logits, cache = run
    normed = cache.accumulated_resid(apply_ln=True)[-1]
    near(normed @ cache.model.W_U + cache.model.b_U, logits)
    near(cache.logit_lens(positions=None).readout.values[-1], logits)


@pytest.mark.parametrize("layer", [1, 5, 12])
def test_decompose_resid_sums_to_the_stream(run, layer):
    _, cache = run
    near(cache.decompose_resid(layer).sum(dim=0), cache["resid_post", layer - 1])


def test_heads_and_mlps_sum_to_the_stream(run):
    """The head's results leave out the output bias, which OPT has."""
    _, cache = run
    parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert labels[-1] == "bias"
    near(parts.sum(dim=0), cache["resid_post", 11])
    neurons = cache.get_full_resid_decomposition(expand_neurons=True)
    near(neurons.sum(dim=0), cache["resid_post", 11])
    heads, names = cache.stack_head_results(return_labels=True)
    assert names[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    bias = sum(block.attn.b_O for block in cache.model.blocks)
    near(heads.sum(dim=0) + bias, cache.decompose_resid(mode="attn", incl_embeds=False).sum(dim=0))


def test_head_results_are_the_hooks_own(lens, ask):
    prompt = ask(lens, 2)
    _, asked = lens.run_with_cache(prompt, lambda name: name.startswith("blocks."))
    _, cache = lens.run_with_cache(prompt)
    assert "blocks.3.attn.hook_result" not in set(cache)
    cache.compute_head_results()
    near(cache["result", 3], asked["result", 3])
    near(asked["result", 3].sum(dim=2) + cache.model.blocks[3].attn.b_O, asked["attn_out", 3])


def test_logit_attrs_sum_to_the_logit_difference(run):
    """Differences: the constant of the norm's bias is left out of attributions; Llama has none."""
    logits, cache = run
    parts = cache.decompose_resid()
    found = cache.logit_attrs(parts, tokens=7, incorrect_tokens=9).sum(dim=0)
    wanted = logits[..., 7] - logits[..., 9]
    bias = getattr(cache.model.ln_final, "bias", None)
    if bias is not None:
        wanted = wanted - bias @ (cache.model.W_U[:, 7] - cache.model.W_U[:, 9])
    near(found, wanted)
    assert not found.requires_grad
    answers = torch.tensor([7, 12])
    each = cache.logit_attrs(parts, answers, torch.tensor([9, 9]))
    near(each.sum(dim=0)[0], found[0])


def test_tokens_by_their_text(run, lens):
    _, cache = run
    word = lens.words.convert_ids_to_tokens(9)
    by_id = cache.model.tokens_to_residual_directions(9)
    assert torch.equal(cache.model.tokens_to_residual_directions(word), by_id)
    assert torch.equal(cache.model.tokens_to_residual_directions(torch.tensor([9])), by_id)
    named = cache.logit_lens(targets=word).readout.values
    assert torch.equal(named, cache.logit_lens(targets=9).readout.values)
    with pytest.raises(ParameterError, match="is 2 tokens"):
        cache.logit_attrs(cache.decompose_resid(), f"{word} {word}")


def test_slices_and_the_batch_axis(lens, ask):
    _, cache = lens.run_with_cache(ask(lens))
    whole = cache.decompose_resid()
    last = cache.decompose_resid(pos_slice=-1)
    assert torch.equal(last, whole[:, :, -1])
    single = cache.remove_batch_dim()
    assert single["resid_post", -1].shape == whole.shape[2:]
    assert torch.equal(single.decompose_resid(), whole[:, 0])


def test_no_weight_is_copied(run, lens):
    _, cache = run
    own = {parameter.data_ptr() for parameter in lens.hf_model.parameters()}
    block = cache.model.blocks[2]
    for weight in (cache.model.W_U, block.attn.W_O, block.mlp.W_out):
        assert weight.data_ptr() in own
