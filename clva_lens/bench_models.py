"""The models that ``clva-lens bench`` measures: the toys, and larger ones with random weights."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from clva_lens.errors import ParameterError
from clva_lens.models.family import find_family
from clva_lens.models.prompt import Prompt, VisualTokens
from clva_lens.toy import build, build_instructblip

# Tokens before and after the image, about those of a question with LLaVA-1.5's system message.
SYSTEM_TOKENS, TEXT_TOKENS = 8, 16
# The largest acceptable ratios, by case and unit. The toys' is nearly all Python.
TOY_TARGETS = {("generate, CLVA", "s"): 1.25}
LARGE_TARGETS = {
    ("generate, CLVA", "s"): 1.05,
    ("trace_attention", "s"): 1.5,
    ("trace_attention", "MiB"): 0.05,
}


class Subject(NamedTuple):
    """A model to measure, and the targets it must hold by (case, unit).

    Its kernel is switched between cases, and its end token is switched off. ``keeps_patterns``:
    transformers returns the patterns that ``trace_attention`` reads, so their memory compares.
    """

    name: str
    model: PreTrainedModel
    targets: Mapping[tuple[str, str], float]
    keeps_patterns: bool = True


def toy_subjects() -> list[Subject]:
    """Return both toy architectures, untrained."""
    return [
        Subject("toy LLaVA", build.untrained(0), TOY_TARGETS),
        Subject("toy InstructBLIP", build_instructblip.untrained(0), TOY_TARGETS, False),
    ]


def random_subjects() -> list[Subject]:
    """Return a LLaVA of 24 layers and an InstructBLIP with the same decoder."""
    return [
        Subject("random LLaVA, 24 × 512", random_llava(), LARGE_TARGETS),
        Subject("random InstructBLIP, 24 × 512", random_instructblip(), LARGE_TARGETS, False),
    ]


def _decoder(layers: int, width: int, heads: int) -> dict[str, Any]:
    # The feed-forward width is in the 7B model's proportion, 11008 / 4096.
    text: dict[str, Any] = {"hidden_size": width, "intermediate_size": round(width * 2.6875)}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads}
    text |= {"num_hidden_layers": layers, "vocab_size": 1024, "max_position_embeddings": 4096}
    return text


def random_llava(
    layers: int = 24, width: int = 512, heads: int = 8, image_tokens: int = 576
) -> LlavaForConditionalGeneration:
    """Return a LLaVA with random weights in which the decoder does nearly all the work.

    Raises:
        ParameterError: if ``image_tokens`` is not a square number.
    """
    side = math.isqrt(image_tokens)
    if side * side != image_tokens:
        raise ParameterError(
            f"image_tokens must be a square number, but is {image_tokens}. Pass {side * side}."
        )
    vision: dict[str, Any] = {"image_size": 14 * side, "patch_size": 14, "num_hidden_layers": 2}
    config = build.config()
    text = _decoder(layers, width, heads)
    for part, changes in ((config.text_config, text), (config.vision_config, vision)):
        cast(Any, part).update(changes)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def random_instructblip(
    layers: int = 24, width: int = 512, heads: int = 8
) -> InstructBlipForConditionalGeneration:
    """Return an InstructBLIP with random weights: 32 queries, 256 patches, as the 7B model has."""
    vision: dict[str, Any] = {"image_size": 224, "patch_size": 14, "num_hidden_layers": 2}
    qformer: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536}
    qformer |= {"num_attention_heads": 12}
    config = build_instructblip.config()
    config.num_query_tokens = 32
    text = _decoder(layers, width, heads)
    for part, changes in (
        (config.text_config, text),
        (config.vision_config, vision),
        (config.qformer_config, qformer),
    ):
        cast(Any, part).update(changes)
    torch.manual_seed(0)
    return InstructBlipForConditionalGeneration(config).eval()


def random_prompt(model: PreTrainedModel) -> Prompt:
    """Return a prompt of a noise picture and meaningless words, of the usual proportions."""
    family = find_family(model)
    image = family.image_token_id(model)
    words = torch.arange(image + 1, image + 1 + SYSTEM_TOKENS + TEXT_TOKENS)
    images = torch.full((family.visual_count(model, "decoder"),), image)
    ids = torch.cat([words[:SYSTEM_TOKENS], images, words[SYSTEM_TOKENS:]])[None]
    size = int(model.config.vision_config.image_size)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
    if isinstance(model, InstructBlipForConditionalGeneration):
        inputs["qformer_input_ids"] = words[None, SYSTEM_TOKENS:].to(model.device)
    spans = family.spans(model, "decoder", inputs)
    tokens = VisualTokens(spans, "these pictures are noise, so nothing is drawn")
    return Prompt(inputs, {"decoder": tokens}, False, (), ("",), None)
