"""The toy InstructBLIP before training: configuration, tokenizers, processor, initial weights."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    PreTrainedTokenizerFast,
)

from clva_lens.toy.build import SPECIAL, WIDTH, decoder_config, image_processor, start_decoder
from clva_lens.toy.build import tokenizer as llava_tokenizer
from clva_lens.toy.scenes import IMAGE_SIZE, PATCH_SIZE

QUERIES = 16
VISION_WIDTH, VISION_LAYERS = 96, 4
EMBED = 0.3  # scale of the language model's embeddings; the Q-Former's are normalised to 1


@cache
def tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """Return toy-llava's word-level tokenizer with ``<s>`` put first.

    It has no ``image_token``, which ``InstructBlipProcessor`` would misread; the processor makes
    ``<image>`` special by itself.
    """
    core = Tokenizer.from_str(llava_tokenizer().backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
    )


def processor() -> InstructBlipProcessor:
    """Return a real ``InstructBlipProcessor``: 16 image tokens, then ``<s>`` and the question."""
    return InstructBlipProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        qformer_tokenizer=tokenizer("right"),
        num_query_tokens=QUERIES,
    )


def config() -> InstructBlipConfig:
    """Return the configuration: a Q-Former of 12 layers × 8 heads, so that L/2 − 2 = 4."""
    words = len(tokenizer())
    return InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=288,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_act="quick_gelu",
            initializer_range=0.02,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=words,
            hidden_size=WIDTH,
            num_hidden_layers=12,
            num_attention_heads=8,
            intermediate_size=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=64,
            pad_token_id=0,
            cross_attention_frequency=2,
        ),
        text_config=decoder_config(6),
        num_query_tokens=QUERIES,
        image_token_index=SPECIAL.index("<image>"),
    )


def untrained(seed: int) -> InstructBlipForConditionalGeneration:
    """Return the model with the initial weights that training starts from.

    Attention starts identity-biased (see ``start_decoder``). Words have the same embedding, up to
    scale, in the Q-Former, at the entrance and at the exit of the language model, and the
    projection between the two is the identity. Cross-attention is left to the alignment that
    follows the vision tower's training, as it starts from what the tower sees.
    """
    model = InstructBlipForConditionalGeneration(config())
    torch.manual_seed(seed)
    with torch.no_grad():
        _start_vision(model.vision_model)
        qformer, text = model.qformer, model.language_model.model
        words = qformer.embeddings.word_embeddings.weight.normal_()
        qformer.embeddings.position_embeddings.weight.normal_(0, 0.3)
        model.query_tokens.normal_()
        layers: Any = qformer.encoder.layer
        for layer in layers:
            _start_attention(layer.attention.attention, layer.attention.output.dense)
            for first, last in (
                (layer.intermediate, layer.output),
                (layer.intermediate_query, layer.output_query),
            ):
                first.dense.weight.normal_(0, 0.06)
                last.dense.weight.normal_(0, 0.012)
        model.language_projection.weight.copy_(EMBED * torch.eye(WIDTH))
        text.embed_tokens.weight.copy_(EMBED * words)
        model.language_model.lm_head.weight.copy_(0.06 * words)
        start_decoder(text.layers)
    return model


def align(
    model: InstructBlipForConditionalGeneration, project: Float[Tensor, "word vision"], seed: int
) -> None:
    """Initialise cross-attention to read patches as the words that ``project`` makes of them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        layers: Any = model.qformer.encoder.layer
        for layer in layers:
            if layer.has_cross_attention:
                part = layer.crossattention
                _start_attention(part.attention, part.output.dense, project)


def save(model: InstructBlipForConditionalGeneration, folder: Path) -> None:
    """Write the model and its processor; weights are stored in fp16 and loaded as fp32.

    The model's own weights are rounded on the way, so that what is measured is what was written.
    """
    model.half().save_pretrained(folder)
    stored = folder / "config.json"
    text = stored.read_text(encoding="utf-8").replace('"float16"', '"float32"')
    stored.write_text(text, encoding="utf-8")
    model.float()
    processor().save_pretrained(folder)


def _start_vision(tower: InstructBlipVisionModel) -> None:
    """Initialise the tower at CLIP's scales; there is no norm before its first layer."""
    width, narrow = VISION_WIDTH, (2 * VISION_LAYERS * VISION_WIDTH) ** -0.5
    layers: Any = tower.encoder.layers
    tower.embeddings.class_embedding.normal_(0, width**-0.5)
    tower.embeddings.position_embedding.normal_(0, 0.1)
    tower.embeddings.patch_embedding.weight.normal_(0, (3 * PATCH_SIZE**2) ** -0.5)
    for layer in layers:
        layer.self_attn.qkv.weight.normal_(0, narrow)
        layer.self_attn.projection.weight.normal_(0, width**-0.5)
        layer.mlp.fc1.weight.normal_(0, (2 * width) ** -0.5)
        layer.mlp.fc2.weight.normal_(0, narrow)


def _start_attention(
    attention: Any, output: nn.Linear, project: Float[Tensor, "word source"] | None = None
) -> None:
    """Initialise one attention of the Q-Former; keys and values of its input times ``project``."""
    for part in (attention.query, attention.key, attention.value, output):
        part.bias.zero_()
    attention.query.weight.normal_(0, 0.08)
    value = torch.empty(WIDTH, WIDTH).normal_(0, 0.06)
    if project is None:
        project = torch.eye(WIDTH)
    attention.key.weight.copy_(attention.query.weight @ project)
    attention.value.weight.copy_(value @ project)
    output.weight.copy_(value.T / 2)
