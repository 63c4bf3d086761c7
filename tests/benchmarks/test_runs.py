"""Runs that are killed, damaged, shared or asked to change: the answers are never mixed or lost."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from tiny_models import picture

import clva_lens as cl
from clva_lens.benchmarks.base import Benchmark, Sample, choose, judge, read_answers
from clva_lens.benchmarks.pope import score_pope
from clva_lens.benchmarks.pope_sets import Pope
from clva_lens.benchmarks.run_folder import read_run
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.lens.provenance import describe, digest

COUNT = 11


@dataclass(frozen=True)
class Small(Benchmark):
    """Eleven questions about random pictures, in the words of the tiny models."""

    version: ClassVar[str] = "1"
    max_new_tokens: ClassVar[int] = 3
    parser: str = "strict"
    bad: tuple[int, ...] = ()
    long: tuple[int, ...] = ()

    @property
    def name(self):
        return "small"

    def samples(self, limit=None, seed=0):
        everything = [
            Sample(
                id=f"q{i}",
                image=picture(i) * (math.nan if i in self.bad else 1),
                question="is there a cup ?" + " red" * (9000 if i in self.long else i % 3),
                label=("yes", "no")[i % 2],
                group=str(i // 2),
            )
            for i in range(COUNT)
        ]
        return choose(everything, limit, seed)

    def score(self, samples, answers):
        return score_pope(samples, answers, self.parser)


def go(lens, out, benchmark=None, method=None, decoding=None, **options):
    options = {"batch_size": 4, "progress": False, **options}
    return cl.evaluate(lens, benchmark or Small(), method, decoding, out=out, **options)


def files(folder):
    names = ("run.json", "samples.jsonl", "answers.jsonl", "score.json", "rows.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


def same_but_origin(a, b):
    a, b = files(a), files(b)
    records = [json.loads(one.pop("run.json")) for one in (a, b)]
    for record in records:
        record.pop("origin")
    assert records[0] == records[1]
    assert a == b


CHILD = """
import sys, torch
import clva_lens as cl
from clva_lens.benchmarks.run_files import RunFiles, as_lines
torch.set_num_threads(1)
append = RunFiles.append
def half(self, name, rows):
    path = self.folder / name
    if name == "answers.jsonl" and path.exists() and path.read_bytes().count(b"\\n") == 12:
        with path.open("ab") as file:
            file.write(as_lines(rows)[:-30])
        print("half", flush=True)
        sys.stdin.read()
    append(self, name, rows)
RunFiles.append = half
cl.evaluate(cl.load("toy-llava"), "pope/toy/adversarial", cl.CLVA(), limit=24, batch_size=8,
            progress=False, out=sys.argv[1])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """A process is held in the middle of a write, and killed there by SIGKILL."""
    model = cl.load("toy-llava")
    out, whole = tmp_path / "killed", tmp_path / "whole"
    options = {"limit": 24, "batch_size": 8, "benchmark": "pope/toy/adversarial"}
    command = [sys.executable, "-c", CHILD, str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        try:
            assert child.stdout.readline() == "half\n"
            with pytest.raises(BenchmarkError, match="another process is writing to"):
                go(model, out, method=cl.CLVA(), resume=True, **options)
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    left = (out / "answers.jsonl").read_bytes()
    assert not left.endswith(b"\n")
    assert 12 < left.count(b"\n") < 18  # batches are whole pictures, of six questions
    with pytest.raises(BenchmarkError, match=r"has 17 of its 24 answers\. Continue it"):
        cl.score(out)
    resumed = go(model, out, method=cl.CLVA(), resume=True, **options)
    straight = go(model, whole, method=cl.CLVA(), **options)
    assert resumed.rows == straight.rows
    assert resumed.metrics == straight.metrics
    assert len({row["margin"] for row in resumed.rows}) > 20
    same_but_origin(out, whole)
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(e["event"], e["answers"]) for e in events] == [
        ("started", 0),
        ("continued", 12),
        ("finished", 24),
    ]


