"""Real processors of pictures that are made squares, or of a fixed size (``real_families.py``)."""

from real_processors import Real, chatml, turns
from real_tiles import CHATML, LLAMA, LLAVA_NEXT, SIDE, SQUARE
from tiny_families import GEMMA4 as GEMMA4_TOP

VICUNA = turns("ROLE: ", "<image>\n", " ", "ASSISTANT:", role="m['role'] | upper")
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
