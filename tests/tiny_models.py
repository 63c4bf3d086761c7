"""Tiny random models whose attention is worth reading: peaked, and different from head to head.

Hugging Face's initial weights (std 0.02) give almost uniform attention, on which every law holds
vacuously. ``sharpen`` scales the decoder so that a few image tokens stand out and edits move the
logits. What is cached here is shared by the whole session: tests must leave it as it is.
"""

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPImageProcessorPil,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

import clva_lens as cl
from clva_lens.lens.load import LensModel
from clva_lens.models.family import FAMILIES
from clva_lens.toy.build import CHAT_TEMPLATE

torch.set_num_threads(1)

HEADS = {"full": 4, "grouped": 2}
KERNELS = ("sdpa", "eager")
SITES = ("qformer", "decoder")
LANGUAGES = ("llama", "opt", "t5", "blip2-opt", "blip2-t5")
QUESTIONS = ["is there a cup ?", "what is it ?", "is there a red cup to the left of it ?"]
TEXT = (
    "<pad> <s> </s> <unk> <mask> <image> user: assistant: yes no is there a the cup plate what it "
    "? . , red green blue to left right of image in on and two one are color many how chat between "
    "curious user assistant an kettle car sign tree bench kite lamp laptop book person ball see "
    "can you with near"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = [*TEXT.split(), "\n"]
    words += [f"word{i}" for i in range(64 - len(words))]
    assert len(words) == 64, len(words)
    assert words[5] == "<image>"
    table = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(r"[?.,]"), "isolated"),
        ]
    )
    # As Llama's own: every text that is tokenized gets a BOS, unless one asks for none.
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_processor(chat_template: str | None = CHAT_TEMPLATE) -> LlavaProcessor:
    """Return a real LLaVA processor for 32 × 32 pictures in patches of 8: 16 image tokens."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


@torch.no_grad()
def sharpen(model: LlavaForConditionalGeneration) -> None:
    """Scale random weights so that patterns are peaked and the image matters to the logits."""
    inner = model.model
    for parameter in inner.multi_modal_projector.parameters():
        parameter.mul_(10)
    for parameter in inner.vision_tower.parameters():
        if parameter.ndim > 1:
            parameter.mul_(5)
    inner.language_model.embed_tokens.weight.mul_(20)
    for layer in inner.language_model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(14)
        attention.k_proj.weight.mul_(14)
        attention.v_proj.weight.mul_(10)
        attention.o_proj.weight.mul_(6)
    model.lm_head.weight.mul_(10)
    # The image token is never the likeliest: transformers cannot reread an answer that has one.
    model.lm_head.weight[model.config.image_token_index] = 0


def tiny_model(
    heads: str = "full", kernel: str = "sdpa", seed: int = 0, **text: object
) -> LlavaForConditionalGeneration:
    """Return a fresh sharpened model; the same seed gives the same weights for both kernels."""
    torch.manual_seed(seed)
    model = FAMILIES.get("llava").tiny(num_key_value_heads=HEADS[heads], **text)
    sharpen(model)
    model.set_attn_implementation(kernel)
    # Answers of a fixed length, so that every step can be compared.
    model.generation_config.eos_token_id = None
    return model.eval()


def picture(seed: int) -> np.ndarray:
    """Return a 32 × 32 picture of coloured patches."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


@torch.no_grad()
def feed(model: torch.nn.Module, by: float) -> None:
    """Scale the decoder's FFNs: as initialised they write next to nothing to the stream."""
    for layer in model.get_decoder().layers:
        for parameter in layer.mlp.parameters():
            parameter.mul_(by)


SHARED: list[tuple[torch.nn.Module, float]] = []
"""The models that several tests use, each with what its weights come to."""


def shared(model: Any) -> Any:
    """Hold a model to its weights: conftest.py looks at them after each file."""
    SHARED.append((model, size_of(model)))
    return model


