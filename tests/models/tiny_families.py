"""A tiny model with random weights for each image-text-to-text class of transformers.

A configuration is the class's default with every size replaced by a small one (``TEXT``,
``PICTURE``), and then what ``TINY`` says for that model type. Pictures come as tensors of random
pixels, in the form that the model takes.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import torch
from tiny_pictures import (
    SIDE,
    Inputs,
    flagged_tiles,
    merged_patches,
    patches,
    placed_patches,
    raw_patches,
    shaped_patches,
    sized,
    sized_tiles,
    square,
    square_patches,
    tiles,
    two_sizes,
)
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as CLASSES

IMAGE, VIDEO, START, END, PAD = 5, 6, 7, 8, 0
WIDTH, LAYERS, PATCH = 32, 6, 8
LARGEST = 20_000_000
TEXT = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
PICTURE = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "image_size": SIDE,
    "patch_size": PATCH,
    "out_hidden_size": WIDTH,
    "projection_dim": 24,
    "resampler_n_latents": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}
TOP = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "boi_token_id": START,
    "eoi_token_id": END,
    "boi_token_index": START,
    "eoi_token_index": END,
    "audio_token_id": 9,
    "hidden_size": WIDTH,
}


class Tiny(NamedTuple):
    """What a model type needs beside the small sizes: its picture, and settings by part.

    ``types``: the name of an input that is 1 on image tokens. ``projected``: its features are made
    as wide as the decoder where they are made.
    """

    picture: Callable[[Any, int], Inputs] = square
    text: Mapping[str, Any] = {}
    vision: Mapping[str, Any] = {}
    top: Mapping[str, Any] = {}
    types: str | None = None
    projected: bool = True


def mrope(*section: int) -> dict[str, Any]:
    """Return the setting for positions in time, height and width."""
    kind = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}
    return {"rope_parameters": kind}


ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
FINE = {"patch_size": 4}  # for towers that merge patches
CUT = {"image_grid_pinpoints": [[SIDE, 2 * SIDE]]}
QWEN = Tiny(patches, mrope(2, 1, 1), types="mm_token_type_ids")
GEMMA = Tiny(top={"mm_tokens_per_image": 16}, vision=FINE, types="token_type_ids")
DEEP = QWEN._replace(vision={"deepstack_visual_indexes": [0, 1]})
QWEN_NEXT = QWEN._replace(text=mrope(1, 0, 0) | {"num_hidden_layers": 16})
LLAMA4 = {
    "intermediate_size": 96,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
APERTUS = {  # 64 words, then a picture's codes, then those of sounds
    "vision_config": {
        "codebook_size": 32,
        "embed_dim": 8,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1] * 5,
        "num_res_blocks": 1,
    },
    "audio_config": {
        "model_type": "wavtokenizer_encoder",
        "codebook_size": 32,
        "codebook_dim": 8,
        "hidden_size": 8,
        "num_filters": 4,
    },
    "image_token_offset": 64,
    "audio_token_offset": 96,
}
GEMMA4 = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "patch_size": PATCH,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
}
GEMMA4_UNIFIED = {
    "vision_config": {
        "model_type": "gemma4_unified_vision",
        "patch_size": PATCH,
        "pooling_kernel_size": 1,
        "model_patch_size": PATCH,
        "mm_embed_dim": 24,
        "mm_posemb_size": 64,
        "output_proj_dims": 24,
    }
}
GLM5 = {  # every fourth layer has softmax attention, without rotary embeddings
    "num_hidden_layers": 16,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 0,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 12,
    "image_size": 64,
    "patch_size": 16,
}
OMNI = {"vision_start_token_id": START, "vision_end_token_id": END, "audio_start_token_id": 10}
HALF = QWEN._replace(text=mrope(1, 1, 0))  # half of a head is turned
TINY: dict[str, Tiny] = {
    "aria": Tiny(top={"projector_patch_to_query_dict": {16: 8}}),
    "apertus1p5": Tiny(sized, {"vocab_size": 128} | ROTARY, top=APERTUS),
    "aya_vision": Tiny(vision=FINE),
    "cohere2_vision": Tiny(vision=FINE),
    "cosmos3_edge": QWEN,
    "cosmos3_omni": QWEN,
    "deepseek_vl_hybrid": Tiny(two_sizes, vision={"global_attn_indexes": [0]}),
    "ernie4_5_vl_moe": QWEN._replace(text=mrope(1, 1, 2) | {"moe_intermediate_size": [32, 32]}),
    "exaone4_5": Tiny(patches),
    "fuyu": Tiny(raw_patches, top={"patch_size": 8}),
    "gemma3": GEMMA,
    "gemma3n": Tiny(text={"activation_sparsity_pattern": [0.0] * LAYERS}),
    "gemma4": Tiny(
        placed_patches, {"num_kv_shared_layers": 0}, top=GEMMA4, types="mm_token_type_ids"
    ),
    "glm46v": QWEN,
    "glm4v": QWEN,
    "glm4v_moe": HALF,
    "gemma4_unified": Tiny(
        placed_patches,
        {"num_kv_shared_layers": 0, "sliding_window": 128},
        top=GEMMA4_UNIFIED,
        types="mm_token_type_ids",
    ),
    "glm5_next": QWEN._replace(text=GLM5),
    "glm_ocr": QWEN,
    "glmga": QWEN,
    "got_ocr2": Tiny(vision={"patch_size": 2}),
    "granite_docling": Tiny(flagged_tiles),
    "hunyuan_vl": QWEN,
    "hy_v4_vl": QWEN,
    "hyperclovax_vision_v2": Tiny(patches),
    "idefics2": Tiny(tiles),
    "idefics3": Tiny(tiles),
    "internvl": Tiny(vision={"patch_size": 4, "image_size": [SIDE, SIDE]}),
    "janus": Tiny(vision={"projection_dim": WIDTH}),
    "kimi_k25": Tiny(
        square_patches,
        {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
        vision={"hidden_size": 32},
        top={"projection_hidden_size": 32},
    ),
    "lfm2_vl": Tiny(shaped_patches),
    "lfm3_vl": Tiny(patches, {"num_hidden_layers": 16}),
    "llama4": Tiny(vision=FINE | LLAMA4, text={"intermediate_size_mlp": 64}, projected=False),
    "lighton_ocr": Tiny(sized),
    "llava (pixtral)": Tiny(
        sized,
        top={
            "vision_config": PIXTRAL,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    "llava_next": Tiny(sized_tiles, top=CUT),
    "llava_next_video": Tiny(sized_tiles, top=CUT),
    "llava_onevision": Tiny(sized_tiles, top=CUT),
    "minimax_m3_vl": Tiny(patches),
    "mistral3": Tiny(sized),
    "muse_glimmer": Tiny(patches),
    "muse_spark": Tiny(patches),
    "paddleocr_vl": QWEN._replace(picture=square_patches),
    "paligemma": Tiny(types="token_type_ids", top={"projection_dim": WIDTH}),
    "pp_chart2table": Tiny(vision={"patch_size": 2}),
    "qianfan_ocr": Tiny(vision={"patch_size": 4, "image_size": [SIDE, SIDE]}),
    "qwen2_5_omni_thinker": QWEN._replace(top=OMNI, types=None),
    "qwen2_vl": QWEN._replace(vision={"embed_dim": 24, "hidden_size": WIDTH}),
    "qwen2_5_vl": QWEN,
    "qwen3_5": QWEN_NEXT,
    "qwen3_5_moe": QWEN_NEXT,
    "qwen3_omni_moe_thinker": DEEP._replace(top=OMNI, types=None),
    "qwen3_vl": DEEP,
    "qwen3_vl_moe": DEEP,
    "shieldgemma2": GEMMA,
    "smolvlm": Tiny(tiles),
    "step3p7": Tiny(vision={"patch_size": 1}),
    "video_llama_3": Tiny(merged_patches),
    "vipllava": Tiny(top={"vision_feature_layers": [-1, -2]}),
}


def configuration(kind: str, tiny: Tiny | None = None) -> PreTrainedConfig:
    """Return the tiny configuration of a model type, by its own settings or by others."""
    # Configurations write into the dictionaries that they are given.
    tiny, made = deepcopy(tiny or TINY.get(kind, Tiny())), CONFIG_MAPPING[kind.split()[0]]
    default, parts = made(), {}
    for name in made.sub_configs:
        part = getattr(default, name, None)
        if part is not None and name not in tiny.top:
            reads = "text" in name
            parts[name] = _smaller(
                part, TEXT if reads else PICTURE, tiny.text if reads else tiny.vision
            )
    names = made.attribute_map
    top = {key: value for key, value in TOP.items() if hasattr(default, key) and key not in names}
    if not parts:
        top = TEXT | top | dict(tiny.text)
    return made(**(parts | top | dict(tiny.top)))


def _smaller(part: PreTrainedConfig, sizes: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
    kept = part.to_dict()
    for key, value in ({**sizes, **more}).items():
        if key in kept or key in part.attribute_map or key in more:
            pair = isinstance(kept.get(key), list | tuple) and len(kept[key]) == 2
            pair = pair and isinstance(value, int)
            kept[key] = [value, value] if pair else value
    for key, value in kept.items():
        if key.endswith("_types") and isinstance(value, list):
            kept[key] = value[: kept.get("num_hidden_layers")]
    own = kept.get("per_layer_config")
    if own:
        kept["per_layer_config"] = {
            i: one for i, one in own.items() if int(i) < kept["num_hidden_layers"]
        }
    left_out = {"model_type", "transformers_version", "dtype", "_attn_implementation"}
    return type(part)(**{key: kept[key] for key in kept.keys() - left_out})


def made_from(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a configuration, as it is initialised."""
    made: Any = CLASSES[type(config)]
    return (made[0] if isinstance(made, tuple) else made)(config).eval()


