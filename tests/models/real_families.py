"""The table of real processors: one entry a model type (``real_processors.py``)."""

from typing import NamedTuple

import transformers
from real_processors import Real, chatml, turns
from survey_table import REASONS as SURVEYED
from tiny_families import GEMMA4 as GEMMA4_TOP
from tiny_families import GEMMA4_UNIFIED

from clva_lens.ground.errors import ClvaLensError, ModelCheckError, PromptError

SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
VIDEO = "<|video_pad|>"
# Llama's, before the template writes anything.
LLAMA = ("<pad>", "<s>", "</s>", "<unk>")
CHATML = ("<|im_start|>", "<|im_end|>")
VICUNA = turns("ROLE: ", "<image>\n", " ", "ASSISTANT:", role="m['role'] | upper")
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", *CHATML)
QWEN_TEMPLATE = chatml("<|vision_start|><|image_pad|><|vision_end|>")
PATCHES = {
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
}
QWEN = Real(
    "Qwen2VLProcessor",
    "Qwen2VLImageProcessor",
    PATCHES,
    QWEN_TOKENS,
    QWEN_TEMPLATE,
    videos="Qwen2VLVideoProcessor",
)
QWEN3 = QWEN._replace(processor="Qwen3VLProcessor", videos="Qwen3VLVideoProcessor")
STILL = PATCHES | {"temporal_patch_size": 1}

