"""The models that ``clva-lens bench`` measures: the toys, and larger ones with random weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import (
    AutoConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.models.family import find_family
from clva_lens.models.prompt import Prompt, VisualTokens
from clva_lens.models.qwen_files import register_classes
from clva_lens.toy import build, build_instructblip

# Tokens before and after the image, about those of a question with LLaVA-1.5's system message.
SYSTEM_TOKENS, TEXT_TOKENS = 8, 16
# The largest acceptable ratios, by case and unit. The toys' is nearly all Python.
TOY_TARGETS = {("generate, CLVA", "s"): 1.25}
LARGE_TARGETS = {
    ("generate, CLVA", "s"): 1.03,
    ("trace_attention", "s"): 1.5,
    ("trace_attention", "MiB"): 0.05,
}
FULL_TARGETS = {
    ("generate, CLVA", "s"): 1.01,
    ("prefill, CLVA", "s"): 1.01,
    ("prefill, CLVA", "peak"): 1.01,
    ("trace_attention", "s"): 1.15,
    ("trace_attention", "MiB"): 0.05,
}


class Subject(NamedTuple):
    """A model to measure, and the targets it must hold by (case, unit).

    Its kernel is switched between cases, and its end token is switched off. ``keeps_patterns``:
    transformers returns the patterns that ``trace_attention`` reads, so their memory compares.
    ``batch`` prompts are read at once. ``only`` names the cases that are measured; None is all.
    """

    name: str
    model: PreTrainedModel
    targets: Mapping[tuple[str, str], float]
    keeps_patterns: bool = True
    batch: int = 1
    only: tuple[str, ...] | None = None


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


def _qwen_vl() -> tuple[type[PreTrainedModel], Any]:
    from clva_lens.models.qwen import QwenVLConfig, QwenVLForConditionalGeneration

    return QwenVLForConditionalGeneration, QwenVLConfig()


FULL_SIZE: dict[str, Callable[[], tuple[type[PreTrainedModel], Any]]] = {
    "llava-1.5-7b": lambda: (
        LlavaForConditionalGeneration,
        LlavaConfig(text_config=LlamaConfig(vocab_size=32064).to_dict()),
    ),
    "instructblip-7b": lambda: (
        InstructBlipForConditionalGeneration,
        InstructBlipConfig(
            text_config=LlamaConfig(vocab_size=32001).to_dict(),
            num_query_tokens=32,
            image_token_index=32000,
        ),
    ),
    "qwen-vl-7b": _qwen_vl,
}


def full_size(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    image_size: int | None = None,
    **text: int,
) -> PreTrainedModel:
    """Return a published model's shape with random weights, made on the device itself.

    ``image_size`` is in pixels, None the model's own; ``text`` changes the language model's
    configuration (``num_hidden_layers``, for example).

    Raises:
        ParameterError: if the name is unknown.
    """
    if name not in FULL_SIZE:
        raise ParameterError(
            f"no shape is named {name!r}. Pass one of {', '.join(sorted(FULL_SIZE))}."
        )
    kind, config = FULL_SIZE[name]()
    config.text_config.update(text)
    if image_size is not None and name == "qwen-vl-7b":
        raise ParameterError(
            "a Qwen-VL has 256 image tokens whatever the picture's size. Leave image_size out."
        )
    if image_size is not None:
        config.vision_config.image_size = image_size
    return _random(kind, config, device, dtype)


def _random(
    kind: type[PreTrainedModel], config: Any, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return cast(Any, kind)(config).eval()
    finally:
        torch.set_default_dtype(before)


SHAPE_OF_TYPE = {
    "llava": "llava-1.5-7b",
    "instructblip": "instructblip-7b",
    "qwen_vl": "qwen-vl-7b",
}
"""By model type, the published shape that is of the same class."""


def named_subject(
    name: str,
    device: str,
    dtype: torch.dtype,
    batch: int = 1,
    only: tuple[str, ...] | None = None,
) -> Subject:
    """Return a model of a published shape, or of that of a folder's config.json, to be measured.

    Raises:
        ParameterError: if the name is neither, or no family knows the folder's model.
    """
    if not Path(name).is_dir():
        if name not in FULL_SIZE:
            raise ParameterError(
                f"{name!r} is no folder with a config.json, and the shapes that are known are "
                f"{', '.join(sorted(FULL_SIZE))}. Other families cannot be measured yet."
            )
        model = full_size(name, device, dtype)
        targets = FULL_TARGETS if torch.device(device).type == "cuda" else {}
        return Subject(name, model, targets, name != "instructblip-7b", batch, only)
    register_classes(Path(name))
    config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    if config.model_type not in SHAPE_OF_TYPE:
        raise ParameterError(
            f"the folder {name} holds a {config.model_type!r}, which cannot be measured. Pass the "
            f"folder of one of {', '.join(sorted(SHAPE_OF_TYPE))}."
        )
    kind, _ = FULL_SIZE[SHAPE_OF_TYPE[config.model_type]]()
    model = _random(kind, config, device, dtype)
    return Subject(name, model, {}, config.model_type != "instructblip", batch, only)


def dtype_of(name: str) -> torch.dtype:
    """Return the floating-point type of a name.

    Raises:
        ParameterError: if the name is none of float32, bfloat16 and float16.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in types:
        raise ParameterError(f"dtype must be one of {', '.join(types)}, but is {name!r}.")
    return types[name]


