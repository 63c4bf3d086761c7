"""Eq. 12: what attention puts out is a visual and a linguistic part, in every family.

The references are float64: the hand-written decoder for LLaVA; elsewhere the eager model's own
attentions, and what its value projection puts out.
"""

import copy
import sys
from pathlib import Path

import pytest
import reference
import torch
from tiny_models import blip_of, exact_blip, lens_of

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError

sys.path.append(str(Path(__file__).parents[1] / "models"))

import tiny_families as tiny
from survey_table import PROVEN

# Families that differ in what is read: gates, windows, biases, several rotary axes, caps.
EAGER = ("llava", "qwen2_5_vl", "gemma3", "idefics3", "internvl", "smolvlm")
METHODS = {
    "none": (None, []),
    "clva": (cl.CLVA(tau=1.0), [reference.Clva(tau=1.0)]),
    "knock-out": (cl.KnockOut(), [reference.KnockOut()]),
}


def divided(row, value, keys):
    """A row [head, key] times values [kv_head, key, width], over some keys."""
    groups = len(row) // len(value)
    return torch.stack([row[head, keys] @ value[head // groups][keys] for head in range(len(row))])


def compare_parts(found, wanted, atol):
    for name, one in wanted.items():
        mine = getattr(found, name).double()
        torch.testing.assert_close(mine, one, rtol=0, atol=atol, msg=f"{name} differs")


@torch.no_grad()
@pytest.mark.parametrize("kind", METHODS)
def test_llava_is_the_hand_written_decoder(lens, exact, ask, kind):
    method, edits = METHODS[kind]
    prompt = ask(lens, 3)
    whole = cl.modality_parts(lens, prompt, method)
    assert (whole.visual + whole.linguistic - whole.output).abs().max() < 1e-5
    decoder, config = exact.model.language_model, exact.config.text_config
    for item in range(3):
        ids, pixels, _ = reference.rows_of(prompt.inputs, item)
        result = reference.run(exact, ids, pixels, edits)
        system = [i for i in range(len(ids)) if i not in (*result.image, *result.text)]
        found = {"visual": [], "system": [], "text": []}
        for index, layer in enumerate(decoder.layers):
            seen = reference._rms_norm(
                result.streams[index], layer.input_layernorm.weight, config.rms_norm_eps
            )
            value = seen @ layer.self_attn.v_proj.weight.T
            value = value.reshape(len(ids), config.num_key_value_heads, -1).transpose(0, 1)
            row = result.patterns[index][:, -1]
            spans = (result.image, system, result.text)
            for name, keys in zip(found, spans, strict=True):
                found[name].append(divided(row, value, keys))
        stacked = {name: torch.stack(one) for name, one in found.items()}
        mine = {name: getattr(whole, name)[item] for name in stacked}
        for name, one in stacked.items():
            torch.testing.assert_close(mine[name].double(), one, rtol=0, atol=2e-4, msg=name)
            assert float(one.abs().max()) > 0.1 or kind == "knock-out"
        late = stacked["visual"][-1].abs().max()
        assert (float(late) == 0) == (kind == "knock-out")


@torch.no_grad()
@pytest.mark.parametrize("kind", [one for one in EAGER if one in PROVEN])
def test_families_are_their_eager_attentions_and_values(kind):
    model = copy.deepcopy(tiny.tiny_model(kind))
    model.set_attn_implementation("eager")
    model, inputs = model.double(), tiny.sample(kind, 0)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    values, hooks = {}, []
    layers = getattr(model.get_decoder(), "layers", None)
    for index, layer in enumerate(layers):

        def keep(_, __, out, index=index):
            values[index] = out[0].reshape(out.shape[1], -1, layers[index].self_attn.head_dim)

        hooks.append(layer.self_attn.v_proj.register_forward_hook(keep))
    with torch.no_grad():
        patterns = model(**inputs, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    image = inputs["input_ids"][0] == tiny.IMAGE
    found = cl.modality_parts(model, inputs)
    assert found.output.dtype == torch.float64
    largest = 0.0
    for index, pattern in enumerate(patterns):
        value = values[index].transpose(0, 1)
        row = pattern[0, :, -1]
        visual, linguistic = (divided(row, value, keys) for keys in (image, ~image))
        # Rows of the pattern are formed in float32, as the kernels' own softmax is.
        for mine, one in ((found.visual, visual), (found.linguistic, linguistic)):
            assert (mine[index] - one).abs().max() < 1e-6 * float(one.abs().max().clamp_min(1))
        largest = max(largest, float(visual.abs().max()))
    assert largest > 0.1


@pytest.mark.parametrize("kind", PROVEN)
def test_parts_sum_to_the_output_in_every_family(kind):
    found = cl.modality_parts(tiny.tiny_model(kind), tiny.sample(kind, 0))
    error = (found.visual + found.linguistic - found.output).abs().max()
    assert error < 1e-5 * float(found.output.abs().max().clamp_min(1))
    assert found.visual.abs().max() > 1e-3 and found.output.abs().max() > 1e-2
    share = found.visual_share
    assert share.shape == (len(found.layers),) and bool(share.isfinite().all())


@torch.no_grad()
def test_a_qformer_looks_at_its_patches(ask):
    """Means over the queries; what is not a patch is the CLS token's. Against eager patterns."""
    model, exact = blip_of("sdpa"), exact_blip()
    prompt = ask(model)
    found = cl.modality_parts(model, prompt)
    assert found.site == "qformer" and found.layers == (0, 2, 4, 6, 8, 10)
    values, patterns, hooks = [], [], []
    for number in found.layers:
        block = exact.qformer.encoder.layer[number].crossattention.attention
        hooks.append(block.value.register_forward_hook(lambda _, __, out: values.append(out[0])))
        hooks.append(block.register_forward_hook(lambda _, __, out: patterns.append(out[1])))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in prompt.inputs.items()}
    with torch.no_grad():
        exact(**inputs, output_attentions=True)
    for hook in hooks:
        hook.remove()
    assert len(values) == len(patterns) == 6
    for index, (value, pattern) in enumerate(zip(values, patterns, strict=True)):
        heads = pattern.shape[1]
        value = value.reshape(len(value), heads, -1).transpose(0, 1)
        row = pattern[0].mean(dim=1)
        cls, patches = [0], list(range(1, value.shape[1]))
        for mine, keys in ((found.visual, patches), (found.system, cls)):
            wanted = divided(row, value, keys)
            torch.testing.assert_close(mine[index].double(), wanted, rtol=0, atol=2e-4)
    assert not found.text.any() and found.visual.abs().max() > 0.1
    decoder = cl.modality_parts(model, prompt, site="decoder", layers=[3])
    assert decoder.layers == (3,) and decoder.text.abs().max() > 1e-3


def test_clva_dampens_the_linguistic_part_in_proportion(one, ask):
    """§ 4.4: in the first edited layer, whose input is untouched, O_P of each head is scaled.

    By what is left of its mass; where the re-anchored mass grows, by less than 1.
    """
    prompt = ask(one)
    method = cl.CLVA(alpha=14, beta=0.0, tau=1.0)
    plain, edited = cl.modality_parts(one, prompt), cl.modality_parts(one, prompt, method)
    assert torch.equal(plain.visual[:5], edited.visual[:5])
    before, after = plain.linguistic[5], edited.linguistic[5]
    scale = (after * before).sum(dim=-1) / (before * before).sum(dim=-1)
    assert (after - scale[:, None] * before).abs().max() < 1e-4
    assert bool((scale < 1).all()) and float(scale.min()) < 0.9
    # Nothing in the equations makes O_P smaller where β alone takes mass from the image.
    weaker = cl.modality_parts(one, prompt, cl.CLVA(alpha=0, beta=0.9, tau=1.0)).linguistic[5]
    grown = (weaker * before).sum(dim=-1) / (before * before).sum(dim=-1)
    assert float(grown.min()) > 1 - 1e-5 and float(grown.max()) > 1.001


def test_batches_kernels_prefixes_and_refusals(one, ask):
    prompt = ask(one, 3)
    whole = cl.modality_parts(one, prompt)
    for item in range(3):
        alone = cl.modality_parts(one, ask(one, first=item))
        assert (whole.visual[item] - alone.visual).abs().max() < 1e-4
        assert (whole.text[item] - alone.text).abs().max() < 1e-4
    eager = cl.modality_parts(lens_of("full", "eager"), prompt)
    assert (whole.output - eager.output).abs().max() < 1e-4
    assert "visual share" in repr(whole) and "3 samples" in repr(whole)
    norms = whole.visual.flatten(-2).square().sum(dim=-1).sqrt()
    assert torch.allclose(whole.visual_norm, norms)
    shares = whole.visual_share + (
        (whole.linguistic * whole.output).flatten(-2).sum(dim=-1)
        / whole.output.flatten(-2).square().sum(dim=-1)
    )
    assert (shares - 1).abs().max() < 1e-5
    with pytest.raises(ParameterError, match="layer"):
        cl.modality_parts(one, prompt, layers=[99])
    with pytest.raises(InterventionError, match="inside"), one.trace(ask(one)):
        cl.modality_parts(one, prompt)
