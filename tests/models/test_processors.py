"""Folders as save_pretrained() leaves them, with real processors, through the generic family."""

import copy

import numpy as np
import pytest
import tiny_families as tiny
import torch
from test_survey import apart, write
from tiny_models import QUESTIONS, tokenizer
from transformers import (
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.methods.base import METHODS

SIDE = tiny.SIDE
TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} assistant:"
)


def gemma():
    """One square picture, 16 tokens between two others."""
    named = {"image_token": "<image>", "boi_token": "word1", "eoi_token": "word2"}
    reader = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        padding_side="left",
        extra_special_tokens=named,
    )
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return Gemma3Processor(
        images, reader, image_seq_length=16, chat_template=TEMPLATE.replace("<image>", "word1")
    )


def next_llava():
    """Tiles of 32 × 32, and tokens that end rows."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[SIDE, 2 * SIDE]],
    )
    return LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=tiny.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


PROCESSORS = {"gemma3": gemma, "llava_next": next_llava}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for kind, make in PROCESSORS.items():
        found[kind] = tmp_path_factory.mktemp("models") / kind
        model = copy.deepcopy(tiny.tiny_model(kind))
        model.save_pretrained(found[kind])
        make().save_pretrained(found[kind])
    return found


def noise(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_from_a_folder(folders, kind):
    lens = cl.load(folders[kind])
    assert lens.family.name == "generic"
    prompt = lens.prompt(noise(32, 64), QUESTIONS[0])
    method = cl.CLVA(positive_layer=1, tau=0.5)
    plain, edited = (write(lens.hf_model, prompt, *one) for one in ((), (method,)))
    assert apart(plain, edited) > 0.05
    assert apart(write(lens.hf_model, prompt, method, use_cache=False), edited) < 1e-4
    trace = cl.trace_attention(lens, prompt)
    assert trace.maps.shape[-1] == prompt.spans.visual_count
    assert torch.isfinite(trace.maps).all()


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        (
            "gemma3",
            (
                "Gemma3ForConditionalGeneration, model type 'gemma3', family 'generic'",
                "site 'decoder': 6 layers, 4 heads (2 of keys), kernel 'sdpa'",
                "grid at the decoder: 4 × 4",
                "layers 0, 1, 2, 3, 4 look 64 positions back only",
                "clva: applies",
                "vcd: refused. the family 'generic' does not say where its pictures come in",
            ),
        ),
        (
            "llava_next",
            (
                "LlavaNextForConditionalGeneration, model type 'llava_next', family 'generic'",
                "no grid at the decoder: neither the processor nor the configuration",
                "opera: applies",
            ),
        ),
    ],
)
def test_check_model(folders, kind, facts):
    found = CliRunner().invoke(app, ["check-model", str(folders[kind])])
    assert found.exit_code == 0, found.stderr
    shown = " ".join(found.stdout.split())
    for fact in (*facts, "check: rows of every layer sum to 1, and hiding the image moves"):
        assert fact in shown, shown
    assert all(f" {name}: " in shown for name in METHODS.names())
