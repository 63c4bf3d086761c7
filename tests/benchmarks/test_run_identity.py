"""What a run is of: its samples and pictures as they were; and what failed is asked again."""

import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_runs import COUNT, Small, files, go, same_but_origin
from tiny_models import picture

import clva_lens as cl
from clva_lens.benchmarks import run_writing
from clva_lens.benchmarks.base import Answer, Sample
from clva_lens.benchmarks.run_answers import due
from clva_lens.benchmarks.sample_rows import as_rows
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.picture import Picture


@dataclass(frozen=True)
class Filed(Small):
    """The same questions about pictures in a folder, two questions a picture."""

    images: str | Path = ""

    def samples(self, limit=None, seed=0):
        found = super().samples(limit, seed)
        return [replace(s, image=Path(self.images) / f"{int(s.group)}.png") for s in found]


@pytest.fixture
def bench(tmp_path):
    """Pictures that are there."""
    (tmp_path / "pictures").mkdir()
    for i in range(COUNT // 2 + 1):
        Image.fromarray(picture(i)).save(tmp_path / "pictures" / f"{i}.png")
    return Filed(images=tmp_path / "pictures")


# ── samples and pictures ──


@pytest.mark.parametrize("edit", [lambda t: t.replace('"yes"', '"no"'), lambda t: t[: len(t) // 2]])
def test_samples_that_were_edited_are_neither_scored_nor_continued(one, tmp_path, edit):
    go(one, tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    path.write_text(edit(path.read_text()))
    said = r"samples\.jsonl was changed after the run began: .* Restore the file"
    with pytest.raises(BenchmarkError, match=said):
        cl.score(tmp_path / "run")
    with pytest.raises(BenchmarkError, match=said):
        go(one, tmp_path / "run", resume=True)


def test_a_run_knows_its_pictures_wherever_they_lie(one, tmp_path, bench):
    go(one, tmp_path / "run", bench)
    before = files(tmp_path / "run")
    moved = Filed(images=shutil.move(bench.images, tmp_path / "elsewhere"))
    go(one, tmp_path / "run", moved, resume=True)
    assert files(tmp_path / "run")["answers.jsonl"] == before["answers.jsonl"]
    Image.fromarray(picture(99)).save(moved.images / "1.png")
    said = r"pictures: 2 of 11 samples show another one now \('q2', 'q3'\)"
    with pytest.raises(BenchmarkError, match=said):
        go(one, tmp_path / "run", moved, resume=True)
    assert files(tmp_path / "run")["answers.jsonl"] == before["answers.jsonl"]


def kinds(i):
    """One picture in every kind that a sample may hold it in."""
    pixels = picture(i)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {
        "array": pixels,
        "floats": pixels / np.float32(255),
        "tensor": torch.from_numpy(pixels.copy()).bfloat16() / 255,
        "image": Image.fromarray(pixels),
        "palette": Image.fromarray(pixels).quantize(4),
        "bytes": file.getvalue(),
        "file": io.BytesIO(file.getvalue()),
        "undecoded": Image.open(io.BytesIO(file.getvalue())),
        "read otherwise": Picture(pixels, "as stored"),
    }


def told(image):
    return as_rows([Sample("a", image, "", "yes")])[0]["picture"]


@pytest.mark.parametrize("kind", kinds(0))
def test_pictures_of_every_kind_are_told_apart(kind):
    first, same, other = kinds(0)[kind], kinds(0)[kind], kinds(1)[kind]
    digest = told(first)
    assert isinstance(digest, str)
    assert told(first) == told(same) == digest != told(other)


def test_an_opened_picture_is_told_undecoded_as_decoded_and_stays_as_it_was():
    image = kinds(0)["undecoded"]
    digest = told(image)
    assert image.fp is not None
    image.load()
    assert told(image) == digest


@pytest.mark.parametrize("image", [None, Image.new("P", (2, 2)).getexif(), np.array([object()])])
def test_what_is_no_picture_has_no_digest(image):
    assert told(image) is None


def test_a_file_is_read_once_whatever_the_number_of_questions(bench, monkeypatch):
    from clva_lens.benchmarks import sample_rows

    read, inner = [], sample_rows.sha256
    monkeypatch.setattr(sample_rows, "sha256", lambda path: read.append(path) or inner(path))
    as_rows(bench.samples())
    assert len(read) == len(set(read)) == COUNT // 2 + 1
    with pytest.raises(BenchmarkError, match=r"gone\.png' cannot be read .* Check that it is"):
        told("gone.png")


# ── what failed ──


@pytest.mark.parametrize(
    "decoding", [cl.Greedy(max_new_tokens=3), cl.Sampling(seed=3, max_new_tokens=3)]
)
def test_what_failed_is_asked_again_as_if_it_had_not(one, tmp_path, monkeypatch, decoding):
    """Samples of the first and the last batch fail, and the run is cut before its last two."""
    from clva_lens.lens import generate

    inner = generate._generate_batch

    def away(model, prompt, place, asking):
        if any(place + row in (1, 10) for row in range(len(prompt.questions))):
            raise OSError("the pictures are away")
        return inner(model, prompt, place, asking)

    whole, run = tmp_path / "whole", tmp_path / "run"
    go(one, whole, decoding=decoding)
    with monkeypatch.context() as patched:
        patched.setattr(generate, "_generate_batch", away)
        assert go(one, run, decoding=decoding).metrics["failed"] == 2
    failed = files(run)
    kept = go(one, run, decoding=decoding, resume=True, keep_failed=True)
    assert kept.metrics["failed"] == 2
    assert files(run) == failed
    for lines in (COUNT, 8, 5):
        content = failed["answers.jsonl"].splitlines(keepends=True)
        (run / "answers.jsonl").write_bytes(b"".join(content[:lines]))
        assert go(one, run, decoding=decoding, resume=True).metrics["failed"] == 0
        same_but_origin(run, whole)


def test_a_kill_between_two_batches_that_are_asked_again_loses_nothing(one, tmp_path, monkeypatch):
    bench, run = Small(long=(1, 9)), tmp_path / "run"
    go(one, run, bench)
    before = files(run)
    write = run_writing.OpenRun.write

    def stop(self, place, answers):
        write(self, place, answers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_writing.OpenRun, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            go(one, run, bench, resume=True)
    assert files(run) == before
    assert go(one, run, bench, resume=True).metrics["failed"] == 2
    assert files(run) == before


def test_due_are_whole_batches():
    def answers(*failed):
        return [Answer(str(i), "", None, "away" if i in failed else None) for i in range(8)]

    assert due([], 11, 4, keep_failed=False) == [range(11)]
    assert due(answers(), 11, 4, keep_failed=False) == [range(8, 11)]
    assert due(answers(2), 11, 4, keep_failed=False) == [range(4), range(8, 11)]
    assert due(answers(5), 11, 4, keep_failed=False) == [range(4, 11)]
    assert due(answers(5), 8, 4, keep_failed=True) == []


def test_keeping_what_failed_belongs_to_resuming(one, tmp_path):
    with pytest.raises(ParameterError, match=r"keep_failed=True .* without resume=True"):
        go(one, tmp_path / "run", keep_failed=True)
    assert not (tmp_path / "run").exists()
