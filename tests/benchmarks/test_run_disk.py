"""A run whose process dies at any file operation goes on to the same bytes; disks fail in words."""

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs import COUNT, files, go, same_but_origin

import clva_lens as cl
from clva_lens.benchmarks import run_writing
from clva_lens.ground.errors import BenchmarkError
from clva_lens.lens import answering, preparing
from clva_lens.lens.generate import Generation

SCENES = ("begun", "asked again")


def stub(patch, failing=()):
    """Let runs be of canned answers, some of which failed, so that only their files cost time."""

    def answered(model, asked, asking, *, first, **_):
        count = first + len(asked)
        for start in range(first, count, asking.batch_size):
            places = range(start, min(start + asking.batch_size, count))
            failed = [i in failing for i in places]
            texts = ["" if bad else f"yes {i}" for i, bad in zip(places, failed, strict=True)]
            margins = [None if bad else i / 3 for i, bad in zip(places, failed, strict=True)]
            errors = ["away" if bad else None for bad in failed]
            yield Generation(texts, [], margins, 0.0, errors)

    patch.setattr(answering, "generate_batches", answered)
    patch.setattr(preparing, "identity", lambda model: {"weights": "w"})
    patch.setattr(preparing, "machine", lambda model: {})
    patch.setattr(preparing, "origin", lambda: {})
    patch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def canned(monkeypatch):
    stub(monkeypatch)


class Killed(BaseException):
    """The process is gone: nothing catches this, and nothing is written after it."""


class Disk:
    """Counts what is done to files, and ends the process at one of these operations.

    ``how``: "exception" is a full disk, once; "kill" ends it before the operation; "torn" in the
    middle of a write, or after any other operation; "exit" is a real end, without any unwinding.
    """

    def __init__(self, patch, at=-1, how=""):
        self.count, self.at, self.how, self.dead = 0, at, how, False
        self.open = io.open
        for name in ("mkdir", "replace", "unlink", "fsync", "open"):
            patch.setattr(os, name, self.counted(getattr(os, name), writes=name != "open"))
        patch.setattr(io, "open", self.opened)

    def step(self, do, half):
        """Do an operation, unless the process ends at it."""
        if self.dead:
            raise Killed
        self.count += 1
        if self.count - 1 != self.at:
            return do()
        if self.how == "exception":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.how == "exit":
            os._exit(9)
        self.dead = True
        if self.how == "torn":
            half()
        raise Killed

    def counted(self, do, writes):
        def step(*args, **kwargs):
            if not writes and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                return do(*args, **kwargs)
            return self.step(lambda: do(*args, **kwargs), lambda: do(*args, **kwargs))

        return step

    def opened(self, path, mode="r", *args, **kwargs):
        if not set(mode) & set("wa+"):
            return self.open(path, mode, *args, **kwargs)
        return self.step(lambda: File(self, self.open(path, mode, 0)), lambda: None)


class File:
    """A file without a buffer, whose writes may be torn."""

    def __init__(self, disk, file):
        self.disk, self.file = disk, file

    def write(self, content):
        half = content[: len(content) // 2]
        return self.disk.step(lambda: self.file.write(content), lambda: self.file.write(half))

    def truncate(self, size):
        return self.disk.step(lambda: self.file.truncate(size), lambda: self.file.truncate(size))

    def flush(self):
        pass

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def scene(lens, name, folder):
    """Lay out a scene: nothing there yet; or a finished run of which two batches failed, cut."""
    if name == "asked again":
        with pytest.MonkeyPatch.context() as patch:
            stub(patch, failing=(1, 9))
            go(lens, folder)
            answers = folder / "answers.jsonl"
            answers.write_bytes(answers.read_bytes() + b'{"id": "q')


def die(lens, folder, at, how):
    """Run with an end at operation ``at``; return whether it was reached, and the error."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, at, how)
        try:
            go(lens, folder, resume=True)
        except (Killed, BenchmarkError) as error:
            return True, error
    return disk.count > at, None


@pytest.mark.parametrize("how", ["exception", "kill", "torn"])
@pytest.mark.parametrize("name", SCENES)
def test_whatever_operation_a_run_dies_at_it_goes_on_to_the_same_bytes(
    one, tmp_path, canned, name, how
):
    go(one, tmp_path / "whole")
    at, reached, deaths = 0, True, []
    while reached:
        folder = tmp_path / str(at)
        scene(one, name, folder)
        reached, error = die(one, folder, at, how)
        deaths += [error] if error is not None else []
        go(one, folder, resume=True)
        same_but_origin(folder, tmp_path / "whole")
        assert cl.score(folder).metrics["n"] == COUNT
        at += 1
    assert len(deaths) > 20
    if how == "exception":  # filelock tries the disk twice and does not mind
        assert len(deaths) >= at - 3
        assert all("Free some space there" in str(error) for error in deaths)
    else:
        assert len(deaths) == at - 1 and not any(isinstance(d, BenchmarkError) for d in deaths)


FORKS = """
import os, sys
from pathlib import Path
import pytest
sys.path[:0] = sys.argv[2:]
import test_run_disk as it
from tiny_models import lens_of
lens = lens_of("full", "sdpa")
it.stub(pytest.MonkeyPatch())
for at in range(0, 40, 5):
    child = os.fork()
    if not child:
        it.die(lens, Path(sys.argv[1]) / str(at), at, "exit")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_processes_that_really_end_leave_runs_that_go_on(one, tmp_path, canned):
    go(one, tmp_path / "whole")
    here = Path(__file__).parent
    command = [sys.executable, "-c", FORKS, str(tmp_path), str(here), str(here.parent)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    codes = ended.stdout.split()
    assert len(codes) == 8 and codes.count("9") >= 5, ended.stdout
    for at in range(0, 40, 5):
        go(one, tmp_path / str(at), resume=True)
        same_but_origin(tmp_path / str(at), tmp_path / "whole")


# ── disks that fail ──


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("ENOSPC", "Free some space there"),
        ("EDQUOT", "Free some space there"),
        ("EROFS", "Make it writable"),
        ("EACCES", "Make it writable"),
        ("ENAMETOOLONG", "shorter path"),
        ("EIO", "See that the disk is there"),
    ],
)
def test_every_fault_of_the_disk_is_said_in_words(one, tmp_path, canned, code, remedy):
    """Whatever operation fails, from making the folder to the last line of the log."""

    def refused(self, do, half):
        self.count += 1
        if self.count - 1 < self.at:
            return do()
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    for at in (0, 1, 2, 3, 8, 14, 20, 24):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Disk, "step", refused)
            reached, error = die(one, tmp_path / code / str(at), at, "")
        assert reached and isinstance(error, BenchmarkError), at
        assert f"/{code}/{at}' cannot be read or written" in str(error)
        assert remedy in str(error)


