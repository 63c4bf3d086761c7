#!/usr/bin/env bash
# InstructBLIP (transformers 5.23.0) generates by the generation_config of its language model: what is
# set on the model's own generation_config, the one that generate() reads in every other model and
# that generation_config.json fills, is ignored without a word.
# Seen 2026-11-28, torch 2.13.0 (CPU): with max_new_tokens=2 on the model, 20 tokens; with it on the
# language model, 2.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
torch.manual_seed(0)
model = InstructBlipForConditionalGeneration(
    InstructBlipConfig(
        vision_config={**small, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "vocab_size": 50, "encoder_hidden_size": 32},
        text_config={**small, "model_type": "llama", "vocab_size": 60, "num_key_value_heads": 4},
        num_query_tokens=4,
        image_token_index=59,
    )
).eval()
question = {
    "pixel_values": torch.randn(1, 3, 28, 28),
    "qformer_input_ids": torch.tensor([[5, 6]]),
    "qformer_attention_mask": torch.ones(1, 2, dtype=torch.long),
    "input_ids": torch.tensor([[59, 59, 59, 59, 5, 6]]),
    "attention_mask": torch.ones(1, 6, dtype=torch.long),
}


def generated():
    ends = {"eos_token_id": None, "pad_token_id": 0}
    for one in (model, model.language_model):
        for name, value in ends.items():
            setattr(one.generation_config, name, value)
    return model.generate(**question, do_sample=False).shape[1] - question["input_ids"].shape[1]


unset = generated()
model.generation_config.max_new_tokens = 2
outer = generated()
model.generation_config.max_new_tokens = None
model.language_model.generation_config.max_new_tokens = 2
inner = generated()
print(f"transformers {transformers.__version__}: {unset} tokens without a setting, {outer} with "
      f"max_new_tokens=2 on the model, {inner} with it on the language model")
assert outer == unset > 2 and inner == 2, "transformers behaves otherwise now"
PYTHON
