"""The table of real processors: one entry a model type (``real_processors.py``)."""

from typing import NamedTuple

import transformers
from real_patches import (
    APERTUS,
    ERNIE,
    GLM,
    GLM46,
    HUNYUAN,
    KIMI,
    LIGHTON,
    MINIMAX,
    OMNI,
    PADDLE,
    PATCHES,
    PIXTRAL,
    QWEN,
    QWEN3,
    STILL,
)
from real_processors import Real, chatml
from real_squares import (
    ARIA,
    CHART,
    DEEPSEEK,
    FUYU,
    GEMMA3,
    GEMMA4,
    GOT,
    JANUS,
    PALIGEMMA,
    VIP,
    WIDE,
)
from real_tiles import (
    AYA,
    CHATML,
    COHERE2,
    IDEFICS3,
    INTERNVL,
    LFM,
    LLAMA,
    LLAMA4,
    LLAVA_NEXT,
    ONEVISION,
    OVIS,
    SIDE,
    SQUARE,
    STEP,
)
from survey_table import REASONS as SURVEYED
from tiny_families import GEMMA4_UNIFIED

from clva_lens.ground.errors import ClvaLensError, ModelCheckError, PromptError

REAL: dict[str, Real] = {
    "apertus1p5": APERTUS,
    "aria": ARIA,
    "aya_vision": AYA._replace(model=WIDE),
    "cohere2_vision": COHERE2,
    "cosmos3_edge": QWEN._replace(
        processor="Cosmos3EdgeProcessor",
        images="Cosmos3EdgeImageProcessor",
        sizes=STILL,
        videos="Cosmos3EdgeVideoProcessor",
    ),
    "cosmos3_omni": QWEN3._replace(model={"vision": {"deepstack_visual_indexes": [0, 1]}}),
    "deepseek_vl": DEEPSEEK,
    "deepseek_vl_hybrid": DEEPSEEK._replace(
        processor="DeepseekVLHybridProcessor",
        images="DeepseekVLHybridImageProcessor",
        sizes={"size": SQUARE, "high_res_size": {"height": 32, "width": 32}},
    ),
    "ernie4_5_vl_moe": ERNIE,
    "exaone4_5": QWEN._replace(processor="Exaone4_5_Processor"),
    "fuyu": FUYU,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4._replace(
        processor="Gemma4UnifiedProcessor",
        images="Gemma4UnifiedImageProcessor",
        parts={
            "feature_extractor": ("Gemma4UnifiedAudioFeatureExtractor", {}),
            "video_processor": ("Gemma4UnifiedVideoProcessor", {}),
        },
        model=WIDE
        | {
            "top": {
                "vision_config": GEMMA4_UNIFIED["vision_config"]
                | {"pooling_kernel_size": 2, "model_patch_size": 16}
            }
        },
    ),
    "glm46v": GLM46,
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "glm5_next": GLM._replace(
        processor="Glm5NextProcessor",
        images="Glm5NextImageProcessor",
        sizes=PATCHES | {"min_image_tokens": 4, "max_image_tokens": 36},
        videos="Glm5NextVideoProcessor",
    ),
    "glm_ocr": GLM46,
    "glmga": GLM46._replace(images="GlmgaImageProcessor", videos="GlmgaVideoProcessor"),
    "got_ocr2": GOT,
    "granite_docling": IDEFICS3._replace(
        processor="GraniteDoclingProcessor",
        images="GraniteDoclingImageProcessor",
        sizes={"size": SQUARE, "max_patches": 4},
        model={"vision": {"scale_factor": 2}},
    ),
    "hunyuan_vl": HUNYUAN,
    "hyperclovax_vision_v2": QWEN._replace(processor="HyperCLOVAXVisionV2Processor"),
    "idefics2": IDEFICS3._replace(
        processor="Idefics2Processor",
        images="Idefics2ImageProcessor",
        sizes={"size": {"shortest_edge": 24, "longest_edge": SIDE}, "do_image_splitting": False},
        settings={"image_seq_len": 8},
        start=LLAMA,
        begins=True,
    ),
    "idefics3": IDEFICS3,
    "internvl": INTERNVL,
    "janus": JANUS,
    "kimi_k25": KIMI,
    "lfm2_vl": LFM,
    "lfm3_vl": QWEN._replace(processor="Lfm3VlProcessor"),
    "lighton_ocr": LIGHTON,
    "llama4": LLAMA4,
    "llava (pixtral)": PIXTRAL,
    "llava_next": LLAVA_NEXT,
    "llava_next_video": LLAVA_NEXT._replace(
        processor="LlavaNextVideoProcessor", videos="LlavaNextVideoVideoProcessor"
    ),
    "llava_onevision": ONEVISION,
    "minimax_m3_vl": MINIMAX,
    "mistral3": PIXTRAL._replace(
        sizes={"patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 64}},
        settings={"patch_size": 8, "spatial_merge_size": 2},
        model={"vision": {"image_size": 64}},
    ),
    "ovis2": OVIS,
    "paddleocr_vl": PADDLE,
    "paligemma": PALIGEMMA,
    "pp_chart2table": CHART,
    "qianfan_ocr": INTERNVL._replace(
        processor="QianfanOCRProcessor",
        template=chatml("<image>\n"),
        tokens=("<IMG_CONTEXT>", "<image>", "<img>", "</img>", *CHATML),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
        videos=None,
    ),
    "qwen2_5_omni_thinker": OMNI,
    "qwen2_5_vl": QWEN._replace(processor="Qwen2_5_VLProcessor"),
    "qwen2_vl": QWEN,
    "qwen3_5": QWEN3,
    "qwen3_5_moe": QWEN3,
    "qwen3_omni_moe_thinker": OMNI._replace(processor="Qwen3OmniMoeProcessor"),
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "shieldgemma2": GEMMA3._replace(processor="ShieldGemma2Processor"),
    "smolvlm": IDEFICS3._replace(
        processor="SmolVLMProcessor", images="SmolVLMImageProcessor", videos="SmolVLMVideoProcessor"
    ),
    "step3p7": STEP,
    "video_llama_3": QWEN._replace(
        processor="VideoLlama3Processor",
        images="VideoLlama3ImageProcessor",
        sizes=STILL,
        videos="VideoLlama3VideoProcessor",
    ),
    "video_llava": VIP._replace(
        processor="VideoLlavaProcessor",
        images="VideoLlavaImageProcessor",
        settings={"patch_size": 8, "num_additional_image_tokens": 1},
        videos="VideoLlavaVideoProcessor",
    ),
    "vipllava": VIP,
}


class Reason(NamedTuple):
    """Why a model type does not work with its processor: in words, and what ``cl.load`` raises."""

    words: str
    error: type[ClvaLensError]
    message: str


REASONS = {
    "pp_chart2table": Reason(
        "its template asks one question, whatever it is asked",
        ModelCheckError,
        r"different questions.*Probably the chat template drops it",
    ),
    "shieldgemma2": Reason(
        "its processor asks its own questions, three for one", PromptError, "makes 3 prompts of 1,"
    ),
}
if "llama4" in SURVEYED:
    REASONS["llama4"] = Reason(
        SURVEYED["llama4"].words, ModelCheckError, SURVEYED["llama4"].message
    )
"""Model types that are refused; what their processor makes may still be run, as it is."""


ON_TORCHVISION = {
    "FuyuProcessor": "its own code for Pillow calls a tensor's transpose() as an array's",
    "PixtralProcessor": "it asks for torchvision, though its image processor does not",
}
"""Processors that do not run on Pillow alone, though all their parts can be built."""


def needs_torchvision(real: Real) -> bool:
    """Return whether a processor does not run on Pillow alone."""
    parts = [name for name, _ in real.parts.values()]
    videos = [name for name in (real.videos or "", *parts) if "Video" in name]
    on_pillow = hasattr(transformers, f"{real.images}Pil")
    return not on_pillow or bool(videos) or real.processor in ON_TORCHVISION


def table() -> str:
    """Return the table that docs/models.md shows."""
    works = sorted(set(REAL) - set(REASONS))
    rows = {
        "end to end, with torchvision": [one for one in works if needs_torchvision(REAL[one])],
        "end to end, with torchvision or Pillow alone": [
            one for one in works if not needs_torchvision(REAL[one])
        ],
    }
    for kind, reason in REASONS.items():
        rows.setdefault(f"refused: {reason.words}", []).append(kind)
    lines = [
        f"| {words} ({len(kinds)}) | {', '.join(f'`{kind}`' for kind in kinds)} |"
        for words, kinds in rows.items()
    ]
    return "\n".join(["| | model types |", "|---|---|", *lines])
