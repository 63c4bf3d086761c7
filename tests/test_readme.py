"""The README: its Python runs, its commands exist, its tree is the tree."""

import re

import pages
import pytest
import torch
from pages import DOCS, ROOT

import clva_lens
from clva_lens.__main__ import app
from clva_lens.ground.moved import MOVED

README = pages.text_of(pages.README)


def blocks(language):
    return pages.blocks(pages.README, language)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_python_examples_run_in_order(tmp_path):
    names = pages.run(pages.README, tmp_path)
    assert names["registered"] == {"look-harder"}
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
    everything = "\n".join(pages.text_of(page) for page in (pages.README, *DOCS))
    used = re.findall(r"clva-lens ([a-z-]+)(?: ([a-z]+))?", everything)
    assert len(used) >= 20
    assert {first for first, _ in used} >= commands - {"figures"}
    for first, second in used:
        assert first in commands or second in groups.get(first, ()), f"{first} {second}"


def test_the_install_commands_are_the_ones_ci_runs():
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    install = 'PIP_NO_COMPILE=0 pip install -e ".[test]" -c tests/versions.txt'
    assert lines.index(install) < lines.index("pytest")
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
