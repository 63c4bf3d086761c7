"""Which image-text-to-text classes of transformers the laws hold for, and why not for the others.

Each reason comes with what ``test_survey.py`` holds it to: an error by its name and a piece of its
message, of clva_lens itself or of transformers.
"""

from typing import Literal, NamedTuple

from packaging.version import Version
from transformers import __version__
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
)

from clva_lens.models.family import FAMILIES

SINCE = {
    "apertus1p5": "5.24",
    "dots3_note": "5.23",
    "granite_docling": "5.23",
    "hy_v4_vl": "5.24",
    "inkling2": "5.23",
    "inkling2_loop": "5.24",
    "lfm3_vl": "5.23",
}
"""Model types that not every supported transformers has, and the version that brought them."""


def installed(version: str) -> bool:
    """Return whether the installed transformers is this version or a later one."""
    return Version(__version__) >= Version(version)


ABSENT = {kind for kind, version in SINCE.items() if not installed(version)}

OWN = {
    kind: family.name
    for kind, architecture in sorted(NAMES.items())
    for _, family in FAMILIES.items()
    if architecture in family.architectures
}
"""Model types that a family of their own takes."""

Kind = Literal["refused", "refused as it runs", "does not build", "unproven"]


class Reason(NamedTuple):
    """Why there are no laws for some model types.

    "refused": clva_lens raises ModelLoadError with ``message``. "refused as it runs": it raises
    InterventionError with ``message`` at the first pass. "does not build": transformers
    raises an error with ``message`` on the default configuration. "unproven": the generic family
    takes the model, but the tiny one fails with ``message``.
    """

    kind: Kind
    words: str
    message: str


UNKNOWN = "belongs to no model family"
NO_TOKEN = Reason("refused", "the configuration names no image token", UNKNOWN)
OTHER = Reason("refused", "pictures come in otherwise than as tokens of a decoder", UNKNOWN)
CROSS = Reason("refused", "pictures are read by cross-attention", "by cross-attention")
ENCODER = Reason("refused", "an encoder-decoder model", "is an encoder-decoder model")
SEVERAL = Reason(
    "refused", "a layer has several modules that call attention", "several attention modules"
)
BROKEN = Reason(
    "unproven", "transformers' own model does not run", "has no attribute 'image_outputs'"
)
TIMM = Reason("does not build", "the vision tower needs timm, which is not installed", "timm")
DEFAULT = "the default configuration is incomplete, and none was written here"
SMALL = "no tiny configuration was found at which transformers' own model runs"

REASONS: dict[str, Reason] = {
    "blip": OTHER,
    "chameleon": Reason("does not build", DEFAULT, "has no attribute 'get'"),
    "cohere_compass": Reason("does not build", DEFAULT, "full_attention"),
    "deepseek_ocr2": Reason("does not build", DEFAULT, "not subscriptable"),
    "diffusion_gemma": Reason("does not build", DEFAULT, "element of type NoneType"),
    "dots3_note": Reason("unproven", SMALL, "num_key_value_heads must match"),
    "emu3": Reason("does not build", DEFAULT, "has no attribute 'get'"),
    "evolla": OTHER,
    "fast_vlm": TIMM,
    "florence2": ENCODER,
    "gemma3n": TIMM,
    "git": OTHER,
    "granite4_vision": Reason("does not build", DEFAULT, "has no len"),
    "idefics": NO_TOKEN,
    "inkling2": Reason("unproven", SMALL, "text_hidden_size"),
    "inkling2_loop": SEVERAL,
    "inkling_mm_model": Reason("unproven", SMALL, "parameters are too many"),
    "instructblipvideo": NO_TOKEN,
    "kosmos-2": OTHER,
    "kosmos-2.5": OTHER,
    "minicpm_ocr": NO_TOKEN,
    "minicpmv4_6": NO_TOKEN,
    "minicpmv4_7": NO_TOKEN,
    "mistral4": OTHER,
    "mistral_large4": Reason("unproven", SMALL, "kv_source_layers"),
    "mllama": CROSS,
    "molmo2": Reason("unproven", SMALL, "vision_feature_layer"),
    "muse_glimmer": Reason("unproven", SMALL, "parameters are too many"),
    "muse_spark": Reason("unproven", SMALL, "must have one entry per layer"),
    "nemotron_h_omni": NO_TOKEN,
    "perception_lm": TIMM,
    "pi0": OTHER,
    "pix2struct": OTHER,
    "pp_formulanet": OTHER,
    "qwen4_exp": Reason("does not build", DEFAULT, "unsupported operand"),
    "t5gemma2": ENCODER,
    "udop": OTHER,
    "unlimited_ocr": Reason("unproven", SMALL, "parameters are too many"),
    "vision-encoder-decoder": OTHER,
}
if installed("5.24"):
    REASONS |= {"inkling2": SEVERAL, "llama4": BROKEN}
for absent in ABSENT:
    REASONS.pop(absent, None)

PROVEN = tuple(sorted(set(NAMES) - set(OWN) - set(REASONS)))
"""Model types of which the generic family must keep all laws."""


def table() -> str:
    """Return the table that docs/models.md shows."""
    rows = {f"all laws hold, through the generic family ({len(PROVEN)})": list(PROVEN)}
    for kind, family in OWN.items():
        rows.setdefault(f"the family `{family}`", []).append(kind)
    for kind, reason in REASONS.items():
        rows.setdefault(f"{reason.kind}: {reason.words}", []).append(kind)
    lines = [
        f"| {words} | {', '.join(f'`{kind}`' for kind in kinds)} |" for words, kinds in rows.items()
    ]
    return "\n".join(["| | model types |", "|---|---|", *lines])
