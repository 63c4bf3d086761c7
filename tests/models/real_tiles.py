"""Real processors of pictures that are cut into tiles (``real_families.py``)."""

from real_processors import Real, chatml, turns

SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
# Llama's, before the template writes anything.
LLAMA = ("<pad>", "<s>", "</s>", "<unk>")
CHATML = ("<|im_start|>", "<|im_end|>")
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
    model={"text": {"sliding_window": 1024}},
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