SCALING = {
    "tokens": (64, 256, 576, 1024, 2304, 4096),
    "batch": (1, 4, 8, 16, 32),
    "layers": (8, 16, 24, 32),
}
"""What ``scaling_subjects`` varies, and its values."""

SCALING_CASES = (
    "prefill, CLVA",
    "prefill, the paper's rewriting",
    "trace_attention",
    "output_attentions",
)


def scaling_subjects(
    what: str, shape: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Iterator[Subject]:
    """Yield LLaVAs of several numbers of image "tokens", prompts in a "batch", or "layers".

    ``shape`` is a published one (at its full size, but for what is varied); None is a small one: 8
    layers × 512, 256 image tokens, float32. Each is made when it is asked for.

    Raises:
        ParameterError: if ``what`` is something else, or the shape is no LLaVA's.
    """
    if what not in SCALING or shape not in (None, "llava-1.5-7b"):
        raise ParameterError(
            f"scaling is by {', '.join(SCALING)} of 'llava-1.5-7b' or a small model, but {what!r} "
            f"of {shape!r} was asked for. Pass one of these."
        )
    return _scaled(what, shape, device, dtype)


def _scaled(what: str, shape: str | None, device: str, dtype: torch.dtype) -> Iterator[Subject]:
    name = f"{shape or 'random LLaVA, 8 × 512'}, {{}} {what.replace('tokens', 'image tokens')}"
    for count in SCALING[what]:
        tokens, layers = (count if what == "tokens" else 256), (count if what == "layers" else 8)
        if shape is None:
            model: PreTrainedModel = random_llava(layers, 512, 8, tokens)
        else:
            size = 14 * math.isqrt(count) if what == "tokens" else None
            text = {"num_hidden_layers": count} if what == "layers" else {}
            model = full_size(shape, device, dtype, size, **text)
        batch = count if what == "batch" else 1
        yield Subject(name.format(count), model, {}, True, batch, SCALING_CASES)
        del model  # before the next one is made


def random_prompt(
    model: PreTrainedModel, batch: int = 1, system: int = SYSTEM_TOKENS, text: int = TEXT_TOKENS
) -> Prompt:
    """Return a prompt of a noise picture and meaningless words, of the usual proportions."""
    family = find_family(model)
    image = family.image_token_id(model)
    lowest = image + 1 if image < 10 else 10
    words = torch.arange(lowest, lowest + system + text)
    count = family.visual_count(model, "decoder")
    if count is None:
        raise ModelLoadError(
            f"the pictures of {type(model).__name__} have different numbers of image tokens, so "
            "there is no random prompt for it. Pass a model with a fixed number, such as LLaVA-1.5."
        )
    images = torch.full((count,), image)
    ids = torch.cat([words[:system], images, words[system:]]).repeat(batch, 1)
    size = int(model.config.vision_config.image_size)
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
    if isinstance(model, InstructBlipForConditionalGeneration):
        inputs["qformer_input_ids"] = words[system:].repeat(batch, 1).to(model.device)
    spans = family.spans(model, "decoder", inputs)
    tokens = VisualTokens(spans, "these pictures are noise, so nothing is drawn")
    return Prompt(inputs, {"decoder": tokens}, batch > 1, (), ("",) * batch, None)
