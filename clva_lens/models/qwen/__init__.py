"""Qwen-VL and Qwen-VL-Chat (2023) as a native transformers model. Importing registers it.

Written from the facts of the released checkpoints (arXiv:2308.12966), whose own code is never run.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from clva_lens.models.qwen.configuration import QwenVLConfig as QwenVLConfig
from clva_lens.models.qwen.model import (
    QwenVLForConditionalGeneration as QwenVLForConditionalGeneration,
)
from clva_lens.models.qwen.processor import QwenVLProcessor as QwenVLProcessor

AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(QwenVLConfig, QwenVLProcessor, exist_ok=True)
