"""The bridge has the model's weights and numbers, and the model stays as it is."""

import copy
import logging
import warnings

import pytest
import torch
from tiny_models import QUESTIONS, lens_of, make_processor, picture, tiny_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ModelLoadError
from clva_lens.models.family import FAMILIES

pytestmark = pytest.mark.usefixtures("no_process")
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("batch", [None, 3])
def test_same_logits(lens, ask, batch):
    bridge, prompt = cl.to_transformer_lens(lens), ask(lens, batch)
    with torch.inference_mode():
        expected = lens.hf_model(**prompt).logits
        found = bridge(**bridge.inputs(prompt))
    real = prompt.spans.real
    error = float((found - expected)[real].abs().max())
    print(f"error {error:.1e} of {float(expected.abs().max()):.1f}")
    assert error < 5e-5
    if batch:
        assert not real.all(), "no sample is padded"


def test_same_memory(one):
    """No weight is copied: every parameter of the bridge is one of the model's, all of them are."""
    bridge = cl.to_transformer_lens(one)
    own = {p.data_ptr() for p in one.hf_model.parameters()}
    assert {p.data_ptr() for p in bridge.parameters()} == own
    assert {p.data_ptr() for p in bridge.original_model.parameters()} == own
    assert not {id(p) for p in one.hf_model.parameters()} & {id(p) for p in bridge.parameters()}


def fingerprint(model):
    modules = {name: (type(m), id(m)) for name, m in model.named_modules()}
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    configs = [
        (model.config.to_dict(), model.config._attn_implementation),
        *(c._attn_implementation for c in (model.config.text_config, model.config.vision_config)),
    ]
    tensors = [(p.data_ptr(), p.dtype, p.requires_grad) for p in model.parameters()]
    return modules, attributes, hooks, copy.deepcopy(configs), tensors, model.training


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_model_stays_as_it_is(kernel, ask):
    """Modules, attributes, hooks, configuration and logits, whatever is done to the bridge."""
    lens = cl.load((tiny_model("grouped", kernel), make_processor()))
    model, prompt = lens.hf_model, ask(lens, 2)
    with lens.trace(prompt):  # nnsight instruments modules when they are first run
        before = lens.output.logits.save()
    before, seen = before.detach(), fingerprint(model)
    tokenizer = lens.processor.tokenizer

    def words():
        kept = (tokenizer.padding_side, tokenizer.bos_token, len(tokenizer))
        return *kept, dict(tokenizer.init_kwargs)

    written = words()
    bridge = cl.to_transformer_lens(lens)
    hooks = cl.CLVA(tau=1.0).as_hooks(bridge, prompt)
    bridge.run_with_hooks(**bridge.inputs(prompt), fwd_hooks=hooks).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.enable_compatibility_mode()
    bridge.to(torch.bfloat16)

    assert fingerprint(model) == seen
    assert all(p.grad is None for p in model.parameters())
    assert words() == written
    with torch.inference_mode():
        assert torch.equal(model(**prompt).logits, before)
        with cl.intervening(model, cl.CLVA(tau=1.0)) as run:
            edited = model(**prompt).logits
    assert run.anchors.positive.any()
    assert float((edited - before).abs().max()) > 0.05
    with lens.trace(prompt):
        after = lens.output.logits.save()
    assert torch.equal(after, before)


def test_tracing_the_model_leaves_the_bridge_alone(ask):
    """The copied modules answer to no trace of the model they were copied from."""
    lens = cl.load((tiny_model(), make_processor()))
    prompt = ask(lens)
    bridge = cl.to_transformer_lens(lens)
    with torch.inference_mode():
        before = bridge(**bridge.inputs(prompt))
    with lens.trace(prompt):
        cl.intervene(cl.KnockOut())
        lens.model.language_model.layers[3].output[:] = 0
    with torch.inference_mode():
        assert torch.equal(bridge(**bridge.inputs(prompt)), before)
        with cl.intervening(lens.hf_model, cl.KnockOut()):
            assert torch.equal(bridge(**bridge.inputs(prompt)), before)


