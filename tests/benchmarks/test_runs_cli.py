"""clva-lens run, score and benchmarks: from the command line to the folder and back."""

import json
import math
import shutil

import pytest
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.benchmarks.run_folder import plain


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output + result.stderr
    assert "Traceback" not in result.output + result.stderr
    return " ".join((result.output if code == 0 else result.stderr).split())


ASKED = ("run", "--benchmark", "pope/toy/adversarial", "--limit", 36, "-s", "parser=official")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A greedy run, and one with the picture knocked out."""
    folder = tmp_path_factory.mktemp("runs")
    run(*ASKED, "--out", folder / "greedy")
    run(*ASKED, "--out", folder / "blind", "--method", "knockout", "-p", "layers=5,6,7,8,9")
    return folder


def test_the_command_line_is_evaluate(pair):
    model = cl.load("toy-llava")
    report = cl.evaluate(
        model, "pope/toy/adversarial", cl.KnockOut(layers=(5, 6, 7, 8, 9)), limit=36
    )
    told = cl.score(pair / "blind", parser="strict")
    assert told.rows == report.rows
    assert plain(told.metrics) == plain(report.metrics)
    assert told.metrics["yes_ratio"] == 0 and math.isnan(told.metrics["f1"])
    assert told.record["method"]["layers"] == [5, 6, 7, 8, 9]
    written = json.loads((pair / "blind" / "score.json").read_text())
    assert written["metrics"] == plain(cl.score(pair / "blind").metrics)
    assert written["settings"]["parser"] == "official"


def test_resume_after_the_command_was_cut_off(pair, tmp_path):
    shutil.copytree(pair / "greedy", tmp_path / "cut")
    answers = tmp_path / "cut" / "answers.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(whole[:2000])
    assert "of its 36 answers. Continue it with" in run("score", tmp_path / "cut", code=1)
    assert "Pass resume=True (--resume)" in run(*ASKED, "--out", tmp_path / "cut", code=1)
    changed = run(*ASKED, "--out", tmp_path / "cut", "--resume", "-d", "max_new_tokens=2", code=1)
    assert "decoding.max_new_tokens: 4 then, 2 now" in changed
    assert "n 36" in run(*ASKED, "--out", tmp_path / "cut", "--resume")
    assert answers.read_bytes() == whole


def test_score_against_another_run_shows_more_than_accuracy(pair, tmp_path):
    told = run(
        "score", pair / "blind", "--against", pair / "greedy", "--out", tmp_path / "score.json"
    )
    for word in ("accuracy", "auc", "yes_ratio", "McNemar", "bias-matched accuracy of A", "failed"):
        assert word in told
    greedy, blind = cl.score(pair / "greedy"), cl.score(pair / "blind")
    expected = cl.compare(greedy.score, blind.score)
    assert expected.metrics["accuracy"].difference.high < 0
    assert " ".join(repr(expected).split()) in told
    written = json.loads((tmp_path / "score.json").read_text())
    assert written["metrics"] == plain(blind.metrics)
    assert written["against"]["metrics"] == greedy.metrics
    assert written["comparison"]["p_value"] == expected.p_value


def test_a_file_of_answers_is_scored(tmp_path):
    truth = BENCHMARKS.get("pope/toy/random").samples()
    file = tmp_path / "oracle.jsonl"
    file.write_text("".join(json.dumps({"id": s.id, "text": s.label}) + "\n" for s in truth))
    asked = ("score", "--answers", file, "--benchmark", "pope/toy/random", "-s", "parser=official")
    told = run(*asked)
    assert "accuracy 1 " in told
    wrong = run("score", "--answers", file, "--benchmark", "pope/toy/adversarial", code=1)
    assert "are missing from the" in wrong


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "cvla"), "no method 'cvla'. Did you mean 'clva'?"),
        (("--method", "clva", "-p", "alfa=1"), "CLVA has no 'alfa'. Did you mean 'alpha'?"),
        (("--method", "clva", "-p", "alpha=much"), "alpha='much' does not fit CLVA"),
        (("--method", "clva", "-p", "alpha=-2"), "alpha"),
        (("-p", "alpha=1"), "-p alpha=1 was given without a method"),
        (("--limit", 6, "-s", "parser=oficial"), "Did you mean 'official'?"),
        (("-s", "count"), "Write it as name=value"),
        (("--decoding", "beams"), "no decoding 'beams'. Did you mean 'beam'?"),
        (("--decoding", "beam", "-d", "num_beams=0"), "num_beams must be >= 1"),
        (("--limit", 99999), "limit=99999"),
        (("--model", "toy-lava"), "there is no model 'toy-lava'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, args, message):
    out = tmp_path / "run"
    assert message in run("run", "--benchmark", "pope/toy/random", "--out", out, *args, code=1)
    assert not out.exists()


def test_what_score_needs(pair, tmp_path):
    for args in ((), ("--answers", "x"), (pair / "greedy", "--answers", "x", "--benchmark", "y")):
        assert "Pass the folder of a run, or --answers FILE" in run("score", *args, code=1)
    assert "holds no run" in run("score", tmp_path, code=1)
    assert "ToyPope has no 'lemma'" in run("score", pair / "greedy", "-s", "lemma=x", code=1)
    color = tmp_path / "color"
    run("run", "--benchmark", "skill/toy/color", "--limit", 8, "--out", color)
    told = run("score", color, "--against", color, code=1)
    assert "no yes/no questions" in told


def test_benchmarks_are_listed():
    told = run("benchmarks")
    for name in cl.benchmarks():
        assert name in told
    assert "parser=strict" in told


def test_failed_samples_are_asked_again_unless_they_are_kept(pair, tmp_path):
    shutil.copytree(pair / "greedy", tmp_path / "run")
    path = tmp_path / "run" / "answers.jsonl"
    whole = path.read_bytes()
    first, rest = whole.split(b"\n", 1)
    failed = {**json.loads(first), "text": "", "margin": None, "error": "OSError: away"}
    path.write_bytes(json.dumps(failed).encode() + b"\n" + rest)
    asked = (*ASKED, "--out", tmp_path / "run", "--resume")
    for command in (("score", tmp_path / "run"), asked):
        assert "answers.jsonl was changed after the run was finished" in run(*command, code=1)
    (tmp_path / "run" / "score.json").unlink()  # as before the run was finished
    assert "failed 1" in run(*asked, "--keep-failed")
    assert "failed 0" in run(*asked)
    assert path.read_bytes() == whole
