"""Shards of a run: whole batches asked apart, joined to the bytes of a run that was not cut."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pages
import pytest
import yaml
from test_run_disk import Disk, Killed, stub
from test_runs import COUNT, Small, files
from test_runs_cli import run

from clva_lens.benchmarks.merging import merge
from clva_lens.benchmarks.run_folder import read_run
from clva_lens.benchmarks.shards import Shard, parse_shard
from clva_lens.ground.batching import batches
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.lens.asking import Asking
from clva_lens.lens.evaluate import run_benchmark, run_shard

ASKING = Asking(batch_size=2, share="picture")


@pytest.fixture
def canned(monkeypatch):
    stub(monkeypatch)


@pytest.fixture
def loaded(monkeypatch):
    """The command line loads each toy once."""
    monkeypatch.setattr("clva_lens.lens.load.load", lambda name, **_: pages.load(name))


def whole(lens, out, **options):
    return run_benchmark(lens, Small(), ASKING, out=out, progress=False, **options)


def shard(lens, out, number, of, resume=False, asking=ASKING, **options):
    part = Shard(number, of)
    return run_shard(lens, Small(), asking, part, out, resume=resume, progress=False, **options)


@pytest.fixture
def cut(one, tmp_path, canned):
    """A run, and the same in three shards that were not merged."""
    whole(one, tmp_path / "whole")
    for number in (3, 1, 2):
        shard(one, tmp_path / "cut", number, 3)
    return tmp_path / "cut"


@pytest.mark.parametrize("of", [1, 2, 3, 6, 20])
def test_shards_are_whole_batches_each_once(of):
    every = batches(11, 4, [i // 3 for i in range(11)])
    parts = [Shard(n, of).part(every) for n in range(1, of + 1)]
    assert [batch for part in parts for batch in part] == every
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for text in ("0/3", "4/3", "3", "a/b", "1/-2"):
        with pytest.raises(ParameterError, match=r"there is no shard|is no shard"):
            parse_shard(text)
    assert parse_shard("2/3") == Shard(2, 3)


@pytest.mark.parametrize("of", [1, 3, 20])
def test_merged_shards_are_the_run_to_the_byte(one, tmp_path, canned, of):
    report = whole(one, tmp_path / "whole")
    for number in range(of, 0, -1):
        shard(one, tmp_path / "cut", number, of)
    merged = merge(tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(set(merged.score.metrics)) > 5 and merged.rows == report.rows
    assert read_run(tmp_path / "cut").answers == read_run(tmp_path / "whole").answers
    before = (tmp_path / "cut" / "log.jsonl").read_bytes()
    assert json.loads(before)["event"] == "merged"
    merge(tmp_path / "cut")
    whole(one, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == before


def test_real_answers_too_by_the_command_line(tmp_path, loaded):
    """Batches of the toy are two pictures with six questions each."""
    asked = ("run", "--benchmark", "pope/toy/adversarial", "--limit", 36, "--method", "clva")
    run(*asked, "--out", tmp_path / "whole")
    for number in (1, 2):
        said = run(*asked, "--out", tmp_path / "cut", "--shard", f"{number}/2")
        assert f"shards/{number} is finished. When all 2 are: clva-lens merge" in said
    assert "pope/toy/adversarial · toy-llava · clva" in run("merge", tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    margins = [answer.margin for answer in read_run(tmp_path / "cut").answers]
    assert len(set(margins)) > 30


# ── killed, asked again ──


@pytest.mark.parametrize("how", ["exception", "kill", "torn"])
def test_whatever_operation_it_dies_at_it_goes_on_to_the_same_bytes(one, tmp_path, canned, how):
    whole(one, tmp_path / "whole")
    shard(one, tmp_path / "begun", 2, 2)
    at, reached = 0, True
    while reached:
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "begun", folder)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, how)
            try:
                shard(one, folder, 1, 2, resume=True)
                merge(folder)
            except (Killed, BenchmarkError):
                pass
        reached = disk.count > at
        shard(one, folder, 1, 2, resume=True)
        merge(folder)
        assert files(folder) == files(tmp_path / "whole"), at
        at += 1
    assert at > 20


def test_failed_samples_are_asked_again_in_their_shard(one, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        stub(patch, failing=(1, 9))
        for number in (1, 2, 3):
            shard(one, tmp_path / "cut", number, 3)
    stub(monkeypatch)
    assert merge(tmp_path / "cut").metrics["failed"] == 2
    whole(one, tmp_path / "whole")
    for number in (1, 2, 3):
        shard(one, tmp_path / "cut", number, 3, resume=True)
    assert merge(tmp_path / "cut").metrics["failed"] == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_shard_ends_by_the_share_of_its_own_samples(one, tmp_path, monkeypatch):
    stub(monkeypatch, failing=range(COUNT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clva_lens.lens.answering.FEW", 2)
        with pytest.raises(
            BenchmarkError, match=r"2 of 4 samples failed, more than max_failed=0.4"
        ):
            shard(one, tmp_path / "cut", 1, 3, max_failed=0.4)


# ── what is refused ──


def test_missing_and_doubled_shards_are_named(one, cut, canned, tmp_path):
    shards = cut / "shards"
    shutil.move(shards / "2", tmp_path / "kept")
    with pytest.raises(BenchmarkError, match=r"1 of the 3 shards .* missing: 2\. .*--shard 2/3"):
        merge(cut)
    shutil.copytree(tmp_path / "kept", shards / "2 (from node 7)")
    merge(cut)
    shutil.copytree(tmp_path / "kept", shards / "2")
    with pytest.raises(BenchmarkError, match=r"shard 2/3 is there 2 times: .*/2', .*node 7\)'"):
        merge(cut)
    shutil.rmtree(shards / "2 (from node 7)")
    with pytest.raises(BenchmarkError, match=r"'.*shards/2' holds shard 2/3, and shard 2/4 is to"):
        shard(one, cut, 2, 4, resume=True)
    shard(one, cut, 4, 4)
    with pytest.raises(BenchmarkError, match=r"cut in 2 ways: there are shards 1, 2, 3 of 3; 4 of"):
        merge(cut)
    with pytest.raises(BenchmarkError, match="holds no shards"):
        merge(tmp_path / "whole")


def test_unfinished_and_edited_shards_are_named(one, cut, canned):
    path = cut / "shards" / "2" / "answers.jsonl"
    told = path.read_text()
    path.write_text(told.replace("yes 4", "no 4"))
    for again in (lambda: merge(cut), lambda: shard(one, cut, 2, 3, resume=True)):
        with pytest.raises(BenchmarkError, match="was changed after shard 2/3 was finished"):
            again()
    path.write_text(told)
    document = cut / "shards" / "2" / "shard.json"
    begun = {**json.loads(document.read_text()), "answers_sha256": None}
    document.write_text(json.dumps(begun))
    with pytest.raises(
        BenchmarkError, match=r"1 of the 3 shards .* not finished: 2/3\. .*--resume"
    ):
        merge(cut)
    document.write_text("{")
    with pytest.raises(BenchmarkError, match=r"shard\.json is damaged"):
        merge(cut)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record["method"].update(name="clva"), r"method\.name: 'none' in .*'clva'"),
        (lambda record: record.update(weights="v"), r"weights: 'w' in '.*/1', 'v' in '.*/2'"),
        (lambda record: record.update(packages={"torch": "1"}), r"packages\.torch: 'nothing' in"),
    ],
)
def test_shards_of_another_run_are_refused_by_what_differs(cut, change, said):
    path = cut / "shards" / "2" / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(BenchmarkError, match=f"are not of one run:\n  {said}"):
        merge(cut)
    assert not (cut / "run.json").exists()


def test_a_folder_is_cut_or_whole(one, cut, canned, tmp_path):
    with pytest.raises(BenchmarkError, match=r"holds shards of a run\. Join them with"):
        whole(one, cut, resume=True)
    with pytest.raises(BenchmarkError, match=r"was not cut into shards\. Continue it without"):
        shard(one, tmp_path / "whole", 1, 3, resume=True)
    with pytest.raises(BenchmarkError, match=r"holds a run\. Pass resume=True"):
        shard(one, cut, 1, 3)


# ── the scripts of the page, as far as a shell runs them ──


def ran(script, folder, **environment):
    """Run a script with a command that only says what it was called with; return these words."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    command = bin / "clva-lens"
    command.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    path = {"PATH": f"{bin}:/usr/bin:/bin", **environment}
    done = subprocess.run(
        ["bash", "-c", script], env=path, cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def block(start):
    return next(one for one in pages.blocks("docs/scale.md", "text") if one.startswith(start))


def asks(words, folder):
    """Ask what a script asks, of a toy, in the folder."""
    changed = {"--benchmark": "pope/toy/random", "--model": "toy-llava", "--out": folder}
    changed |= {"--device": "cpu", "--dtype": "float32"}
    pairs = dict(zip(words[1:-1:2], words[2:-1:2], strict=True))
    assert words[0] == "run" and words[-1] == "--resume" and set(changed) <= set(pairs)
    options = [word for pair in {**pairs, **changed, "--limit": 12}.items() for word in pair]
    return ("run", *options, "--resume")


def test_the_slurm_script(tmp_path, loaded):
    script = block("#!/bin/bash")
    assert "#SBATCH --array=1-8" in script and "SHARDS=8" in script
    for task in (3, 8):
        words = ran(script, tmp_path, SLURM_ARRAY_TASK_ID=str(task))
        assert words[words.index("--shard") + 1] == f"{task}/8"
    subprocess.run(["bash", "-n", "-c", script], check=True)
    run(*asks(words, tmp_path / "run"))
    with pytest.raises(BenchmarkError, match=r"7 of the 8 shards .* missing: 1, 2, 3, 4, 5, 6, 7"):
        merge(tmp_path / "run")


TOYS = """#!/bin/bash
set -- "${@/pope\\/coco/pope/toy}"
set -- "${@/llava-hf\\/llava-1.5-7b-hf/toy-llava}"
set -- "${@/cuda/cpu}"
set -- "${@/float16/float32}"
exec %s -m clva_lens "$@" --limit 192 --batch-size 6
"""


def test_a_task_of_the_slurm_script_that_is_killed_and_requeued(tmp_path, loaded):
    """The page's script itself, of a toy; the other seven tasks are asked here, to be quicker."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "clva-lens"
    command.write_text(TOYS % sys.executable)
    command.chmod(0o755)
    path = {"PATH": f"{command.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    options = {"env": {**os.environ, **path}, "cwd": tmp_path, "start_new_session": True}
    script, out = ["bash", "-c", block("#!/bin/bash")], tmp_path / "runs" / "clva"
    asked = ("run", "--benchmark", "pope/toy/adversarial", "--method", "clva", "--limit", 192)
    asked = (*asked, "--batch-size", 6, "--device", "cpu", "--dtype", "float32")
    for task in (8, 7, 6, 5, 4, 2, 1):
        run(*asked, "--out", out, "--shard", f"{task}/8")
    with pytest.raises(BenchmarkError, match=r"1 of the 8 shards .* missing: 3\."):
        merge(out)
    answers = out / "shards" / "3" / "answers.jsonl"
    first = subprocess.Popen(script, **options, stderr=subprocess.PIPE)
    while first.poll() is None and not (answers.exists() and answers.stat().st_size):
        time.sleep(0.005)
    assert first.poll() is None, first.communicate()
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert 0 < answers.read_bytes().count(b"\n") < 24
    with pytest.raises(BenchmarkError, match=r"1 of the 8 shards .* not finished: 3/8"):
        merge(out)
    subprocess.run(script, **options, check=True, capture_output=True)
    log = (answers.parent / "log.jsonl").read_text()
    events = [json.loads(one)["event"] for one in log.splitlines()]
    assert events == ["started", "continued", "finished"]
    merge(out)
    run(*asked, "--out", tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_what_slurm_runs_afterwards(tmp_path):
    """sbatch is played by a command that runs what it shall wrap."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/bash\ntest "$1" = --dependency=afterok:JOB -a "$2" = --wrap && $3\n')
    sbatch.chmod(0o755)
    assert ran(block("sbatch"), tmp_path) == ["merge", "runs/clva"]


def test_the_skypilot_file(tmp_path):
    told = yaml.safe_load(block("name: "))
    assert told["num_nodes"] == 8 and set(told["resources"]) == {"accelerators"}
    words = [
        ran(told["run"], tmp_path, SKYPILOT_NODE_RANK=str(rank), SKYPILOT_NUM_NODES="8")
        for rank in range(8)
    ]
    parts = [one[one.index("--shard") + 1] for one in words]
    assert parts == [f"{n}/8" for n in range(1, 9)]
    assert Path(words[0][words[0].index("--out") + 1]).is_relative_to(
        next(iter(told["file_mounts"]))
    )
    asks(words[0], tmp_path / "run")
