"""What ends a run, with nothing lost: pictures that go, lost devices, too many failures."""

import errno
import os
from pathlib import Path

import pytest
import torch
from test_run_identity import filed
from test_runs import COUNT, Small, files, go, same_but_origin

from clva_lens.benchmarks.base import read_answers
from clva_lens.ground.errors import BenchmarkError, ParameterError, PromptError
from clva_lens.lens import generate
from clva_lens.lens.faults import machine_fault
from clva_lens.models import pictures


@pytest.fixture
def bench(tmp_path):
    """Pictures that are there."""
    return filed(tmp_path / "pictures")


def failing(patch, error, from_place=8):
    """Let the model raise an error from a place on."""
    inner = generate.generate_batch

    def broken(model, prompt, place, asking):
        if place >= from_place:
            raise error
        return inner(model, prompt, place, asking)

    patch.setattr(generate, "generate_batch", broken)


def away(path):
    path.rename(path.with_name("away"))


def unreadable(code):
    """Let opening a picture end with an error of the system."""

    def change(patch, path):
        inner = Path.open

        def refused(self, *args, **kwargs):
            if self.suffix == ".png":
                raise OSError(code, os.strerror(code), str(self))
            return inner(self, *args, **kwargs)

        patch.setattr(Path, "open", refused)

    return change


GONE = {
    "one picture": lambda patch, path: away(path / "4.png"),
    "the folder": lambda patch, path: away(path),
    "permission": unreadable(errno.EACCES),
    "the disk": unreadable(errno.EIO),
    "the network": unreadable(errno.ESTALE),
}


@pytest.mark.parametrize("how", GONE)
def test_a_picture_that_was_there_and_is_gone_ends_the_run(one, tmp_path, bench, how):
    """After the second batch, before the third reads its pictures."""
    go(one, tmp_path / "whole", bench)
    with pytest.MonkeyPatch.context() as patch:
        inner = generate.generate_batch

        def then_gone(model, prompt, place, asking):
            made = inner(model, prompt, place, asking)
            if place == 4:
                GONE[how](patch, bench.images)
            return made

        patch.setattr(generate, "generate_batch", then_gone)
        with pytest.raises(BenchmarkError, match=r"could not be read at sample 9 .* resume=True"):
            go(one, tmp_path / "run", bench)
    assert len(read_answers(tmp_path / "run" / "answers.jsonl")) == 8
    for path in tmp_path.rglob("away"):
        path.rename(path.with_name("pictures" if path.is_dir() else "4.png"))
    assert go(one, tmp_path / "run", bench, resume=True).metrics["failed"] == 0
    same_but_origin(tmp_path / "run", tmp_path / "whole")


def test_a_picture_that_is_broken_is_its_own_fault(one, tmp_path, bench):
    """Whatever a decoder makes of it, also seeking to where no file has bytes."""
    whole = (bench.images / "0.png").read_bytes()
    (bench.images / "0.png").write_bytes(whole[: len(whole) // 2])
    (bench.images / "1.png").write_bytes(b"")
    (bench.images / "2.png").write_bytes(b"II*\0\xff\xff\xff\xff")
    assert go(one, tmp_path / "run", bench).metrics["failed"] == 6


LOST = [RuntimeError("CUDA error: unspecified launch failure"), RuntimeError("HIP error: x")]
if hasattr(torch, "AcceleratorError"):
    LOST.append(torch.AcceleratorError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize("error", LOST)
def test_a_lost_device_ends_the_run_and_keeps_the_answers(one, tmp_path, error):
    go(one, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, error)
        with pytest.raises(BenchmarkError, match=r"device was lost at sample 9 .*in a new process"):
            go(one, tmp_path / "run")
    assert len(read_answers(tmp_path / "run" / "answers.jsonl")) == 8
    go(one, tmp_path / "run", resume=True)
    same_but_origin(tmp_path / "run", tmp_path / "whole")


def test_faults_are_told_from_errors():
    def caused(error, cause):
        error.__cause__ = cause
        return error

    hidden = ValueError()
    hidden.__context__ = FileNotFoundError(errno.ENOENT, "looked for, and done without")
    assert machine_fault(hidden) is None
    assert machine_fault(OSError("image file is truncated")) is None
    assert machine_fault(OSError(errno.EINVAL, "Invalid argument")) is None
    assert machine_fault(RuntimeError("shapes do not match")) is None
    assert machine_fault(PromptError("a word")) is None
    gone = OSError(errno.ENOENT, "")
    assert machine_fault(caused(PromptError(), caused(ValueError(), gone))) == "file"
    assert machine_fault(caused(PromptError(), MemoryError())) == "memory"
    with pytest.raises(PromptError, match="no image file") as caught:
        pictures.read_image("no/such.png")
    assert machine_fault(caught.value) == "file"


# ── how many may fail ──


def test_more_failures_than_may_end_the_run_and_nothing_is_lost(one, tmp_path):
    go(one, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, RuntimeError("always"), from_place=0)
        said = r"11 of 11 samples failed, more than max_failed=0\.1 .* RuntimeError: always Mend"
        with pytest.raises(BenchmarkError, match=said):
            go(one, tmp_path / "run")
        assert len(read_answers(tmp_path / "run" / "answers.jsonl")) == COUNT
        with pytest.raises(BenchmarkError, match=said):
            go(one, None)
        assert go(one, tmp_path / "all", max_failed=1.0).metrics["failed"] == COUNT
        kept = go(one, tmp_path / "run", resume=True, keep_failed=True)
        assert kept.metrics["failed"] == COUNT
    go(one, tmp_path / "run", resume=True)
    same_but_origin(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("share", "ends"), [(10 / 11, False), (9 / 11, True), (0.0, True)])
def test_the_share_is_of_all_samples(one, tmp_path, share, ends):
    bench = Small(bad=tuple(range(10)))
    if not ends:
        assert go(one, tmp_path / "run", bench, max_failed=share).metrics["failed"] == 10
        return
    with pytest.raises(BenchmarkError, match="10 of 11 samples failed"):
        go(one, tmp_path / "run", bench, max_failed=share)
    assert not (tmp_path / "run" / "score.json").exists()


def test_a_few_may_fail_whatever_their_share(one, tmp_path):
    assert go(one, None, Small(bad=tuple(range(9))), max_failed=0.0).metrics["failed"] == 9


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "much"])
def test_a_share_is_from_0_to_1(one, tmp_path, untyped, share):
    with pytest.raises(ParameterError, match="max_failed must be"):
        go(one, tmp_path / "run", max_failed=share)
    assert not (tmp_path / "run").exists()


def test_what_may_fail_is_free_when_a_run_goes_on(one, tmp_path):
    go(one, tmp_path / "run", max_failed=1.0)
    before = files(tmp_path / "run")
    go(one, tmp_path / "run", resume=True, max_failed=0.5)
    assert files(tmp_path / "run") == before
