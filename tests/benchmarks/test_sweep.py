"""Many runs from one file: each combination once, failures noted, a forecast that adds up."""

import csv
import json

import pages
import pytest
from test_runs_cli import run

import clva_lens as cl
from clva_lens.benchmarks.run_folder import read_run
from clva_lens.experiments.reproduce import running
from clva_lens.experiments.sweep_spec import read_sweep
from clva_lens.experiments.sweeping import forecast, states, sweep
from clva_lens.ground.errors import BenchmarkError, ParameterError, UnknownName

SPEC = """
models = ["toy-llava"]
seeds = [0, 1]
limit = 6
batch_size = 6

[[benchmarks]]
name = "pope/toy/adversarial"

[[methods]]
name = "none"

[[methods]]
name = "clva"
alpha = [6, 14]
layers = [[9, 10]]
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    loads = []

    def load(name, **_):
        loads.append(name)
        return pages.load(name)

    monkeypatch.setattr(running, "load", load)
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    return path, loads


def quiet(runs, root):
    return sweep(runs, root, lambda text: None, progress=False)


def test_each_combination_is_a_run_and_a_model_is_loaded_once(spec, tmp_path):
    path, loads = spec
    runs, root = read_sweep(path), tmp_path / "out"
    assert len(runs) == 2 * 3
    assert {run.method and (run.method.alpha, run.method.layers) for run in runs} == {
        None,
        (6, (9, 10)),
        (14, (9, 10)),
    }
    assert forecast(states(runs, root), root) is None
    assert [state.word for state in quiet(runs, root)] == ["done"] * 6
    assert loads == ["toy-llava"]
    model = pages.load("toy-llava")
    alone = cl.evaluate(
        model,
        "pope/toy/adversarial",
        cl.CLVA(alpha=6, layers=(9, 10)),
        limit=6,
        seed=1,
        batch_size=6,
        progress=False,
    )
    (mine,) = [r for r in runs if r.method and r.method.alpha == 6 and r.subject.seed == 1]
    found = [answer.margin for answer in read_run(mine.folder(root)).answers]
    assert found == [row["margin"] for row in alone.rows] and len(set(found)) > 3
    with (root / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["none", "clva", "clva"] * 2
    assert {row["accuracy"] for row in rows} != {""}
    quiet(runs, root)
    assert loads == ["toy-llava"]


def test_what_fails_is_noted_and_tried_again(spec, tmp_path, monkeypatch):
    path, _ = spec
    runs, root = read_sweep(path)[:3], tmp_path / "out"
    whole = running.run_side_by_side

    def ends(model, benchmark, askings, outs, **options):
        if any(one.method is not None and one.method.alpha == 14 for one in askings):
            raise BenchmarkError("memory ran out at sample 1")
        return whole(model, benchmark, askings, outs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(running, "run_side_by_side", ends)
        words = [state.word for state in quiet(runs, root)]
    assert words == ["done", "done", "failed: memory ran out at sample 1"]
    found = states(runs, root)
    seconds = [json.loads(x)["seconds"] for r in runs[:2] for x in log(r, root) if "finish" in x]
    # Two runs of as many passes each were done, and one is left.
    assert forecast(found, root) == pytest.approx(sum(seconds) / 2)
    assert forecast(found, root, workers=4) == pytest.approx(sum(seconds) / 8)
    assert [state.word for state in quiet(runs, root)] == ["done"] * 3
    assert forecast(states(runs, root), root) == 0


def log(run, root):
    return (run.folder(root) / "log.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("model = 3", ParameterError, "a sweep has no 'model'. Did you mean 'models'"),
        ("models = 'x'", ParameterError, "'models' of .* is a list of names, but is 'x'"),
        ("models = ['x']", ParameterError, "names no benchmarks"),
        (SPEC.replace("alpha", "alfa"), ParameterError, "CLVA has no 'alfa'"),
        (SPEC.replace("[6, 14]", "[-1]"), ParameterError, "alpha"),
        (SPEC.replace("clva", "cvla"), UnknownName, "no method 'cvla'"),
        (SPEC + "[[decodings]]\nname = 'beam'\nnum_beams = 0", ParameterError, "num_beams"),
        ("[[", ParameterError, "cannot be read as TOML"),
    ],
)
def test_mistakes_of_a_file_are_told_before_anything_runs(tmp_path, text, error, said):
    path = tmp_path / "spec.toml"
    path.write_text(text)
    with pytest.raises(error, match=said):
        read_sweep(path)


def test_the_command_says_how_far_it_is(spec, tmp_path):
    path, _ = spec
    path.write_text(SPEC.replace("[0, 1]", "[0]").replace("[6, 14]", "[6]"))
    asked = ("sweep", path, "--out", tmp_path / "out")
    assert "2 runs: 2 left; what is left takes unknown" in run(*asked, "--dry-run")
    assert "2 runs: 2 done; what is left takes about 0 s" in run(*asked)
    assert "there is no engine 'dask'" in run(*asked, "--engine", "dask", code=1)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("seeds = [-1]", "integers from 0"),
        ("seeds = [1.5]", "integers from 0"),
        ("seeds = []", "integers from 0"),
        ("limit = 0", "integer from 1"),
        ("batch_size = 0", "integer from 1"),
        ("seeds = [0, 0]", "more than once"),
        ('[[methods]]\nname = "none"', "more than once"),
        ('[[methods]]\nname = "clva"\nalpha = []', "alpha of 'clva' is an empty list"),
        ('[[methods]]\nname = "clva"\nalpha = [6, 6.0]', r"more than once.* under CLVA\(alpha=6"),
        ('[[methods]]\nname = "clva"\nalpha = [14]\n' * 2, "more than once"),
        (
            '[[methods]]\nname = "clva"\nalpha = 6\nbeta = 0.3\n'
            '[[methods]]\nname = "clva"\nbeta = 0.3\nalpha = 6.0',
            "more than once",
        ),
        ('[[decodings]]\nname = "sampling"\ntop_p = [1, 1.0]', "more than once"),
    ],
)
def test_what_runs_nothing_or_twice_is_refused(line, match, tmp_path):
    path = tmp_path / "sweep.toml"
    tables = '[[benchmarks]]\nname = "pope/toy/random"\n[[methods]]\nname = "none"\n'
    early, late = ("", line) if line.startswith("[[") else (line, "")
    path.write_text(f'models = ["toy-llava"]\n{early}\n{tables}{late}\n')
    with pytest.raises(ParameterError, match=match):
        read_sweep(path)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("'clva'\nalpha = 6", "'clva'\nalpha = 6.0"),
        ("'clva'\nalpha = 0", "'clva'\nalpha = -0.0"),
        ("'clva'", "'clva'\ntau = 2\nalpha = 14"),
        ("'clva'\nlayers = 9", "'clva'\nlayers = [[9]]"),
        ("'none'", "'none'\n[[decodings]]\nname = 'greedy'"),
        (
            "'none'\n[[decodings]]\nname = 'sampling'",
            "'none'\n[[decodings]]\nname = 'sampling'\ntemperature = 1",
        ),
    ],
)
def test_runs_have_one_folder_where_their_records_are_equal(then, now, spec, tmp_path):
    """What one spelling began the other goes on with, to the same bytes."""
    path, _ = spec
    head = 'models = ["toy-llava"]\nlimit = 4\nbatch_size = 2\n'
    root, found = tmp_path / "out", []
    for text in (then, now):
        bench = "[[benchmarks]]\nname = 'pope/toy/adversarial'\n"
        path.write_text(f"{head}{bench}[[methods]]\nname = {text}\n")
        (run,) = read_sweep(path)
        assert [state.word for state in states([run], root)] == ["done" if found else "left"]
        found.append(run.folder(root))
        if text == then:
            quiet([run], root)
            whole = {one.name: one.read_bytes() for one in found[0].iterdir()}
    assert found[0] == found[1]
    (found[0] / "score.json").unlink()
    lines = whole["answers.jsonl"].splitlines(keepends=True)
    (found[0] / "answers.jsonl").write_bytes(b"".join(lines[:2]))
    assert [state.word for state in quiet([run], root)] == ["done"]
    again = {one.name: one.read_bytes() for one in found[0].iterdir()}
    assert whole.pop("log.jsonl") != again.pop("log.jsonl") and again == whole


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("alpha = 6", "alpha = 6.5"),
        ("alpha = 1", "beta = 1"),
        ("layers = [[9, 10]]", "layers = [[10, 9]]"),  # as their records, which name them in order
    ],
)
def test_runs_have_two_folders_where_their_records_differ(first, second, tmp_path):
    path = tmp_path / "sweep.toml"
    tables = "".join(f'[[methods]]\nname = "clva"\n{one}\n' for one in (first, second))
    path.write_text(f'models = ["toy-llava"]\n[[benchmarks]]\nname = "pope/toy/random"\n{tables}')
    assert len({run.folder(tmp_path) for run in read_sweep(path)}) == 2
