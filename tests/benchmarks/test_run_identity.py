"""What a run is of: its samples and pictures as they were; and what failed is asked again."""

import io
import json
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
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
from clva_lens.ground.batching import batches
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.picture import Picture
from clva_lens.lens import preparing


@dataclass(frozen=True)
class Filed(Small):
    """The same questions about pictures in a folder, two questions a picture."""

    images: str | Path = ""

    def samples(self, limit=None, seed=0):
        found = super().samples(limit, seed)
        return [replace(s, image=Path(self.images) / f"{int(s.group)}.png") for s in found]


def filed(folder):
    """Return the questions about pictures in a new folder."""
    folder.mkdir()
    for i in range(COUNT // 2 + 1):
        Image.fromarray(picture(i)).save(folder / f"{i}.png")
    return Filed(images=folder)


@pytest.fixture
def bench(tmp_path):
    """Pictures that are there."""
    return filed(tmp_path / "pictures")


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


# ── answers ──


def edits(path):
    """Every way to change the answers of a finished run that leaves as many lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    first = json.loads(lines[0])
    for change in ({"text": "no"}, {"margin": 9.0}, {"error": "away"}):
        yield b"".join([json.dumps(first | change).encode() + b"\n", *lines[1:]])
    yield b"".join([lines[1].replace(b"q1", b"q0"), lines[0].replace(b"q0", b"q1"), *lines[2:]])
    yield b"".join(lines).replace(b", ", b",  ", 1)
    yield b"".join([*lines, lines[0]])


def test_answers_that_were_edited_are_neither_scored_nor_continued(one, tmp_path):
    first = go(one, tmp_path / "run")
    path = tmp_path / "run" / "answers.jsonl"
    whole = path.read_bytes()
    for edited in edits(path):
        path.write_bytes(edited)
        said = (
            r"answers\.jsonl was changed after the run was finished: .* Restore the file|one more"
        )
        with pytest.raises(BenchmarkError, match=said):
            cl.score(tmp_path / "run")
        with pytest.raises(BenchmarkError, match=said):
            go(one, tmp_path / "run", resume=True)
        assert path.read_bytes() == edited
    path.write_bytes(whole + b"\0\0")  # a machine that lost power; no line is another
    assert cl.score(tmp_path / "run").rows == first.rows
    assert go(one, tmp_path / "run", resume=True).rows == first.rows
    assert path.read_bytes() == whole


def test_another_version_of_the_benchmark_is_named_and_refused(one, tmp_path, monkeypatch):
    go(one, tmp_path / "run")
    monkeypatch.setattr(Small, "version", "2")
    with pytest.raises(BenchmarkError, match=r"of version 1 of small, but version 2 is installed"):
        cl.score(tmp_path / "run")
    with pytest.raises(BenchmarkError, match="benchmark_version: '1' then, '2' now"):
        go(one, tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["run.json", "score.json"])
@pytest.mark.parametrize("content", ["[1]", "3", "{", "", '"a"', "null", "{}"])
def test_files_of_another_shape_are_said_to_be_damaged(one, tmp_path, name, content):
    go(one, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    if (name, content) == ("score.json", "{}"):  # of before scores told their answers
        assert cl.score(tmp_path / "run").metrics["n"] == COUNT
        return
    for again in (
        lambda: cl.score(tmp_path / "run"),
        lambda: go(one, tmp_path / "run", resume=True),
    ):
        with pytest.raises(BenchmarkError, match=rf"{name} is (damaged|no record of a run)"):
            again()


# ── the model ──


@pytest.fixture
def saved(one, tmp_path):
    """The tiny model in a folder."""
    one.hf_model.save_pretrained(tmp_path / "here")
    one.processor.save_pretrained(tmp_path / "here")
    return tmp_path / "here"


def cut(run):
    """Leave one batch of the answers of a run."""
    lines = (run / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (run / "answers.jsonl").write_bytes(b"".join(lines[:4]))


def test_the_same_weights_elsewhere_go_on_and_other_settings_do_not(saved, tmp_path):
    go(cl.load(saved), tmp_path / "run")
    whole = files(tmp_path / "run")
    there = Path(shutil.copytree(saved, tmp_path / "there"))
    moved = cl.load(there)
    moved.revision = "another commit with the same files"
    cut(tmp_path / "run")
    go(moved, tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == whole
    config = json.loads((there / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] *= 10  # no weight, and no input, knows it
    (there / "config.json").write_text(json.dumps(config))
    with pytest.raises(BenchmarkError, match=r"continued.*\n  configuration: .*\nRun it as then"):
        go(cl.load(there), tmp_path / "run", resume=True)


def test_a_path_decides_where_the_weights_cannot_be_read(one, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "identity", lambda model: {"weights": None})
    go(one, tmp_path / "run")
    monkeypatch.setattr(one, "name", "elsewhere")
    with pytest.raises(BenchmarkError, match=r"\n  model: .* then, 'elsewhere' now\n"):
        go(one, tmp_path / "run", resume=True)


def test_the_record_names_what_prepares_the_pictures(one, tmp_path, monkeypatch):
    go(one, tmp_path / "run")
    packages = json.loads((tmp_path / "run" / "run.json").read_text())["packages"]
    assert packages["image_processor"] == "CLIPImageProcessorPil"
    assert packages["image_backend"] == "pil"
    try:
        installed = version("torchvision")
    except PackageNotFoundError:
        installed = None
    assert packages["torchvision"] == installed
    monkeypatch.setattr(one.images, "__class__", type("Fast", (type(one.images),), {}))
    said = "packages.image_processor: 'CLIPImageProcessorPil' then, 'Fast' now"
    with pytest.raises(BenchmarkError, match=said):
        go(one, tmp_path / "run", resume=True)


# ── what failed ──


@pytest.mark.parametrize(
    "decoding", [cl.Greedy(max_new_tokens=3), cl.Sampling(seed=3, max_new_tokens=3)]
)
def test_what_failed_is_asked_again_as_if_it_had_not(one, tmp_path, monkeypatch, decoding):
    """Samples of the first and the last batch fail, and the run is cut before its last two."""
    from clva_lens.lens import generate

    inner = generate.generate_batch

    def away(model, prompt, place, asking):
        if any(place + row in (1, 10) for row in range(len(prompt.questions))):
            raise OSError("the pictures are away")
        return inner(model, prompt, place, asking)

    whole, run = tmp_path / "whole", tmp_path / "run"
    go(one, whole, decoding=decoding)
    with monkeypatch.context() as patched:
        patched.setattr(generate, "generate_batch", away)
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

    asked = batches(11, 4)
    assert due([], asked, keep_failed=False) == [range(11)]
    assert due(answers(), asked, keep_failed=False) == [range(8, 11)]
    assert due(answers(2), asked, keep_failed=False) == [range(4), range(8, 11)]
    assert due(answers(5), asked, keep_failed=False) == [range(4, 11)]
    assert due(answers(5), batches(8, 4), keep_failed=True) == []


def test_batches_are_whole_groups():
    assert batches(7, 3) == [range(3), range(3, 6), range(6, 7)]
    assert batches(7, 3, "aabbbcc") == [range(2), range(2, 5), range(5, 7)]
    assert batches(6, 4, "aabbcc") == [range(4), range(4, 6)]
    assert batches(6, 2, "aaaaab") == [range(2), range(2, 4), range(4, 6)]
    for size in range(1, 9):
        for groups in ("aabbbbbbbcd", "abcabc", "aaaa"):
            found = batches(len(groups), size, groups)
            assert [place for one in found for place in one] == list(range(len(groups)))
            assert all(0 < len(one) <= size for one in found)


def test_keeping_what_failed_belongs_to_resuming(one, tmp_path):
    with pytest.raises(ParameterError, match=r"keep_failed=True .* without resume=True"):
        go(one, tmp_path / "run", keep_failed=True)
    assert not (tmp_path / "run").exists()