@pytest.mark.parametrize("resume", [False, True])
def test_a_path_that_is_too_long_is_said_in_words(one, tmp_path, canned, resume):
    for folder in (tmp_path / ("x" * 300), tmp_path / "file" / "run", tmp_path / ("y/" * 2500)):
        (tmp_path / "file").write_text("")
        with pytest.raises(BenchmarkError, match=r"cannot be read or written .* Pass a|Pass an"):
            go(one, folder, resume=resume)


def read_only(patch):
    """Let every operation that writes fail, as on a disk that is mounted read-only."""

    def refused(self, do, half):
        raise OSError(errno.EROFS, "Read-only file system")

    patch.setattr(Disk, "step", refused)
    Disk(patch)


def test_a_finished_run_is_scored_without_write_access(one, tmp_path, canned, monkeypatch):
    first = go(one, tmp_path / "run")
    stub(monkeypatch, failing=(3,))
    failed = go(one, tmp_path / "failed")
    before = [files(tmp_path / name) for name in ("run", "failed")]
    with pytest.MonkeyPatch.context() as patch:
        read_only(patch)
        assert cl.score(tmp_path / "run").rows == first.rows
        assert cl.score(tmp_path / "run", parser="official").metrics["n"] == COUNT
        assert go(one, tmp_path / "run", resume=True).metrics == first.metrics
        kept = go(one, tmp_path / "failed", resume=True, keep_failed=True)
        assert kept.metrics == failed.metrics
        with pytest.raises(BenchmarkError, match=r"Read-only .* A finished run can be scored as"):
            go(one, tmp_path / "failed", resume=True)
    assert [files(tmp_path / name) for name in ("run", "failed")] == before


def test_nothing_is_written_without_the_lock(one, tmp_path, canned, monkeypatch):
    """Where only the lock may not be opened, as one of another user."""
    stub(monkeypatch, failing=(3,))
    go(one, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    stub(monkeypatch)

    def refused(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run_writing.FileLock, "acquire", refused)
    for folder, resume in ((tmp_path / "run", True), (tmp_path / "new", False)):
        with pytest.raises(BenchmarkError, match=r"Permission denied.*Make it writable"):
            go(one, folder, resume=resume)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert list((tmp_path / "new").iterdir()) == []


def test_a_finished_run_is_left_as_it_is_by_scoring_it_again(one, tmp_path, canned):
    go(one, tmp_path / "run")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}
    go(one, tmp_path / "run", resume=True)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}
    assert after == before


# ── others in the same folder ──


def swapped(run):
    """Put a copy of the folder, as it was one batch ago, in its place."""
    shutil.rmtree(run)
    shutil.copytree(run.with_name("copy"), run)


MEDDLING = {
    "answers gone": lambda run: (run / "answers.jsonl").unlink(),
    "answers cut": lambda run: os.truncate(run / "answers.jsonl", 40),
    "answers longer": lambda run: (run / "answers.jsonl").write_text(
        (run / "answers.jsonl").read_text() + "{}\n"
    ),
    "answers edited": lambda run: (run / "answers.jsonl").write_text(
        (run / "answers.jsonl").read_text().replace("yes", "not")
    ),
    "samples gone": lambda run: (run / "samples.jsonl").unlink(),
    "samples edited": lambda run: (run / "samples.jsonl").write_text(
        (run / "samples.jsonl").read_text().replace("cup", "cap")
    ),
    "record cut": lambda run: os.truncate(run / "run.json", 10),
    "log gone": lambda run: (run / "log.jsonl").unlink(),
    "folder gone": shutil.rmtree,
    "folder swapped": swapped,
    "folder moved": lambda run: run.rename(run.with_name("moved")),
}


@pytest.mark.parametrize("place", [0, 4, 8])
@pytest.mark.parametrize("meddling", MEDDLING)
def test_a_run_that_others_meddle_with_ends_with_an_error(
    one, tmp_path, canned, monkeypatch, meddling, place
):
    """After the first batch, the second or the last."""
    run, write = tmp_path / "run", run_writing.OpenRun.write

    def meddled(self, start, answers):
        if start == place:
            shutil.copytree(run, tmp_path / "copy")
        write(self, start, answers)
        if start == place:
            MEDDLING[meddling](run)

    monkeypatch.setattr(run_writing.OpenRun, "write", meddled)
    with pytest.raises(BenchmarkError, match=r"something else writes to .* restore the folder"):
        go(one, run)
    assert not (run / "score.json").exists()
