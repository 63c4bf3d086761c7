#!/usr/bin/env bash
# nnsight 0.8.1 takes a package that was installed with `pip install -e` (by hatchling: a .pth file;
# its distribution has a dash where the module has an underscore) for a user's own file, and sends it
# by value with remote=. A ContextVar of a module, or anything else that cannot be pickled, then ends
# the trace: what works where the package is installed fails for who develops it.
# Seen 2026-11-30, torch 2.13.0 (CPU): cannot pickle '_contextvars.ContextVar' object.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 nnsight==0.8.1 hatchling editables
mkdir -p "$place/project/acting_lens"
cat >"$place/project/pyproject.toml" <<'TOML'
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "acting-lens"
version = "1"
TOML
cat >"$place/project/acting_lens/__init__.py" <<'PYTHON'
from contextvars import ContextVar

FACTOR = ContextVar("FACTOR", default=2.0)


def doubled(x):
    return x * FACTOR.get()
PYTHON
cat >"$place/traced.py" <<'PYTHON'
import sys
from importlib.metadata import version

import acting_lens
import torch
from nnsight import TransformersModel
from nnsight.intervention.backends import local
from nnsight.ndif import get_local_env
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

local._SERVER_MODULES |= {"acting_lens"}  # the server has it installed
how = sys.argv[1]
config = LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
words = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a"
)
model = TransformersModel(LlamaForCausalLM(config).eval(), tokenizer=words)
found = str(get_local_env()["packages"].get("acting_lens"))
said = "it passes"
try:
    with model.trace({"input_ids": torch.tensor([[5, 9, 17]])}, remote="local"):
        out = acting_lens.doubled(model.output.logits).save()
except TypeError as error:
    said = str(error).splitlines()[0]
print(f"nnsight {version('nnsight')}, {how}: {found}; {said}")
editable = how == "pip install -e"
assert (found == "local") == editable, "it tells them apart otherwise now"
assert ("ContextVar" in said) == editable, "it behaves otherwise now"
PYTHON
cd "$place"
for how in "install -e" "install"; do
    # shellcheck disable=SC2086
    "$place/env/bin/pip" ${how/install/install --quiet --no-build-isolation --no-deps} "$place/project"
    HF_HUB_OFFLINE=1 "$place/env/bin/python" -W ignore "$place/traced.py" "pip $how"
    "$place/env/bin/pip" uninstall --quiet --yes acting-lens
done