def test_what_is_attached(one, ask):
    bridge, prompt = cl.to_transformer_lens(one), ask(one, 3)
    again = bridge.prompt([picture(i) for i in range(3)], QUESTIONS)
    assert torch.equal(again["input_ids"], prompt["input_ids"])
    spans = bridge.spans(prompt)
    for name in ("system", "image", "text", "generated"):
        assert torch.equal(getattr(spans, name), getattr(prompt.spans, name))
    assert set(bridge.inputs(prompt)) == {"input", "attention_mask", "pixel_values"}
    assert bridge.inputs(prompt)["input"] is prompt["input_ids"]
    assert bridge.processor is one.processor
    assert bridge.to_tokens("is there a cup ?").tolist() == [[1, 10, 11, 12, 14, 18]]
    _, cache = bridge.run_with_cache(**bridge.inputs(prompt))
    mass = cache["blocks.4.attn.hook_pattern"][0][:, spans.text[0]][..., spans.image[0]].sum(-1)
    ours = cl.trace_attention(one, prompt).intensity[0, 4]
    torch.testing.assert_close(mass.mean(-1), ours, rtol=0, atol=1e-5)


def test_importing_changes_no_logging_and_no_warnings(one):
    logger = logging.getLogger("transformers")
    before = logger.level, list(warnings.filters)
    cl.to_transformer_lens(one)
    assert (logger.level, list(warnings.filters)) == before


@torch.no_grad()
def llava_next():
    """A LLaVA-NeXT, which TransformerLens has an adapter for and clva_lens no family."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=5,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            part.weight.mul_(14)
        layer.self_attn.v_proj.weight.mul_(20)
    model.model.language_model.embed_tokens.weight.mul_(20)
    # A picture of 32 × 64 in tiles of 16 patches: the whole, two tiles, and 4 ends of rows.
    ids = torch.tensor([[1] + [5] * 52 + [8, 9, 10, 11]])
    pixels, sizes = torch.randn(1, 3, 3, 32, 32), torch.tensor([[32, 64]])
    return model, {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}


def test_a_model_that_only_transformer_lens_knows():
    model, inputs = llava_next()
    bridge = cl.to_transformer_lens(model)
    spans = bridge.spans(inputs)
    assert (int(spans.image.sum()), int(spans.text.sum())) == (52, 4)
    assert not hasattr(bridge, "prompt")
    hooks = cl.CLVA(tau=1.0).as_hooks(bridge, inputs)
    with torch.inference_mode():
        expected, plain = model(**inputs).logits, bridge(**bridge.inputs(inputs))
        edited = bridge.run_with_hooks(**bridge.inputs(inputs), fwd_hooks=hooks)
    error, effect = (float((x - expected).abs().max()) for x in (plain, edited))
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-5
    assert effect > 1000 * error
    assert hooks.sessions[0].anchors.positive.shape == (52,)


def test_no_adapter():
    model = FAMILIES.get("instructblip").tiny()
    with pytest.raises(ModelLoadError, match=r"InstructBlip.*family 'instructblip'.*use nnsight"):
        cl.to_transformer_lens(model)


def test_no_image_tokens():
    with pytest.raises(ModelLoadError, match=r"LlamaForCausalLM.*no image_token_id"):
        cl.to_transformer_lens(LlamaForCausalLM(LlamaConfig(**TEXT)))


def test_no_model():
    with pytest.raises(ModelLoadError, match="Pass the object that"):
        cl.to_transformer_lens("toy-llava")


def qwen():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 8, "out_hidden_size": 32},
        image_token_id=5,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def test_torchvision_is_asked_for_and_not_installed(monkeypatch):
    """Some adapters refuse to work without it; clva_lens says what to do."""
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ModelLoadError, match=r"torchvision.*made for your torch"):
        cl.to_transformer_lens(qwen())


def test_attention_that_cannot_be_edited(monkeypatch):
    from transformer_lens.model_bridge.supported_architectures import Qwen2_5_VLArchitectureAdapter

    monkeypatch.setattr(Qwen2_5_VLArchitectureAdapter, "required_libraries", [])
    bridge = cl.to_transformer_lens(qwen())
    with pytest.raises(InterventionError, match=r"leaves the attention of Qwen2_5_VL.*LLaVA kind"):
        cl.CLVA().as_hooks(bridge, {"input_ids": torch.tensor([[1, 5, 5, 8]])})


def test_not_inside_a_run():
    lens = lens_of("full", "sdpa")
    with (
        cl.intervening(lens.hf_model, cl.CLVA()),
        pytest.raises(InterventionError, match="Make the bridge outside"),
    ):
        cl.to_transformer_lens(lens)
