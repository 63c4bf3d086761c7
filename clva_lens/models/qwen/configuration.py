"""Qwen-VL's configuration, and the same read from the ``config.json`` that Qwen published."""

from collections.abc import Mapping
from typing import Any, ClassVar, no_type_check

from transformers import CLIPVisionConfig, PreTrainedConfig, Qwen2Config
from transformers.configuration_utils import SubConfigSpec

from clva_lens.ground.errors import ModelLoadError
from clva_lens.models.qwen_files import is_official

# Token ids of the published vocabulary: "<|endoftext|>", "<img>" and "<imgpad>".
END_OF_TEXT, IMAGE_START, IMAGE_PAD = 151643, 151857, 151859


@no_type_check  # transformers makes its __init__
class QwenVLTextConfig(Qwen2Config):
    """The language model: Qwen2's, and two rules for sequences longer than ``seq_length`` tokens.

    ``use_dynamic_ntk`` lowers the rotary frequencies for such a prompt, ``use_logn_attn`` lengthens
    the queries at such positions; up to ``seq_length`` the model is a Qwen2.
    """

    model_type = "qwen_vl_text"
    base_config_key = "text_config"

    intermediate_size: int = 11008
    max_position_embeddings: int = 8192
    pad_token_id: int | None = END_OF_TEXT
    eos_token_id: int | list[int] | None = END_OF_TEXT
    seq_length: int = 2048
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True


@no_type_check  # transformers makes its __init__
class QwenVLVisionConfig(CLIPVisionConfig):
    """The vision tower, a CLIP-like transformer without a class token, and the resampler after it.

    Positions were learned on a square of ``position_side`` patches. The resampler has
    ``num_queries`` queries, a square number, of width ``output_size`` in ``resampler_heads`` heads.
    """

    model_type = "qwen_vl_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    position_side: int = 16
    num_queries: int = 256
    output_size: int = 4096
    resampler_heads: int = 32


@no_type_check  # transformers makes its __init__
class QwenVLConfig(PreTrainedConfig):
    """Qwen-VL or Qwen-VL-Chat; the defaults are the published sizes."""

    model_type = "qwen_vl"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(QwenVLTextConfig),
        "vision_config": SubConfigSpec(QwenVLVisionConfig),
    }

    text_config: Any = None
    vision_config: Any = None
    image_token_id: int = IMAGE_PAD
    tie_word_embeddings: bool = False

    @classmethod
    def from_official(cls, found: Mapping[str, Any]) -> "QwenVLConfig":
        """Return the configuration that a published ``config.json`` describes.

        Its ``intermediate_size`` counts both halves of the SwiGLU, ours one. A head of the
        resampler is 128 wide.

        Raises:
            ModelLoadError: if it is quantised, is no Qwen-VL, or has a variant of the architecture
                that was never published (partial rotary, biases in the projections).
        """
        _require_published(found)
        width, heads = found["hidden_size"], found["num_attention_heads"]
        seen, start = found["visual"], found["visual"]["image_start_id"]
        end, pad = start + END_OF_TEXT - IMAGE_START, start + IMAGE_PAD - IMAGE_START
        text = QwenVLTextConfig(
            vocab_size=found["vocab_size"],
            hidden_size=width,
            intermediate_size=found["intermediate_size"] // 2,
            num_hidden_layers=found["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=found["max_position_embeddings"],
            rms_norm_eps=found["layer_norm_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": float(found["rotary_emb_base"])},
            seq_length=found["seq_length"],
            use_dynamic_ntk=found["use_dynamic_ntk"],
            use_logn_attn=found["use_logn_attn"],
            eos_token_id=end,
            pad_token_id=end,
        )
        vision = QwenVLVisionConfig(
            hidden_size=seen["width"],
            intermediate_size=int(seen["width"] * seen["mlp_ratio"]),
            num_hidden_layers=seen["layers"],
            num_attention_heads=seen["heads"],
            image_size=seen["image_size"],
            patch_size=seen["patch_size"],
            num_queries=seen.get("n_queries", 256),
            output_size=seen["output_dim"],
            resampler_heads=seen["output_dim"] // 128,
        )
        return cls(
            text_config=text,
            vision_config=vision,
            image_token_id=pad,
            tie_word_embeddings=found.get("tie_word_embeddings", False),
        )


def _require_published(found: Mapping[str, Any]) -> None:
    """Refuse what is no Qwen-VL, quantised, or a variant that was never published."""
    if not is_official(found):
        raise ModelLoadError(
            "the configuration is not that of the published Qwen-VL: it needs model_type "
            f"'qwen' and a part 'visual', but has {found.get('model_type')!r} and "
            f"{', '.join(sorted(found))[:200]}. Pass the folder of Qwen/Qwen-VL or "
            "Qwen/Qwen-VL-Chat."
        )
    if found.get("quantization_config"):
        raise ModelLoadError(
            "this Qwen-VL is quantised (Qwen-VL-Chat-Int4), which is not supported. Pass "
            "Qwen/Qwen-VL or Qwen/Qwen-VL-Chat."
        )
    width = found["hidden_size"] // found["num_attention_heads"]
    for name, value in {"rotary_pct": 1.0, "no_bias": True, "kv_channels": width}.items():
        if found.get(name, value) != value:
            raise ModelLoadError(
                f"{name} is {found[name]}, but every published Qwen-VL has {value}, and no "
                "other is supported. Pass an unchanged checkpoint."
            )
