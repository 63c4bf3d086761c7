"""Importing costs next to nothing, rooms and public functions share their names, old paths hold."""

import importlib
import json
import subprocess
import sys

import pytest

import clva_lens as cl
from clva_lens.ground.moved import MOVED


def fresh(code):
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = ("torch", "transformers", "nnsight", "transformer_lens", "matplotlib", "scipy", "pyarrow")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["reproduce", "--help"],
        ["records"],
        ["verify"],
        ["diff", "03_drift", "v1", "v2"],
    ],
)
def test_commands_about_records_load_nothing_heavy(arguments):
    code = (
        "import json, sys\n"
        "from clva_lens.__main__ import app\n"
        f"status = 0\ntry:\n    app({arguments!r})\n"
        "except SystemExit as end:\n    status = end.code\n"
        f"print(json.dumps([status, sorted(set({HEAVY!r}) & set(sys.modules))]))"
    )
    assert fresh(code) == [0, []]


def test_importing_the_package_loads_nothing_heavy():
    code = "import json, sys, clva_lens as cl\n"
    code += f"print(json.dumps([sorted(set({HEAVY!r}) & set(sys.modules)), dir(cl)]))"
    loaded, names = fresh(code)
    assert loaded == []
    assert set(cl.__all__) <= set(names)


NOT_FOR_A_LLAVA = ("transformer_lens", "wandb", "datasets", "clva_lens.models.qwen")


def test_loading_and_generating_import_no_more_than_they_use():
    code = f"""
import json, sys
from PIL import Image
import clva_lens as cl
lens = cl.load("toy-llava")
cl.generate(lens, (Image.new("RGB", (48, 48)), "is there a cup ?"), cl.CLVA(), progress=False)
print(json.dumps(sorted(set({NOT_FOR_A_LLAVA!r}) & set(sys.modules))))
"""
    assert fresh(code) == []


INNER = {"benchmarks": "parsers", "methods": "clva", "figures": "heads", "models": "llava"}


def test_a_room_and_the_names_in_it():
    """Whichever comes first: the function is called, and the package imported."""
    code = f"""
import importlib, json, sys
import clva_lens as cl
told = {{}}
for place, (room, inner) in enumerate({INNER!r}.items()):
    if place % 2:
        getattr(cl, room)()
    exec(f"import clva_lens.{{room}}.{{inner}} as one; import clva_lens.{{room}}.{{inner}}")
    assert getattr(getattr(clva_lens, room), inner) is one
    told[room] = getattr(cl, room)()
print(json.dumps(told))
"""
    assert fresh(code) == {room: list(getattr(cl, room)()) for room in cl.REGISTRIES}
    assert set(INNER) == set(cl.REGISTRIES)


def test_old_paths_still_import():
    for old, new in MOVED.items():
        before, after = (importlib.import_module(f"clva_lens.{name}") for name in (old, new))
        names = [name for name in vars(after) if not name.startswith("__")]
        assert names and all(getattr(before, n) is getattr(after, n) for n in names), old


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cl.no_such_name
