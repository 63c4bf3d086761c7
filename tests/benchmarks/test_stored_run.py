"""A run folder of before the rooms: it scores as it did, and resuming says what differs."""

import json
import shutil
from pathlib import Path

import pytest

import clva_lens as cl
from clva_lens.ground.errors import BenchmarkError

STORED = Path(__file__).parent / "stored_run"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def test_it_scores_as_it_did(folder):
    before = json.loads((STORED / "score.json").read_text(encoding="utf-8"))
    after = cl.score(folder)
    assert after.metrics == before["metrics"]
    assert after.record["benchmark_class"] == "clva_lens.benchmarks.toy_pope.ToyPope"
    assert cl.score(folder, parser="opera").metrics["n"] == 8


def test_resuming_names_what_changed(folder):
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = cl.load("toy-llava")
    options = {"limit": 8, "out": folder, "resume": True, "progress": False}
    with pytest.raises(BenchmarkError, match=r"code"):
        cl.evaluate(model, "pope/toy/adversarial", cl.CLVA(alpha=10), **options)
    assert {name: (folder / name).read_bytes() for name in kept} == kept