def default_model(kind: str) -> PreTrainedModel:
    """Return the model of the default configuration, without weights."""
    with torch.device("meta"):
        return made_from(CONFIG_MAPPING[kind]())


@cache
def tiny_model(kind: str) -> PreTrainedModel:
    """Return the tiny model of a model type."""
    return lively_model(configuration(kind))


def lively_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model, with weights at which attention is peaked and the picture matters."""
    with torch.device("meta"):
        size = sum(one.numel() for one in made_from(config).parameters())
    if size > LARGEST:
        raise RuntimeError(f"{size} parameters are too many for a tiny model")
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = made_from(config)
    enliven(model)
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def enliven(model: PreTrainedModel) -> None:
    """Give all matrices entries of the order of 1/√(columns); queries and keys larger ones."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            columns = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
            if "embed_tokens" in name:
                columns = 1
            parameter.normal_(0, gain / columns**0.5)
    head: Any = model.get_output_embeddings()
    if head is not None:
        head.weight[: END + 2] = 0  # special tokens are never the likeliest


def features(model: PreTrainedModel, given: Inputs) -> Tensor:
    """Return what the model makes of pictures: a row for each image token."""
    inner: Any = model.model if hasattr(model, "model") else model
    with torch.inference_mode():
        found = inner.get_image_features(**given)
    pooled = getattr(found, "pooler_output", found)
    found = found.last_hidden_state if pooled is None else pooled
    if isinstance(found, list | tuple):
        found = torch.cat([one.flatten(0, -2) for one in found])
    if not TINY.get(model.config.model_type, Tiny()).projected:
        with torch.inference_mode():
            found = inner.multi_modal_projector(found)
    return found.flatten(0, -2)


