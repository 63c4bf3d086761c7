#!/usr/bin/env bash
# Aya Vision in transformers 5.24.0 leaves out the factor that its language model has on the logits
# (Cohere2's logit_scale, 0.0625 by default): the text model alone applies it, the model around it
# does not. Greedy answers are the same; probabilities, sampling, margins and entropies are not.
# Seen 2026-11-29: logits 16 times those of Cohere2ForCausalLM with the same weights, to rounding.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" -W ignore - <<'PYTHON'
import torch
import transformers
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Cohere2ForCausalLM,
    SiglipVisionConfig,
)

torch.manual_seed(0)
text = Cohere2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)
vision = SiglipVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
    patch_size=8,
)
seeing = AyaVisionForConditionalGeneration(
    AyaVisionConfig(text_config=text, vision_config=vision, image_token_index=5)
).eval()
reading = Cohere2ForCausalLM(text).eval()
reading.model.load_state_dict(seeing.model.language_model.state_dict())
reading.lm_head.load_state_dict(seeing.lm_head.state_dict())
ids = torch.randint(10, 64, (1, 12), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    with_picture, alone = (model(input_ids=ids).logits for model in (seeing, reading))
factor = (with_picture / alone)[..., 1:]  # the first token is padding, whose logit is 0
print(f"transformers {transformers.__version__}: logit_scale is {text.logit_scale}; logits of Aya "
      f"Vision are {factor.median():.2f} times those of its text model")
assert abs(float(factor.median()) - 1 / text.logit_scale) < 1e-2, "it behaves otherwise now"
PYTHON
