"""The README: its Python runs, its commands exist, its tree is the tree."""

import re
from pathlib import Path

import pytest
import torch

import clva_lens
from clva_lens.__main__ import app
from clva_lens.ground.moved import MOVED
from clva_lens.methods.base import METHODS

ROOT = Path(clva_lens.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_python_examples_run_in_order(tmp_path):
    # nnsight reads the source of a with block from a file.
    code = "\n".join(blocks("python"))
    path = tmp_path / "readme_examples.py"
    path.write_text(code, encoding="utf-8")
    names = {}
    try:
        exec(compile(code, str(path), "exec"), names)
        assert "look-harder" in clva_lens.methods()
    finally:
        if "look-harder" in clva_lens.methods():
            METHODS.remove("look-harder")
    assert names["logits"].shape[:2] == names["prompt"]["input_ids"].shape
    with torch.inference_mode(), clva_lens.intervening(names["model"], clva_lens.CLVA()):
        clva = names["model"].hf_model(**names["prompt"]).logits
    # The reader's own method moves the last row, and through CLVA's anchors the other text rows.
    moved = (names["harder"].detach() - clva).abs().amax(dim=2)
    assert moved[0, -1] > 0.01
    assert moved[~names["prompt"].spans.text].max() < 1e-4
    assert names["saliency"].shape == (12, 64)
    assert len(names["clva"].rows) == len(names["greedy"].rows) == 60
    assert names["run"].anchors.positive.shape == (64,)


def test_the_commands_exist():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    groups = {
        group.name: {
            c.name or c.callback.__name__ for c in group.typer_instance.registered_commands
        }
        for group in app.registered_groups
    }
    used = re.findall(r"clva-lens ([a-z-]+)(?: ([a-z]+))?", README)
    assert len(used) >= 5
    for first, second in used:
        assert first in commands or second in groups.get(first, ()), f"{first} {second}"


def test_the_install_commands_are_the_ones_ci_runs():
    assert (
        'pip install -e ".[test]" -c tests/versions.txt && pytest'
        in (ROOT / ".ci" / "run").read_text()
    )
    assert 'pip install -e ".[test]" -c tests/versions.txt && pytest\n' in README
    assert "pip install -e . && clva-lens demo\n" in README


def test_the_tree_names_every_room():
    tree = next(block for block in blocks("") if block.startswith("clva_lens/"))
    for room in (*clva_lens.ROOMS, "__init__.py", "__main__.py"):
        assert f"\n  {room}" in tree, f"{room} is missing from the README's tree"


def test_the_page_on_the_house_lists_what_moved():
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    for old, new in MOVED.items():
        assert f"| `clva_lens.{old}` | `clva_lens.{new}` |" in page
    assert all(f"`{room}`" in page for room in clva_lens.ROOMS)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
