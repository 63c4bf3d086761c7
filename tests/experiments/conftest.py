"""A checkout with one small analysis that needs no model, and its first record."""

import os
import shutil
from contextlib import chdir
from unittest.mock import patch

import pytest
from powers import make_checkout

from clva_lens.experiments import notebook as notebooks
from clva_lens.experiments.archive import analyse


@pytest.fixture
def no_kernel(monkeypatch, untyped):
    """Cells run in this process: a kernel would import everything again each time."""

    def execute(notebook, folder, environment, advance):
        names = {"__name__": "__main__", "display": print}
        with chdir(folder), patch.dict(os.environ, environment):
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    try:
                        exec(compile(cell.source, "cell", "exec"), names)
                    except Exception as error:
                        return f"{type(error).__name__}: {error}"
                advance(1)
        return None

    monkeypatch.setattr(notebooks, "execute", execute)


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """A checkout whose analysis was run once. Do not change it: copy it."""
    root = make_checkout(tmp_path_factory.mktemp("experiments") / "first")
    outcome = analyse("01_powers", root=root, progress=False)
    assert outcome.new and outcome.record.id == "01_powers/v1"
    return root


@pytest.fixture
def checkout(first, tmp_path):
    """A copy of that checkout, to change at will."""
    return shutil.copytree(first, tmp_path / "checkout")
