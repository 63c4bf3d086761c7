"""Compiled answers beside llava's: the script over all families, run for two of them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_family_beside_llava_is_compiled_or_refused() -> None:
    """In a process of its own, since the suite's type checks cannot be traced."""
    command = [sys.executable, "tests/models/real_compiling.py", "qwen2_vl", "blip-2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    qwen, blip = done.stdout.strip().splitlines()
    print(qwen, blip, sep="\n")
    same, error, effect = qwen.split(", error ")[0], *qwen.split(", error ")[1].split(", effect ")
    assert same == "qwen2_vl: the same tokens, 1 graph(s)"
    assert float(error) < 1e-4 < 1 < float(effect)
    assert "refused" in blip and "hands embeddings to a language model" in blip
