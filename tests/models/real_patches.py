"""Real processors of pictures that become patches, as many as they hold (``real_families.py``)."""

from real_processors import Real, chatml, turns
from real_tiles import CHATML, LLAMA

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
