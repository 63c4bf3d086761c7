#!/usr/bin/env bash
# MiniMax M3 VL in transformers 5.24.0 decides by the *name* of its attention function whether its
# sparse layers are sparse: "eager" and "sdpa" get the mask of the chosen blocks, any other function
# registered with AttentionInterface gets none, and the layers become dense. There is no error.
# Seen 2026-11-29: transformers' own sdpa under another name, with its own mask, gives other logits.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" -W ignore - <<'PYTHON'
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTextModel

AttentionInterface.register("the_same", sdpa_attention_forward)
AttentionMaskInterface.register("the_same", sdpa_mask)
torch.manual_seed(0)
config = MiniMaxM3VLTextConfig(
    vocab_size=64, bos_token_id=1, eos_token_id=2, hidden_size=32, intermediate_size=64,
    dense_intermediate_size=64,
    shared_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    index_n_heads=2, index_head_dim=8, index_block_size=4, index_topk_blocks=2,
    index_local_blocks=1, max_position_embeddings=256,
    layer_types=["full_attention"] * 2 + ["minimax_m3_sparse"] * 2,
)
model = MiniMaxM3VLTextModel(config).eval()
ids = torch.randint(0, 64, (1, 48), generator=torch.Generator().manual_seed(0))
found = {}
for name in ("eager", "sdpa", "the_same"):
    model.set_attn_implementation(name)
    with torch.inference_mode():
        found[name] = model(input_ids=ids).last_hidden_state
kernel = float((found["eager"] - found["sdpa"]).abs().max())
renamed = float((found["the_same"] - found["sdpa"]).abs().max())
print(f"transformers {transformers.__version__}: eager and sdpa differ by {kernel:.1e}, sdpa and "
      f"the same function under another name by {renamed:.2f} (spread {found['sdpa'].std():.2f})")
assert kernel < 1e-4 and renamed > 0.01, "it behaves otherwise now"
PYTHON
