"""No installer is started: in a fresh interpreter where TransformerLens' own loader starts one.

TransformerLens swallows every ``Exception`` of its installer, so the process is refused with a
``BaseException``, and kept in a list.
"""

import os
import subprocess
import sys

BEGIN = """
import subprocess, sys
import torch  # with CUDA it asks the system for its libraries
started = []
class Started(BaseException): pass
def refuse(self, args, *rest, **options):
    started.append(args)
    raise Started(args)
subprocess.Popen.__init__ = refuse
sys.modules["torchvision"] = None  # import torchvision fails, here and anywhere

import clva_lens as cl
from clva_lens.toy import build
from clva_lens.toy.scenes import render, sample_scenes
# Weights from nowhere: no folder and no Hub id has their processor.
lens = cl.load((build.untrained(0), build.processor()))
"""
OURS = """
bridge = cl.to_transformer_lens(lens)
prompt = bridge.prompt(render(sample_scenes(1, seed=7)[0]), "Is there a cup in the image?")
hooks = cl.CLVA(tau=1).as_hooks(bridge, prompt)
with torch.inference_mode():
    edited = bridge.run_with_hooks(**bridge.inputs(prompt), fwd_hooks=hooks)
assert edited.isfinite().all()
print("started:", started)
"""
THEIRS = """
import copy
from transformer_lens.model_bridge import TransformerBridge
import transformer_lens.model_bridge.sources
lens.hf_model.config.architectures = ["LlavaForConditionalGeneration"]
words = copy.deepcopy(lens.processor.tokenizer)
words.bos_token = None  # it would be read from the Hub again
try:
    TransformerBridge.boot_transformers("nobody/nothing", hf_model=lens.hf_model, tokenizer=words)
except Started:
    pass
print("started:", started)
"""


def run(code, folder):
    # Should a process come through all the same, it finds no package anywhere.
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "UV_NO_INDEX": "1"}
    environment = {**os.environ, **nowhere, "UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    last = done.stdout.strip().splitlines()[-1:]
    assert last and last[0].startswith("started:"), done.stderr
    return last[0]


def test_no_installer_is_started(tmp_path):
    assert run(OURS, tmp_path) == "started: []"


def test_their_loader_would_have_started_one(tmp_path):
    """The same interpreter notices TransformerLens' installer: the test above can fail."""
    assert "'torchvision'" in run(THEIRS, tmp_path)
