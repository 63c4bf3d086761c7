"""A compiled decoding step: one graph for all tokens, with the numbers of an eager step."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import clva_lens as cl
from clva_lens.ground.errors import ParameterError
from tests.acting import compiled_steps
from tests.acting.compiled_steps import ASKED, METHODS, NEW, lens

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    command = [sys.executable, "-m", compiled_steps.__name__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_one_graph_and_the_same_bits(steps: dict[str, Any]) -> None:
    for name, (method, _) in METHODS.items():
        found = steps[name]
        print(f"{name}: error {found['error']}, effect {found['effect']:.2f}")
        assert (found["graphs"], found["steps"]) == ([1, 1], NEW - 1), name
        assert found["ids"] == found["usual"], name
        assert found["error"] == 0.0, name
        assert method is None or found["effect"] > 0.1, name


def test_prompts_of_other_lengths_share_the_graph(steps: dict[str, Any]) -> None:
    assert steps["shared"][0] == [1, 1]


def test_rows_end_as_ever(steps: dict[str, Any]) -> None:
    compiled, usual = steps["shared"][1]
    assert compiled == usual and len(compiled[0]) <= 2


@pytest.mark.parametrize(
    ("method", "decoding", "reason"),
    [
        (cl.VCD(), None, "no function of tensors"),
        (cl.PAI(guidance=1.1), None, "no function of tensors"),
        (cl.DeCo(), None, "no function of tensors"),
        (cl.compose(cl.CLVA(), cl.MemVR()), None, "no function of tensors"),
        (None, cl.Beam(num_beams=2), "only cl.Greedy"),
        (None, cl.Sampling(), "only cl.Greedy"),
    ],
    ids=["vcd", "guidance", "deco", "memvr", "beam", "sampling"],
)
def test_what_cannot_be_compiled_is_refused(method: Any, decoding: Any, reason: str) -> None:
    with pytest.raises(ParameterError, match=f"{reason}.*compiled=False"):
        cl.generate(lens(), ASKED, method, decoding, compiled=True)


def test_a_prefix_is_refused() -> None:
    prefix = cl.read(lens(), ASKED[0][0])
    with pytest.raises(ParameterError, match=r"prefix.*compiled=False"):
        cl.generate(lens(), (prefix, ASKED[0][1]), compiled=True)