@pytest.mark.parametrize(
    "decoding", [cl.Greedy(max_new_tokens=3), cl.Sampling(seed=3, max_new_tokens=3)]
)
def test_wherever_the_answers_were_cut(one, tmp_path, decoding):
    bench = Small(bad=(2,))
    go(one, tmp_path / "whole", bench, decoding=decoding)
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == COUNT
    go(one, tmp_path / "cut", bench, decoding=decoding)
    path = tmp_path / "cut" / "answers.jsonl"
    for cut, zeros in ((0, 0), (7, 0), (ends[2], 0), (ends[3], 0), (ends[8] - 1, 5), (ends[-1], 9)):
        path.write_bytes(whole[:cut] + b"\0" * zeros)
        (tmp_path / "cut" / "score.json").unlink()
        go(one, tmp_path / "cut", bench, decoding=decoding, resume=True)
        same_but_origin(tmp_path / "cut", tmp_path / "whole")
    path.unlink()
    go(one, tmp_path / "cut", bench, decoding=decoding, resume=True)
    same_but_origin(tmp_path / "cut", tmp_path / "whole")


def test_a_finished_run_is_scored_again_and_not_run_again(one, tmp_path, monkeypatch):
    first = go(one, tmp_path / "run")
    monkeypatch.setattr(sys.modules["clva_lens.lens.generate"], "generate_batch", None)
    again = go(one, tmp_path / "run", resume=True)
    assert (again.rows, again.metrics) == (first.rows, first.metrics)
    assert again.record["seconds"] == 0


def test_a_run_killed_before_its_record_was_written_starts_anew(one, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("lock", "samples.jsonl", "run.json.part"):
        (out / name).write_text("{")
    go(one, out)
    go(one, tmp_path / "other", resume=True)  # nothing to continue: it is started
    same_but_origin(out, tmp_path / "other")


# ── what is refused ──


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"benchmark": Small("official")}, "settings.parser: 'strict' then, 'official' now"),
        ({"method": cl.CLVA(alpha=3)}, "method.alpha: 14.0 then, 3 now"),
        ({"method": cl.KnockOut()}, "method.name: 'clva' then, 'knockout' now"),
        ({"decoding": cl.Greedy(max_new_tokens=2)}, "decoding.max_new_tokens: 3 then, 2 now"),
        ({"decoding": cl.Beam(max_new_tokens=3)}, "decoding.num_beams: 'nothing' then, 5 now"),
        ({"batch_size": 5}, "batch_size: 4 then, 5 now"),
        ({"limit": 10}, "limit: None then, 10 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
    ],
)
def test_no_run_goes_on_with_other_settings(one, tmp_path, change, said):
    method = cl.CLVA(tau=1.0)
    go(one, tmp_path / "run", method=method)
    before = files(tmp_path / "run")
    with pytest.raises(BenchmarkError, match="cannot be continued") as caught:
        go(one, tmp_path / "run", **{"method": method, "resume": True, **change})
    assert said in str(caught.value)
    assert files(tmp_path / "run") == before


def test_no_run_goes_on_with_other_weights(one, tmp_path, monkeypatch):
    go(one, tmp_path / "run")
    bias = one.hf_model.model.multi_modal_projector.linear_1.bias
    try:
        bias.data[0] += 1e-3
        with pytest.raises(BenchmarkError, match=r"\n  weights: '\w{64}' then, '\w{64}' now\n"):
            go(one, tmp_path / "run", resume=True)
    finally:
        bias.data[0] -= 1e-3


def test_masks_are_told_apart_by_their_values():
    def told(layer):
        heads = torch.zeros(12, 40, dtype=torch.bool)
        heads[layer] = True
        classes = cl.HeadClasses.from_indices({layer: [1]}, {0: [0]}, layers=12, heads=40)
        return describe(cl.KnockOut(heads=heads)), describe(cl.CLVA(heads=classes))

    assert told(4) == told(4)
    assert all(a != b for a, b in zip(told(4), told(5), strict=True))
    json.dumps(told(4))
    assert digest({"a": torch.zeros(2)}) != digest({"a": torch.zeros(2, dtype=torch.int32)})


