"""Examples in docstrings: every public name has one, and all that the package has are run."""

import doctest
import importlib
import inspect
import re

import numpy as np
import pages
import pytest
import torch
from pages import ROOT

import clva_lens as cl

FILES = tuple(
    sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "clva_lens").rglob("*.py")
        if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
)
# They need a trace (nnsight reads a block's source from a file), a checkout or a registry that is
# left as it was; the pages of docs run the same calls.
SHOWN = ("ClvaLensError", "PatchActivations", "intervene", "observe", "open_record")
SHOWN += ("register_method",)


@pytest.mark.parametrize("name", cl.__all__)
def test_a_public_name_has_an_example(name):
    text = inspect.getdoc(getattr(cl, name)) or ""
    run = ">>> " in text
    assert run != (name in SHOWN), "take it out of SHOWN" if run else "add an example"
    assert run or "Example::\n\n    " in text
    assert f"cl.{name}" in text or name in ("classify_heads", "HeadClasses", "VisualAnchors")


def module_of(file):
    parts = file.removesuffix(".py").split("/")
    return importlib.import_module(".".join(p for p in parts if p != "__init__"))


@pytest.fixture
def setting(monkeypatch):
    """What examples go on from, with each toy loaded once."""
    monkeypatch.setattr(cl, "load", pages.load)
    names = {}
    exec(pages.SETTING, names)
    return names


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("file", FILES)
def test_the_examples_run(file, setting, capsys):
    module = module_of(file)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    finder = doctest.DocTestFinder(exclude_empty=True)
    given = {"np": np, "torch": torch, **setting}
    found = finder.find(module, module.__name__, module, extraglobs=given)
    for one in found:
        runner.run(one)
    result = runner.summarize(verbose=False)
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted > 0


def test_the_reference_shows_what_examples_go_on_from():
    assert pages.SETTING.strip() in pages.blocks("docs/api.md", "python")[0]
    assert len(FILES) > 40