def sample(kind: str, seed: int, words: int = 6) -> Inputs:
    """Return a prompt of one picture: BOS, image, words; with random pixels."""
    model, tiny = tiny_model(kind), TINY.get(kind, Tiny())
    seen = tiny.picture(model.config, seed)
    count = len(features(model, seen))
    question = torch.randint(10, 60, (words,), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat(
        [torch.tensor([1, START]), torch.full((count,), IMAGE), torch.tensor([END]), question]
    )
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **seen}
    if tiny.types is not None:
        inputs[tiny.types] = (ids == IMAGE).long()[None]
    return inputs


def pictures(inputs: Inputs) -> Inputs:
    """Return the inputs that are no tokens."""
    return {
        name: one
        for name, one in inputs.items()
        if not name.endswith(("input_ids", "type_ids")) and name != "attention_mask"
    }


def batch(samples: list[Inputs]) -> Inputs:
    """Return prompts as one batch, padded on the left."""
    longest = max(one["input_ids"].shape[1] for one in samples)
    joined = {}
    for name in samples[0]:
        rows = [one[name] for one in samples]
        if rows[0].shape == samples[0]["input_ids"].shape and "pixel" not in name:
            rows = [
                torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=PAD) for row in rows
            ]
        joined[name] = torch.cat(rows)
    return joined