def test_a_folder_that_holds_something_is_left_alone(one, tmp_path):
    go(one, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(BenchmarkError, match=r"holds a run\. Pass resume=True"):
        go(one, tmp_path / "run")
    assert files(tmp_path / "run") == before
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("the only copy")
    (tmp_path / "file").write_text("")
    for resume in (False, True):
        with pytest.raises(BenchmarkError, match=r"holds 'chapter.txt' and no run.json"):
            go(one, precious, resume=resume)
        with pytest.raises(BenchmarkError, match="is a file"):
            go(one, tmp_path / "file", resume=resume)
    assert [path.name for path in precious.iterdir()] == ["chapter.txt"]
    with pytest.raises(ParameterError, match="resume=True was passed without a folder"):
        go(one, None, resume=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:4], b"\xff\x00garbage", *lines[5:]], r"line 5 of .* is no JSON"),
        (lambda lines: [*lines[:4], b"[1]", *lines[5:]], r"line 5 of .* is a list"),
        (lambda lines: [*lines[:4], b'{"id": 3}', *lines[5:]], r"line 5 .* no answer .*its id"),
        (lambda lines: [*lines[:4], *lines[5:]], r"line 5 .* answers 'q5' where 'q4' is due"),
        (lambda lines: [*lines, lines[0]], r"line 12 .* one more than there are samples"),
    ],
)
def test_damage_names_the_line(one, tmp_path, damage, message):
    go(one, tmp_path / "run")
    path = tmp_path / "run" / "answers.jsonl"
    damaged = b"".join(line + b"\n" for line in damage(path.read_bytes().splitlines()))
    path.write_bytes(damaged)
    with pytest.raises(BenchmarkError, match=message):
        go(one, tmp_path / "run", resume=True)
    with pytest.raises(BenchmarkError):
        cl.score(tmp_path / "run")
    assert path.read_bytes() == damaged
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(BenchmarkError, match=r"run\.json is damaged"):
        go(one, tmp_path / "run", resume=True)


# ── samples that fail ──


def test_a_sample_that_fails_is_counted_and_never_dropped(one, tmp_path):
    clean = go(one, tmp_path / "clean")
    report = go(one, tmp_path / "run", Small(bad=(2,), long=(5, 6)))
    assert report.metrics["failed"] == 3
    assert clean.metrics["failed"] == 0
    errors = {row["id"]: row["error"] for row in report.rows}
    assert [name for name, error in errors.items() if error] == ["q2", "q5", "q6"]
    assert "PromptError: " in errors["q2"]
    assert "positions. Shorten it." in errors["q5"]
    for row, other in zip(report.rows, clean.rows, strict=True):
        if row["error"]:
            assert (row["answer"], row["prediction"], row["margin"]) == ("", "other", None)
        else:  # those that were asked again alone, too
            assert row["answer"] == other["answer"]
            assert row["margin"] == pytest.approx(other["margin"], abs=1e-4)
    assert [a.error for a in read_answers(tmp_path / "run" / "answers.jsonl")] == [*errors.values()]
    assert go(one, None, Small(bad=(2,), long=(5, 6))).rows == report.rows


