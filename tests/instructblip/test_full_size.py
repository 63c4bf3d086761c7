"""The published models' sizes, without their weights: real configurations on the meta device."""

import logging

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import clva_lens as cl
from clva_lens.ground.errors import ParameterError, PromptError
from clva_lens.methods.target import Target
from clva_lens.models.family import find_family, find_site

VICUNA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LATER = tuple(range(15, 32))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def instructblip():
    """Salesforce/instructblip-vicuna-7b: the library's defaults are its vision tower's."""
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(),
        qformer_config=InstructBlipQFormerConfig(),
        text_config=LlamaConfig(vocab_size=32001, **VICUNA),
        num_query_tokens=32,
        image_token_index=32000,
    )
    with torch.device("meta"):
        return InstructBlipForConditionalGeneration(config)


@pytest.fixture(scope="module")
def llava():
    """llava-hf/llava-1.5-7b-hf."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=32064, **VICUNA),
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def layers(model, method):
    """Return (site, anchor layers, edited layers) of a CLVA on a model."""
    (session,) = method.sessions(Target(model))
    return session.site, (method.negative_layer, session.positive_layer), session.steady


def test_sizes(instructblip, llava):
    for model, billions in ((instructblip, 7.9), (llava, 7.06)):
        count = sum(p.numel() for p in model.parameters())
        assert all(p.is_meta for p in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.05)


def test_instructblip_sites(instructblip):
    reading, answering = find_family(instructblip).sites(instructblip)
    assert (reading.name, reading.layers, reading.depth) == ("qformer", (0, 2, 4, 6, 8, 10), 12)
    assert (answering.name, answering.layers) == ("decoder", tuple(range(32)))
    stack = instructblip.qformer.encoder.layer
    for index, module in zip(reading.layers, reading.modules, strict=True):
        assert module is stack[index].crossattention.attention
    for index, module in enumerate(answering.modules):
        assert module is instructblip.language_model.model.layers[index].self_attn
    target = Target(instructblip)
    assert (target.at().site, target.at().heads, target.at().ordered) == ("qformer", 12, False)
    assert (target.at("decoder").heads, target.at("decoder").depth) == (32, 32)
    assert reading.config is stack[0].crossattention.attention.config
    assert answering.config is instructblip.language_model.model.layers[0].self_attn.config


def test_instructblip_tokens(instructblip):
    """257 keys = CLS + 16 × 16 patches at the Q-Former; 32 image tokens in the decoder's prompt."""
    family = find_family(instructblip)
    assert family.visual_count(instructblip, "qformer") == 256
    assert family.visual_count(instructblip, "decoder") == 32
    assert family.grid(instructblip, "qformer") == (16, 16)
    with pytest.raises(PromptError, match=r"decoder's 32 image tokens.*no grid"):
        family.grid(instructblip, "decoder")
    tower = instructblip.vision_model.embeddings
    assert tower.position_embedding.shape[1] == 257
    ids = torch.tensor([[0, *[32000] * 32, 1, 450, 263], [*[32000] * 32, 1, 450, 263, 29973]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    reading = family.spans(instructblip, "qformer", inputs)
    assert reading.image.shape == (2, 257)
    assert reading.system.nonzero().tolist() == [[0, 0], [1, 0]]
    assert reading.visual_count == 256
    answering = family.spans(instructblip, "decoder", inputs)
    assert answering.visual_count == 32
    assert answering.text.sum(dim=1).tolist() == [3, 4]
    assert answering.visual_index()[:, 0].tolist() == [1, 0]
    assert family.image_token_id(instructblip) == 32000


def test_instructblip_layers(instructblip):
    """Eq. 14: anchors at 0 and 4, edits at 6, 8 and 10; in the decoder 0 and 14, edits from 15."""
    assert layers(instructblip, cl.CLVA()) == ("qformer", (0, 4), (6, 8, 10))
    assert layers(instructblip, cl.CLVA(site="decoder")) == ("decoder", (0, 14), LATER)
    (blind,) = cl.KnockOut().sessions(Target(instructblip))
    assert (blind.site, blind.layers) == ("qformer", (6, 8, 10))
    with pytest.raises(ParameterError, match=r"layer 14.*qformer has layers 0, 2, 4, 6, 8, 10"):
        layers(instructblip, cl.CLVA(positive_layer=14))
    with pytest.raises(ParameterError, match=r"layer 32.*decoder has layers 0 to 31"):
        layers(instructblip, cl.CLVA(site="decoder", positive_layer=32))


def test_llava(llava):
    """576 image tokens in 24 × 24, one site of 32 layers, anchors at 0 and 14, edits from 15."""
    family = find_family(llava)
    (site,) = family.sites(llava)
    assert (site.name, site.layers, site.depth) == ("decoder", tuple(range(32)), 32)
    for index, module in enumerate(site.modules):
        assert module is llava.model.language_model.layers[index].self_attn
    assert family.visual_count(llava, "decoder") == 576
    assert family.grid(llava, "decoder") == (24, 24)
    ids = torch.tensor([[1, 3148, *[32000] * 576, 13, 29973]])
    spans = family.spans(llava, "decoder", {"input_ids": ids})
    assert spans.visual_count == 576
    assert (int(spans.system.sum()), int(spans.text.sum())) == (2, 2)
    assert layers(llava, cl.CLVA()) == ("decoder", (0, 14), LATER)
    assert layers(llava, cl.CLVA(site="decoder")) == ("decoder", (0, 14), LATER)
    with pytest.raises(ParameterError, match=r"no attention site 'qformer'; it has 'decoder'"):
        find_site(llava, "qformer")
