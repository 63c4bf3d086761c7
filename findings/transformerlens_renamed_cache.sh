#!/usr/bin/env bash
# TransformerLens 4.3.0 beside transformers 5.24.0, which it allows: its attention looks for the
# key-value cache under a name that transformers no longer uses, so a bridge given the cache of a
# prompt reads the newest token alone. There is no error, and the logits are another model's.
# Seen 2026-11-29, torch 2.13.0 (CPU): cached and whole logits differ by 0.18 (they spread by 0.11);
# transformers' own model differs by 3e-8.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 transformer-lens==4.3.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)
plain = LlamaForCausalLM(config).eval()
twin = LlamaForCausalLM(config).eval()
twin.load_state_dict(plain.state_dict())
bridge = build_bridge_from_module(twin, "LlamaForCausalLM", hf_config=config, model_name="tiny")
ids = torch.tensor([[5, 9, 17, 33, 8, 21]])


def apart(model):
    """How far the last token's logits are from those of the whole text read at once."""
    with torch.inference_mode():
        whole = model(ids).logits[0, -1]
        first = model(ids[:, :-1], use_cache=True)
        cached = model(ids[:, -1:], cache=first.cache, use_cache=True).logits[0, -1]
    return float((cached - whole).abs().max()), float(whole.std())


theirs, spread = apart(plain)
lens, _ = apart(bridge.original_model)
print(f"transformers {version('transformers')}, transformer-lens {version('transformer-lens')}: "
      f"{theirs:.1e} apart by itself, {lens:.2f} in a bridge (spread {spread:.2f})")
assert theirs < 1e-5 and lens > spread / 4, "it behaves otherwise now"
PYTHON