def test_only_the_sample_that_breaks_the_model_fails(one, monkeypatch):
    generate = sys.modules["clva_lens.lens.generate"]
    inner, sizes = generate.generate_batch, []

    def fragile(model, prompt, method, decoding):
        sizes.append(len(prompt.questions))
        if any("red red" in text for text in prompt.questions):
            raise RuntimeError("no red,\n twice")
        return inner(model, prompt, method, decoding)

    monkeypatch.setattr(generate, "generate_batch", fragile)
    report = go(one, None)
    failed = {row["id"]: row["error"] for row in report.rows if row["error"]}
    assert failed == dict.fromkeys(["q2", "q5", "q8"], "RuntimeError: no red, twice")
    assert sizes == [4, 1, 1, 1, 1, 4, 1, 1, 1, 1, 3, 1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_ends_the_run_and_keeps_the_answers(one, tmp_path, monkeypatch, error):
    generate = sys.modules["clva_lens.lens.generate"]
    inner = generate.generate_batch

    def fragile(model, prompt, method, decoding):
        if any("red red" in text for text in prompt.questions[:1]):
            raise error
        return inner(model, prompt, method, decoding)

    with monkeypatch.context() as patched:
        patched.setattr(generate, "generate_batch", fragile)
        with pytest.raises(BenchmarkError, match="memory ran out at sample 9 with batch_size=4"):
            go(one, tmp_path / "run")
    assert len(read_answers(tmp_path / "run" / "answers.jsonl")) == 8
    go(one, tmp_path / "run", resume=True)
    go(one, tmp_path / "whole")
    same_but_origin(tmp_path / "run", tmp_path / "whole")


def test_ctrl_c_keeps_the_whole_batches(one, tmp_path, monkeypatch):
    from clva_lens.benchmarks import run_writing as runs

    write = runs.OpenRun.write

    def stop(self, place, answers):
        write(self, place, answers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs.OpenRun, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            go(one, tmp_path / "run")
    assert len(read_answers(tmp_path / "run" / "answers.jsonl")) == 4
    assert go(one, tmp_path / "run", resume=True).metrics["failed"] == 0


def test_a_method_that_does_not_fit_is_no_samples_fault(one, tmp_path):
    with pytest.raises(ParameterError, match="layers names layer 99"):
        go(one, tmp_path / "run", method=cl.KnockOut(layers=(99,)))
    assert not (tmp_path / "run").exists()


def test_missing_pictures_are_one_error(one, tmp_path):
    rows = [
        {"question_id": i, "image": f"{i}.png", "text": "is there a cup ?", "label": "yes"}
        for i in range(9)
    ]
    questions = tmp_path / "mini.json"
    questions.write_text(json.dumps(rows))
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    bench = Pope("coco", "random", data=questions, images=tmp_path, protocol="bare")
    with pytest.raises(BenchmarkError, match=r"8 of 9 images are missing .*1\.png.*and 5 more"):
        go(one, tmp_path / "run", bench)
    assert not (tmp_path / "run").exists()
    for i in range(1, 9):
        (tmp_path / f"{i}.png").write_text("no picture")
    report = go(one, tmp_path / "run", bench)
    assert report.metrics["failed"] == 8
    # Scored again where neither questions nor pictures are.
    questions.unlink()
    assert cl.score(tmp_path / "run").metrics == pytest.approx(report.metrics, nan_ok=True)


def test_a_benchmark_that_names_missing_files_is_refused_before_the_model_runs(one, tmp_path):
    class Named(Small):
        def samples(self, limit=None, seed=0):
            found = super().samples(limit, seed)
            return [replace(s, image=tmp_path / f"{i}.png") for i, s in enumerate(found)]

    count = len(Named().samples())
    shown = rf"{count} of {count} pictures are missing: '.*0\.png'"
    with pytest.raises(BenchmarkError, match=shown):
        go(one, tmp_path / "run", Named())
    assert not (tmp_path / "run").exists()


# ── scoring again ──


def test_score_is_evaluates_score(one, tmp_path):
    report = go(one, tmp_path / "run")
    again = cl.score(tmp_path / "run")
    assert (again.rows, again.metrics) == (report.rows, report.metrics)
    run = read_run(tmp_path / "run")
    strict = judge(Small(), run.samples, run.answers)
    official = judge(replace(Small(), parser="official"), run.samples, run.answers)
    assert cl.score(tmp_path / "run", parser="official").metrics == official.metrics
    assert official.metrics["yes_ratio"] != strict.metrics["yes_ratio"]
    with pytest.raises(ParameterError, match=r"Small has no 'parsr'\. Did you mean 'parser'"):
        cl.score(tmp_path / "run", parsr="official")
    with pytest.raises(BenchmarkError, match=r"holds no run: there is no run\.json"):
        cl.score(tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["benchmark_class"] = "elsewhere.Other"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(BenchmarkError, match=r"of a elsewhere\.Other, which is unknown here"):
        cl.score(tmp_path / "run")


def test_a_bar_shows_answers_their_rate_and_what_is_left(one, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    go(one, None, progress=True)
    shown = capsys.readouterr().err
    assert f"{COUNT}/{COUNT}" in shown
    assert "/s" in shown
    go(one, None, progress=False)
    go(one, None, progress=True, batch_size=COUNT)
    assert capsys.readouterr().err == ""


def test_files_are_where_the_table_says(one, tmp_path):
    from clva_lens.benchmarks import run_folder as runs

    go(one, tmp_path / "run")
    for path in Path(tmp_path / "run").iterdir():
        assert f"``{path.name}``" in runs.__doc__
