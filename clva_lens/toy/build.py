"""The toy LLaVA before training: configuration, word-level tokenizer, image processor."""

from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from clva_lens.toy.questions import vocabulary
from clva_lens.toy.scenes import IMAGE_SIZE, PATCH_SIZE

SYSTEM = "a chat between a curious user and an assistant."
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WIDTH = 128
CUES = ["USER:", "ASSISTANT:"]
# The system message is the caller's, the default, or (an empty one) none at all.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '" + SYSTEM + "' %}{% endif %}"
    "<s>{% if system %} {{ system }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% else %} ASSISTANT: {{ message['content'] }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: lower case, punctuation apart, the newline a token."""
    words = [*SPECIAL, *CUES, "\n", *vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    for cue in CUES:
        fast.add_tokens(AddedToken(cue, normalized=False))
    return fast


def image_processor() -> CLIPImageProcessorPil:
    """Return the image processor of both toys, for 64 × 64 pictures."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )


def processor() -> LlavaProcessor:
    """Return a real ``LlavaProcessor`` for 64 × 64 pictures (64 image tokens)."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def decoder_config(layers: int) -> LlamaConfig:
    """Return a decoder's configuration, of 8 heads and width 128."""
    return LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def config(layers: int = 12) -> LlavaConfig:
    """Return the configuration: 12 decoder layers × 8 heads, so that L/2 − 2 = 4."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=96,
        ),
        text_config=decoder_config(layers),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def untrained(seed: int, layers: int = 12) -> LlavaForConditionalGeneration:
    """Return the model with the initial weights that training starts from."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(layers))
    text = model.model.language_model
    with torch.no_grad():
        text.embed_tokens.weight.normal_(0, 0.3)
        model.lm_head.weight.normal_(0, 0.06)
        for parameter in model.model.multi_modal_projector.parameters():
            if parameter.ndim == 2:
                torch.nn.init.xavier_normal_(parameter)
        start_decoder(text.layers)
    return model


@torch.no_grad()
def start_decoder(layers: Any) -> None:
    """Give a decoder's layers the initial weights that training starts from.

    They are *identity-biased*: W_k = W_q, so that equal content attracts, and W_o = W_vᵀ/2, so that
    attention copies content. It shortens training several times.
    """
    scale = 0.06 / (2 * len(layers)) ** 0.5
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.q_proj.weight.normal_(0, 0.08)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.v_proj.weight.normal_(0, 0.06)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T / 2)
        mlp.gate_proj.weight.normal_(0, 0.06)
        mlp.up_proj.weight.normal_(0, 0.06)
        mlp.down_proj.weight.normal_(0, scale)
