"""A checkout with one small analysis that needs no model, and its first record."""

import shutil

import pytest
from powers import make_checkout

from clva_lens.experiments.archive import analyse


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
