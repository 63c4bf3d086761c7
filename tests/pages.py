"""The README and the pages of docs: their code blocks, run as a reader would run them."""

import functools
import re
from pathlib import Path
from typing import Any

import clva_lens
from clva_lens.methods.base import METHODS

ROOT = Path(clva_lens.__file__).parents[1]
README = "README.md"
DOCS = tuple(sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
COMMUNITY = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
SETTING = """
from dataclasses import replace

import clva_lens as cl
from clva_lens.toy.scenes import render, sample_scenes

model = cl.load("toy-llava")
scene = sample_scenes(1, seed=7)[0]
image = render(scene)
prompt = model.prompt(image, "is there a cup in the image?")
thing = scene.things[0]
rest = replace(scene, things=tuple(one for one in scene.things if one.kind != thing.kind))
question = f"is there a {thing.kind} in the image?"
there, gone = (model.prompt(render(one), question) for one in (scene, rest))
"""
"""What examples in docstrings go on from; docs/api.md shows it."""
_FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    """Return the page as it is written."""
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str) -> list[tuple[str, str]]:
    """Return (language, code) of every block of a page."""
    return _FENCED.findall(text_of(page))


def blocks(page: str, language: str) -> list[str]:
    """Return the blocks in one language."""
    return [code for name, code in fences(page) if name == language]


def prose(page: str) -> str:
    """Return a page without its blocks."""
    return _FENCED.sub("", text_of(page))


@functools.cache
def _load(name: str, kernel: str | None) -> Any:
    options = {} if kernel is None else {"attn_implementation": kernel}
    return _LOAD(name, **options)


_LOAD = clva_lens.load


def load(name: str, attn_implementation: str | None = None) -> Any:
    """``cl.load`` of a toy, once for all pages that a worker runs: no page changes a model."""
    return _load(name, attn_implementation)


def run(page: str, folder: Path) -> dict[str, Any]:
    """Run a page's Python blocks, one after the other, in one namespace, and return that.

    What a page registers is taken out again.
    """
    # nnsight reads the source of a with block from a file.
    path = folder / f"{Path(page).stem}_examples.py"
    path.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    names: dict[str, Any] = {"__name__": path.stem}
    before = set(METHODS.names())
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
        names["registered"] = set(METHODS.names()) - before
    finally:
        for name in set(METHODS.names()) - before:
            METHODS.remove(name)
    return names