def size_of(model: torch.nn.Module) -> float:
    """One number that tells of a change of any parameter or buffer."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(float(one.detach().double().abs().sum()) for one in tensors)


@cache
def lens_of(heads: str, kernel: str, fed: float = 1) -> LensModel:
    model = tiny_model(heads, kernel)
    feed(model, fed)
    return cl.load((shared(model), make_processor()))


@cache
def double_of(heads: str, fed: float = 1) -> LlavaForConditionalGeneration:
    model = copy.deepcopy(tiny_model(heads))
    feed(model, fed)
    return shared(model.double())


# ── InstructBLIP and BLIP-2 ──

OPT = OPTConfig(
    vocab_size=64,
    hidden_size=32,
    word_embed_proj_dim=32,
    ffn_dim=64,
    num_hidden_layers=12,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
T5 = T5Config(
    vocab_size=64,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=12,
    num_heads=4,
    eos_token_id=2,
    pad_token_id=0,
    decoder_start_token_id=0,
)


def blip_processor(language: str = "llama") -> InstructBlipProcessor | Blip2Processor:
    """Return a real processor for 8 image tokens and 32 × 32 pictures in patches of 8."""
    images, words = make_processor().image_processor, tokenizer()._tokenizer
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    reader = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    if language.startswith("blip2"):
        return Blip2Processor(images, reader, num_query_tokens=8)
    other = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    return InstructBlipProcessor(images, reader, other, num_query_tokens=8)


def _raw_blip(language: str, **text: object) -> Blip2ForConditionalGeneration:
    """Return the family's tiny model around one of the language models, as it is initialised."""
    family = FAMILIES.get("instructblip")
    if language == "llama":
        return family.tiny(num_key_value_heads=2, **text)
    config = OPT if language.endswith("opt") else T5
    model = family.tiny_with(copy.deepcopy(config))
    if not language.startswith("blip2"):
        return model
    parts = model.config.to_dict()
    both = Blip2Config(
        vision_config=parts["vision_config"],
        qformer_config=parts["qformer_config"],
        text_config=parts["text_config"],
        num_query_tokens=8,
        image_token_index=5,
    )
    other = Blip2ForConditionalGeneration(both).eval()
    with torch.no_grad():
        other.query_tokens.normal_(0, 1)
    return other


@torch.no_grad()
def sharpen_blip(model: InstructBlipForConditionalGeneration) -> None:
    """Scale random weights so that both sites' patterns are peaked and move the logits."""
    for parameter in model.vision_model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(5)
    for layer in model.qformer.encoder.layer:
        blocks = [(layer.attention, 4, 4)]
        if layer.has_cross_attention:
            blocks.append((layer.crossattention, 25, 8))
        for block, look, carry in blocks:
            block.attention.query.weight.mul_(look)
            block.attention.key.weight.mul_(look)
            block.attention.value.weight.mul_(carry)
            block.output.dense.weight.mul_(carry)
    words = getattr(model.qformer, "embeddings", None)  # BLIP-2's reads no text
    if words is not None:
        words.word_embeddings.weight.mul_(20)
    model.language_projection.weight.mul_(20)
    language = model.language_model
    kind = language.config.model_type
    if kind != "llama":
        for name, parameter in language.named_parameters():
            if parameter.ndim > 1 and "relative" not in name and "positions" not in name:
                parameter.mul_({"opt": 8, "t5": 1.5}[kind])
        return
    language.model.embed_tokens.weight.mul_(20)
    for layer in language.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(10)
        attention.k_proj.weight.mul_(10)
        attention.v_proj.weight.mul_(10)
        attention.o_proj.weight.mul_(6)
    language.lm_head.weight.mul_(10)
    language.lm_head.weight[model.config.image_token_index] = 0


def tiny_blip(
    language: str = "llama", kernel: str = "sdpa", seed: int = 0, **text: object
) -> InstructBlipForConditionalGeneration:
    """Return a fresh sharpened model; the same seed gives the same weights for both kernels."""
    with torch.inference_mode(False):  # whoever asks first
        torch.manual_seed(seed)
        model = _raw_blip(language, **text)
    sharpen_blip(model)
    model.set_attn_implementation(kernel)
    for one in (model, model.language_model):
        one.generation_config.eos_token_id = None
    return model.eval()


@cache
def blip_of(kernel: str, language: str = "llama", fed: float = 1) -> LensModel:
    model = tiny_blip(language, kernel)
    if fed != 1:
        feed(model.language_model, fed)
    return cl.load((shared(model), blip_processor(language)))


@cache
def exact_blip(fed: float = 1) -> InstructBlipForConditionalGeneration:
    """The float64 copy, eager."""
    model = copy.deepcopy(tiny_blip(kernel="eager"))
    feed(model.language_model, fed)
    return shared(model.double())
