"""A picture that is read once for its questions: the answers, and the record that says so."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from test_runs import Small
from tiny_models import QUESTIONS, lens_of, picture
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.benchmarks.base import Sample, choose
from clva_lens.benchmarks.run_folder import read_run
from clva_lens.ground.errors import BenchmarkError, SpanError
from clva_lens.ground.picture import Picture
from clva_lens.lens import sharing
from clva_lens.lens.sharing import picture_keys, why_unshared

POPE = "pope/toy/adversarial"
METHODS = [None, cl.CLVA(), cl.KnockOut(layers=(5, 6, 7)), cl.PAI()]
METHODS += [cl.VCD(), cl.ICD(), cl.IMCCD(), cl.PAI(guidance=1.5), cl.VisFlow()]


@dataclass(frozen=True)
class Shared(Small):
    """Four random pictures with three questions each."""

    broken: tuple[int, ...] = ()
    version: ClassVar[str] = "1"

    def samples(self, limit=None, seed=0):
        pictures = [picture(i) * (math.nan if i in self.broken else 1) for i in range(4)]
        everything = [
            Sample(f"{i}{j}", one, question, ("yes", "no")[j % 2], group=str(i))
            for i, one in enumerate(pictures)
            for j, question in enumerate(QUESTIONS)
        ]
        return choose(everything, limit, seed)


@pytest.fixture(scope="module")
def toy():
    return cl.load("toy-llava", check=False)


@pytest.fixture(scope="module")
def side_by_side(toy):
    return cl.evaluate(toy, POPE, methods=METHODS, limit=18, batch_size=9, progress=False)


def apart(found, wanted):
    """The largest difference of margins; the answers are the same."""
    assert [row["answer"] for row in found.rows] == [row["answer"] for row in wanted.rows]
    return apart_margins(found, wanted)


def apart_margins(found, wanted):
    pairs = zip(found.rows, wanted.rows, strict=True)
    return max(abs(one["margin"] - other["margin"]) for one, other in pairs)


@pytest.mark.parametrize("place", range(len(METHODS)))
def test_shared_is_unshared(toy, side_by_side, place):
    given = {"limit": 18, "batch_size": 9, "progress": False}
    alone = cl.evaluate(toy, POPE, METHODS[place], share=None, **given)
    error = apart(side_by_side[place], alone)
    print(f"margins differ by {error:.1e}")
    assert error < 1e-4
    assert side_by_side[place].record["share"] == "picture"
    assert "share" not in alone.record


def test_side_by_side_is_one_after_the_other(toy, side_by_side):
    report = cl.evaluate(toy, POPE, METHODS[1], limit=18, batch_size=9, progress=False)
    assert report.rows == side_by_side[1].rows


def test_a_picture_is_read_once_for_all_methods(one, monkeypatch):
    assert why_unshared(one, None) is None
    read, readings = sharing.read, []

    def counted(model, pictures, **options):
        readings.append(len(pictures))
        return read(model, pictures, **options)

    monkeypatch.setattr(sharing, "read", counted)
    cl.evaluate(one, Shared(), methods=[None, cl.KnockOut()], batch_size=6, progress=False)
    assert readings == [2, 2], "two batches of two pictures, whatever the number of methods"


@dataclass(frozen=True)
class Cropped(Shared):
    """What is shown depends on the sample, not on its picture alone."""

    def picture(self, sample):
        return np.roll(sample.image, 9 * int(sample.id[1]), axis=0)


def test_a_picture_that_depends_on_the_sample(one):
    """Samples of one picture that are shown different ones share nothing."""
    found = cl.evaluate(one, Cropped(), batch_size=6, progress=False)
    ask = [(Cropped().picture(s), s.question) for s in Cropped().samples()]
    wanted = cl.generate(one, ask, progress=False).margins
    error = max(abs(row["margin"] - w) for row, w in zip(found.rows, wanted, strict=True))
    plain = cl.evaluate(one, Shared(), batch_size=6, progress=False)
    assert error < 1e-4 < apart_margins(found, plain) / 100
    assert "share" not in found.record


def test_what_pictures_are_known_by(tmp_path):
    """A file benchmark makes a new Picture for each sample: its file, and how it is read."""
    path = tmp_path / "a.png"
    same = [Picture(path), Picture(str(path)), Picture(path, "as stored"), Picture(tmp_path)]
    keys = picture_keys(same)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_who_cannot_share_says_why(one):
    shared, alone = cl.evaluate(
        one, Shared(), methods=[None, cl.MemVR()], batch_size=6, progress=False
    )
    assert shared.record["share"] == "picture"
    assert "share" not in alone.record
    assert "reads or edits rows before the question" in alone.record["unshared"]


def test_a_broken_picture_fails_alone(one):
    given = {"batch_size": 12, "progress": False, "max_failed": 1.0}
    found = cl.evaluate(one, Shared(broken=(1,)), **given)
    whole = cl.evaluate(one, Shared(), share=None, **given)
    failed = [row["error"] is not None for row in found.rows]
    assert failed == [False] * 3 + [True] * 3 + [False] * 6
    pairs = [(a, b) for a, b in zip(found.rows, whole.rows, strict=True) if a["error"] is None]
    assert max(abs(a["margin"] - b["margin"]) for a, b in pairs) < 1e-4


def test_share_decides_resume(one, tmp_path):
    given = {"batch_size": 6, "progress": False, "out": tmp_path / "run"}
    cl.evaluate(one, Shared(), share=None, **given)
    with pytest.raises(BenchmarkError, match="share"):
        cl.evaluate(one, Shared(), resume=True, **given)


def test_pictures_that_no_batch_may_mix(monkeypatch):
    """Unequal pictures go into no batch: the probe takes equal ones, and each is read once."""
    lens, readings = lens_of.__wrapped__("full", "sdpa"), []
    ask, read = lens.prompt, sharing.read

    def unequal(image, question, **options):
        pictures = image if isinstance(image, list) else [image]
        if len({np.asarray(one).tobytes() for one in pictures}) > 1:
            raise SpanError("different numbers of image tokens.")
        return ask(image, question, **options)

    def counted(model, pictures, **options):
        readings.append(len(pictures))
        return read(model, pictures, **options)

    whole = cl.evaluate(lens, Shared(), share=None, batch_size=1, progress=False)
    monkeypatch.setattr(lens, "prompt", unequal)
    assert why_unshared(lens, None) is None
    monkeypatch.setattr(sharing, "read", counted)
    found = cl.evaluate(lens, Shared(), batch_size=6, progress=False)
    assert found.record["share"] == "picture"
    assert apart(found, whole) < 1e-4
    assert readings == [2, 1, 1, 2, 1, 1], "each batch, and then each of its pictures"


def test_what_the_models_code_raises_when_it_is_probed(monkeypatch):
    """A model that ran before runs on: nothing is shared, and the record says why."""
    lens = lens_of.__wrapped__("full", "sdpa")

    def broken(*_):
        raise RuntimeError("no cache of this length")

    monkeypatch.setattr(sharing, "read", broken)
    report = cl.evaluate(lens, Shared(), limit=6, batch_size=6, progress=False)
    assert report.record["unshared"] == "no cache of this length"


def test_what_our_own_code_raises_when_a_model_is_probed(monkeypatch):
    """A bug is no reason to share nothing."""
    lens = lens_of.__wrapped__("full", "sdpa")
    monkeypatch.setattr("clva_lens.lens.prefix.read_beginning", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable") as raised:
        cl.evaluate(lens, Shared(), limit=6, batch_size=6, progress=False)
    assert "share=None (--no-share) asks without" in raised.value.__notes__[0]
    monkeypatch.undo()
    assert why_unshared(lens, None) is None


@pytest.mark.parametrize(("flag", "share"), [("--share", "picture"), ("--no-share", None)])
def test_the_command_line_says(flag, share, tmp_path):
    out = tmp_path / "run"
    command = ["run", "--model", "toy-llava", "--benchmark", POPE, "--limit", "12"]
    result = CliRunner().invoke(app, [*command, "--out", str(out), flag])
    assert result.exit_code == 0, result.output
    assert read_run(out).record.get("share") == share
