"""Calls and operators that methods add to a pass, which have no noise: ceilings, and by the layer.

They are counted in a process of its own, since the suite's type checks are calls too.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

# Of 32 layers: of Python and C together, and of operators.
CEILINGS = {
    "CLVA": {"prefill": (400, 185), "step": (200, 46)},
    "KnockOut": {"prefill": (220, 71), "step": (130, 12)},
}
SCRIPT = """
import json
from clva_lens.experiments.speed import calls
from clva_lens.experiments.speed.models import random_llava

found = {}
for layers in (16, 32):
    model = random_llava(layers, 16, 4, 36)
    model.set_attn_implementation("sdpa")
    plain = calls.pass_calls(model)
    for name in ("CLVA", "KnockOut"):
        again = calls.pass_calls(model, calls.COUNTED[name])
        for of, one in again.items():
            more = one.less(plain[of])
            found[f"{name} {of} {layers}"] = more.python_and_c, more.operators
            assert more.of("operator") == more.operators > 0
    found[f"none {layers}"] = len(calls.pass_calls(model)["step"].less(plain["step"]))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout)


def test_counts_have_no_noise(found: dict[str, Any]) -> None:
    assert (found["none 16"], found["none 32"]) == (0, 0)


@pytest.mark.parametrize("of", ["prefill", "step"])
@pytest.mark.parametrize("name", ["CLVA", "KnockOut"])
def test_what_a_method_adds(found: dict[str, Any], name: str, of: str) -> None:
    calls, operators = found[f"{name} {of} 32"]
    assert 0 < calls <= CEILINGS[name][of][0]
    assert 0 < operators <= CEILINGS[name][of][1]


@pytest.mark.parametrize("name", ["CLVA", "KnockOut"])
@pytest.mark.parametrize(("of", "each"), [("prefill", 3), ("step", 2)])
def test_layers_that_are_edited_alike_are_asked_once(
    found: dict[str, Any], name: str, of: str, each: int
) -> None:
    """16 layers more, half of which are edited, cost the wrapper's own calls, and no operators."""
    (few, own), (many, others) = (found[f"{name} {of} {layers}"] for layers in (16, 32))
    assert many - few <= 16 * each
    print(f"a layer: {(many - few) / 16} calls, {(others - own) / 16} operators")