INTERNVL = Real(
    "InternVLProcessor",
    "GotOcr2ImageProcessor",
    {"size": SQUARE, "crop_to_patches": True, "max_patches": 4},
    ("<IMG_CONTEXT>", "<video>", "<img>", "</img>", *CHATML),
    chatml("<IMG_CONTEXT>\n"),
    {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    {"image_seq_length": 16},
    videos="InternVLVideoProcessor",
)
ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
AROUND = ("<image>", "<video>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
UTTERANCES = turns("ROLE:", "<image>", "<end_of_utterance>\n", "Assistant:", "<|im_start|>")
IDEFICS3 = Real(
    "Idefics3Processor",
    "Idefics3ImageProcessor",
    {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
    (*AROUND, "<|im_start|>", *ROWS),
    UTTERANCES.replace("m['role']", "m['role'] | capitalize"),
    settings={"image_seq_len": 4},
)
CUT = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
LLAVA_NEXT = Real(
    "LlavaNextProcessor",
    "LlavaNextImageProcessor",
    {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE, "image_grid_pinpoints": CUT},
    ("<image>", "<video>", "[INST]", "[/INST]"),
    turns("[INST] ", "<image>\n", " [/INST]", ""),
    settings={
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    start=LLAMA,
    begins=True,
    model={"top": {"image_grid_pinpoints": CUT}},
)
ONEVISION = Real(
    "LlavaOnevisionProcessor",
    "LlavaOnevisionImageProcessor",
    {"size": SQUARE, "image_grid_pinpoints": CUT},
    ("<image>", "<video>", *CHATML),
    chatml("<image>\n"),
    settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    videos="LlavaOnevisionVideoProcessor",
    model={"top": {"image_grid_pinpoints": CUT}},
)
COHERE = (
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)
COHERE_TEMPLATE = turns(
    "<|START_OF_TURN_TOKEN|>ROLE",
    "<image>",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "<BOS_TOKEN>",
    "{'user': '<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>', "
    "'assistant': '<|CHATBOT_TOKEN|>'}[m['role']]",
)
COHERE_START = ("<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<UNK>")
AYA = Real(
    "AyaVisionProcessor",
    "GotOcr2ImageProcessor",
    {"size": SQUARE, "crop_to_patches": True, "max_patches": 4},
    (
        "<|IMG_PATCH|>",
        "<image>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_LINE_BREAK|>",
        "TILE",
        "TILE_GLOBAL",
        *COHERE,
    ),
    COHERE_TEMPLATE,
    settings={"patch_size": 4, "img_size": SIDE, "downsample_factor": 2},
    start=COHERE_START,
    begins=True,
)
LLAMA4 = Real(
    "Llama4Processor",
    "Llama4ImageProcessor",
    {"size": SQUARE, "max_patches": 4},
    (
        "<|patch|>",
        "<|video|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|image|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|eot|>",
    ),
    None,
    settings={"patch_size": 4, "pixel_shuffle_ratio": 0.5},
    start=("<|finetune_right_pad|>", "<|begin_of_text|>", "<|end_of_text|>"),
    begins=True,
)
OVIS = Real(
    "Ovis2Processor",
    "Ovis2ImageProcessor",
    {"size": SQUARE, "crop_to_patches": True, "max_patches": 4},
    (
        "<IMG_ATOM>",
        "<image>",
        "<IMG_START>",
        "<IMG_END>",
        "<IMG_GRID>",
        "<IMG_COL>",
        "<IMG_ROW>",
        *CHATML,
    ),
    chatml("<image>\n"),
    settings={"image_seq_length": 16},
)
TILES = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4))
LFM = Real(
    "Lfm2VlProcessor",
    "Lfm2VlImageProcessor",
    {
        "tile_size": SIDE,
        "encoder_patch_size": 8,
        "downsample_factor": 2,
        "min_image_tokens": 2,
        "max_image_tokens": 4,
        "max_tiles": 4,
        "max_num_patches": 64,
        "size": SQUARE,
    },
    (
        "<image>",
        "<video>",
        "<|image_start|>",
        "<|image_end|>",
        "<|img_thumbnail|>",
        *TILES,
        *CHATML,
    ),
    chatml("<image>", "<|startoftext|>"),
    start=("<|pad|>", "<|startoftext|>", "<|endoftext|>"),
    begins=True,
)

GLM_TOKENS = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>")
GLM = Real(
    "Glm4vProcessor",
    "Glm4vImageProcessor",
    PATCHES,
    (
        *GLM_TOKENS,
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
    ),
    turns(
        "<|ROLE|>\n",
        "<|begin_of_image|><|image|><|end_of_image|>",
        "",
        "<|assistant|>\n",
        "[gMASK]<sop>",
    ),
    videos="Glm4vVideoProcessor",
)
GLM46 = GLM._replace(
    processor="Glm46VProcessor", images="Glm46VImageProcessor", videos="Glm46VVideoProcessor"
)
ERNIE_NAMES = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
ERNIE_START = ("<unk>", "<|begin_of_sentence|>", "</s>")
ERNIE = Real(
    "Ernie4_5_VLMoeProcessor",
    "Ernie4_5_VLMoeImageProcessor",
    STILL,
    (
        "<|IMAGE_PLACEHOLDER|>",
        "<|VIDEO_PLACEHOLDER|>",
        "<|IMAGE_START|>",
        "<|IMAGE_END|>",
        "<|VIDEO_START|>",
        "<|VIDEO_END|>",
    ),
    turns(
        "ROLE: ",
        "Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        "\n",
        "Assistant: ",
        "<|begin_of_sentence|>",
        "m['role'] | capitalize",
    ),
    ERNIE_NAMES,
    # Drawing needs a font, which would be fetched.
    parts={"video_processor": ("Ernie4_5_VLMoeVideoProcessor", {"draw_on_frames": False})},
    start=ERNIE_START,
)
PADDLE = ERNIE._replace(
    processor="PaddleOCRVLProcessor",
    images="PaddleOCRVLImageProcessor",
    template=ERNIE.template.replace("Picture 1:", ""),
    parts={},
)
HUNYUAN = Real(
    "HunYuanVLProcessor",
    "HunYuanVLImageProcessor",
    STILL,
    (
        "<|image_token|>",
        "<|video_token|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|begin_of_sentence|>",
        "<|end_of_system|>",
        "<|end_of_user|>",
    ),
    turns(
        "",
        "<|image_start|><|image_token|><|image_end|>",
        "{% if m['role'] == 'system' %}<|end_of_system|>{% else %}<|end_of_user|>{% endif %}",
        "",
        "<|begin_of_sentence|>",
    ),
    {
        "image_token": "<|image_token|>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
    },
)
KIMI = Real(
    "Kimi_K25Processor",
    "Kimi_K25ImageProcessor",
    {"patch_size": 8, "size": {"max_height": 12, "max_width": 12}, "max_patches": 144},
    (
        "<|media_pad|>",
        "<|kimi_k25_video_placeholder|>",
        "<|media_begin|>",
        "<|media_end|>",
        "<|media_content|>",
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_system|>",
        "<|im_middle|>",
        "<|im_end|>",
    ),
    turns(
        "<|im_ROLE|>ROLE<|im_middle|>",
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        "<|im_end|>",
        "<|im_assistant|>assistant<|im_middle|>",
    ),
    videos="Kimi_K25VideoProcessor",
)
MINIMAX = Real(
    "MiniMaxM3VLProcessor",
    "MiniMaxM3VLImageProcessor",
    PATCHES,
    (
        "]<]image[>[",
        "]<]video[>[",
        "]<]start of image[>[",
        "]<]end of image[>[",
        "]~!b[",
        "]~b]",
        "[e~[",
    ),
    turns("]~b]ROLE\n", "]<]image[>[", "[e~[\n", "]~b]ai\n", "]~!b["),
    videos="MiniMaxM3VLVideoProcessor",
)
WHISPER = ("WhisperFeatureExtractor", {"feature_size": 16})
OMNI_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_token": "<|audio_pad|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
OMNI = QWEN._replace(
    processor="Qwen2_5OmniProcessor",
    tokens=(*QWEN_TOKENS[:4], "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>", *CHATML),
    named=OMNI_NAMES,
    parts={"feature_extractor": WHISPER},
)

GEMMA_TURNS = turns(
    "<start_of_turn>ROLE\n",
    "<start_of_image>",
    "<end_of_turn>\n",
    "<start_of_turn>model\n",
    "<bos>",
)
GEMMA_START = ("<pad>", "<bos>", "<eos>", "<unk>")
WIDE = {"text": {"sliding_window": 1024}}
DEEP = {"text": {"sliding_window": 1024, "vocab_size_per_layer_input": 512}}
GEMMA3 = Real(
    "Gemma3Processor",
    "Gemma3ImageProcessor",
    {"size": SQUARE},
    (
        "<image_soft_token>",
        "<video>",
        "<start_of_image>",
        "<end_of_image>",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    GEMMA_TURNS,
    {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    {"image_seq_length": 16},
    start=GEMMA_START,
    begins=True,
    model=WIDE,
)
GEMMA4 = Real(
    "Gemma4Processor",
    "Gemma4ImageProcessor",
    {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2},
    ("<|image|>", "<|video|>", "<|image>", "<image|>", "<|audio|>", "<|turn>", "<turn|>"),
    turns("<|turn>ROLE\n", "<|image|>", "<turn|>\n", "<|turn>model\n", "<bos>"),
    {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|turn>",
        "eoa_token": "<turn|>",
    },
    {"image_seq_length": 70},
    parts={
        "feature_extractor": ("Gemma4AudioFeatureExtractor", {}),
        "video_processor": ("Gemma4VideoProcessor", {}),
    },
    start=GEMMA_START,
    begins=True,
    model=DEEP
    | {"top": {"vision_config": GEMMA4_TOP["vision_config"] | {"position_embedding_size": 512}}},
)
PALIGEMMA = Real(
    "PaliGemmaProcessor",
    "SiglipImageProcessor",
    {"size": SQUARE, "image_seq_length": 16},
    ("<image>", "<video>"),
    None,
    {"image_token": "<image>"},
    start=GEMMA_START,
    model={"text": {"vocab_size": 2048}},
)
DEEPSEEK = Real(
    "DeepseekVLProcessor",
    "DeepseekVLImageProcessor",
    {"size": SQUARE},
    ("<image_placeholder>", "<video>"),
    turns("ROLE: ", "<image_placeholder>", "\n\n", "Assistant:", role="m['role'] | capitalize"),
    {"image_token": "<image_placeholder>"},
    {"num_image_tokens": 16},
    begins=True,
)
JANUS = DEEPSEEK._replace(
    processor="JanusProcessor",
    images="JanusImageProcessor",
    tokens=("<image_placeholder>", "<video>", "<begin_of_image>", "<end_of_image>"),
    template=turns("<|ROLE|>: ", "<image_placeholder>\n", "\n\n", "<|Assistant|>:"),
    named={
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    },
)
GOT = Real(
    "GotOcr2Processor",
    "GotOcr2ImageProcessor",
    {"size": {"height": 128, "width": 128}},
    ("<imgpad>", "<video>", "<img>", "</img>", *CHATML),
    None,
    model={"vision": {"image_size": 128, "num_hidden_layers": 1, "output_channels": 8}},
)
# Its published template asks one question, whatever it is asked.
CHART = GOT._replace(
    processor="PPChart2TableProcessor",
    images="PPChart2TableImageProcessor",
    template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n<img>"
    "{% for _ in range(256) %}<imgpad>{% endfor %}</img>\nChart to table<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
ARIA = Real(
    "AriaProcessor",
    "AriaImageProcessor",
    {},
    ("<|img|>", "<video>", "<fim_prefix>", "<fim_suffix>", *CHATML),
    chatml("<fim_prefix><|img|><fim_suffix>"),
    {"image_token": "<|img|>"},
    model={
        "vision": {"image_size": 980, "patch_size": 70},
        "top": {"projector_patch_to_query_dict": {49: 128, 196: 256}},
    },
)
FUYU = Real(
    "FuyuProcessor",
    "FuyuImageProcessor",
    {"size": {"height": 64, "width": 64}, "patch_size": {"height": 8, "width": 8}},
    ("|SPEAKER|", "|NEWLINE|", "<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x04>"),
    None,
    start=("<pad>", "<s>", "|ENDOFTEXT|", "<unk>"),
    pieces=True,
)
VIP = Real(
    "LlavaProcessor",
    "CLIPImageProcessor",
    {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
    ("<image>", "<video>"),
    VICUNA,
    settings=LLAVA_NEXT.settings,
    start=LLAMA,
    begins=True,
)
PIXTRAL = Real(
    "PixtralProcessor",
    "PixtralImageProcessor",
    {"patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 64}},
    (
        "[IMG]",
        "<video>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ),
    turns(
        "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}",
        "[IMG]",
        "{% if m['role'] == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}",
        "",
        "<s>",
    ),
    settings={"patch_size": 16},
    start=LLAMA,
    begins=True,
)
LIGHTON = Real(
    "LightOnOcrProcessor",
    "PixtralImageProcessor",
    {"patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 64}},
    ("<|image_pad|>", "<video>", "<|vision_pad|>", "<|vision_end|>", *CHATML),
    chatml("<|image_pad|>"),
    {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    },
    {"patch_size": 8, "spatial_merge_size": 2},
    model={"vision": {"image_size": 64}},
)
COHERE2 = AYA._replace(
    processor="Cohere2VisionProcessor",
    images="Cohere2VisionImageProcessor",
    sizes={"size": SQUARE, "patch_size": 4, "max_patches": 4},
    template=COHERE_TEMPLATE.replace("<image>", "<|IMG_PATCH|>"),
    named={
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    },
    settings={},
    model=WIDE,
)
STEP = Real(
    "Step3p7Processor",
    "Step3p7ImageProcessor",
    {
        "size": SQUARE,
        "patch_size": 16,
        "max_image_size": 48,
        "vision_patch_size": 2,
        "downsampler_stride": 4,
    },
    (
        "<im_patch>",
        "<video>",
        "<im_start>",
        "<im_end>",
        "<patch_start>",
        "<patch_end>",
        "<patch_newline>",
        *CHATML,
    ),
    chatml("<im_patch>"),
    model={"vision": {"patch_size": 2}},
)
APERTUS = Real(
    "Apertus1p5Processor",
    "Apertus1p5ImageProcessor",
    {"size": {"min_pixels": 32 * 32, "max_pixels": 128 * 128}},
    (
        "<|image|>",
        "<video>",
        "<|img_start|>",
        "<|img_end|>",
        "<|audio|>",
        "<|audio_start|>",
        "<|audio_end|>",
        "<|img_token_start|>",
        "<|img_end_of_row|>",
        *CHATML,
    ),
    chatml("<|image|>", "<s>"),
    {
        "image_token": "<|image|>",
        "audio_token": "<|audio|>",
        "boi_token": "<|img_start|>",
        "eoi_token": "<|img_end|>",
        "image_wrapper_token": "<|img_token_start|>",
        "eol_token": "<|img_end_of_row|>",
        "boa_token": "<|audio_start|>",
        "eoa_token": "<|audio_end|>",
    },
    parts={"feature_extractor": ("EncodecFeatureExtractor", {})},
    start=LLAMA,
    begins=True,
)

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
    """Return the table that the README shows."""
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
