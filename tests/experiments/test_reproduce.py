"""``clva-lens reproduce``: runs that are shared and resumed, cells that say what is printed."""

import csv
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import clva_lens as cl
from clva_lens.__main__ import app
from clva_lens.benchmarks.metrics import Outcomes
from clva_lens.benchmarks.run_folder import Report, read_run, score
from clva_lens.benchmarks.run_writing import OpenRun
from clva_lens.benchmarks.statistics import bootstrap_interval
from clva_lens.experiments.paper import MODELS, SPLITS
from clva_lens.experiments.reproduce import running
from clva_lens.experiments.reproduce.cells import Cell, marks
from clva_lens.experiments.reproduce.contradictions import _all, contradiction, printed
from clva_lens.experiments.reproduce.found import Found, Missing, refusals
from clva_lens.experiments.reproduce.intervals import FEW
from clva_lens.experiments.reproduce.items import ITEMS, chosen
from clva_lens.experiments.reproduce.looks import untrained
from clva_lens.experiments.reproduce.making import beyond_bias
from clva_lens.experiments.reproduce.needs import Run
from clva_lens.experiments.reproduce.reproducing import items_of, reproduce_paper, say_plan
from clva_lens.experiments.reproduce.running import make, once, plan
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.ground.errors import BenchmarkError

items_of()
TOY = Subject("toy-llava", limit=12)
SMALL = Subject("toy-llava", limit=2)
PAPERS = Subject("liuhaotian/llava-1.5-7b")


@pytest.fixture(scope="module")
def lens():
    return cl.load("toy-llava")


@pytest.fixture(autouse=True)
def loaded(lens, monkeypatch):
    monkeypatch.setattr(running, "load", lambda *_, **__: lens)


def quietly(items, subject, out, **options):
    said = []
    options = {"progress": False, **options}
    paths = reproduce_paper(chosen(items), [subject], out, said.append, **options)
    return {path.name: path for path in paths}, said


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_item_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    files, _ = quietly([], SMALL, out)
    told = json.loads(files["reproduction.json"].read_text())
    assert told["items"] == list(chosen([])) and told["not made"] == {}
    page = files["report.html"].read_text()
    document = files["report.tex"].read_text()
    for name in ITEMS.names():
        assert f'<h2 id="{name.replace(" ", "_").replace("-", "_")}">' in page
        assert name.capitalize().split()[1].split("-")[0] in document
    cells = table(files["cells.csv"])
    with_cells = {cell["item"] for cell in cells}
    others = {
        "figure 1",
        "figure 2",
        "figure 2a",
        "figure 6",
        "figure 7",
        "equation 12",
        "claim B.1",
    }
    assert with_cells == set(ITEMS.names()) - others
    unmeasured = {cell["column"] for cell in cells if cell["ours"] == ""}
    # The toy set has four of MME's tasks; of two questions, AUC or F1 may be undefined.
    undefined = {cell["column"] for cell in cells if "undefined" in cell["note"]}
    tasks = {cell["column"] for cell in cells if cell["note"].startswith("not asked here")}
    assert unmeasured == undefined | tasks and "MME overall" in tasks
    assert {cell["verdict"] for cell in cells} <= {"not printed", "not measured"}
    drawn = {path.name for path in (out / "figures").glob("*.pdf")}
    assert {"figure_1_masses_toy-llava.pdf", "equation_12_layers_toy-llava.pdf"} <= drawn
    assert {"figure_5_accuracy_toy-llava.pdf", "figure_6_maps_toy-llava.pdf"} <= drawn
    assert "too few tasks for a radar" in page, "two questions are of one task"
    for path in told["runs"]:
        assert len(read_run(out / path).answers) <= 2
        assert score(out / path).metrics
    assert (out / "answers.jsonl").read_text().count("\n") == 2


def test_the_tables_numbers_are_the_runs_own(tmp_path):
    files, _ = quietly(["table 1", "table 2", "table 3"], TOY, tmp_path)
    found = {(c["item"], c["row"], c["column"]): c for c in table(files["cells.csv"])}
    runs = [(tmp_path / one) for one in json.loads(files["reproduction.json"].read_text())["runs"]]
    reports = [score(path) for path in runs]

    def of(benchmark, method):
        return next(
            one.metrics
            for one in reports
            if (one.record["benchmark"], one.record["method"]["name"]) == (benchmark, method)
            and one.record["decoding"]["name"] == "Greedy"
        )

    averages = {"F1": [], "Acc.": []}
    for split in SPLITS:
        metrics = of(f"pope/toy/{split}", "clva")
        for header, key in (("F1", "f1"), ("Acc.", "accuracy")):
            cell = found["table 1", "CLVA", f"{split.capitalize()} {header}"]
            assert float(cell["ours"]) == pytest.approx(100 * metrics[key], rel=1e-5)
            averages[header].append(100 * metrics[key])
    for header, values in averages.items():
        cell = found["table 1", "CLVA", f"Average {header}"]
        assert float(cell["ours"]) == pytest.approx(np.mean(values), rel=1e-5)
        assert cell["n"] == "36" and cell["low"] == "", "two pictures make no interval"
    chair, mme = of("chair/toy", "none"), of("mme/toy", "none")
    cell = found["table 2", "Greedy", "Recall"]
    assert float(cell["ours"]) == pytest.approx(100 * chair["recall"], rel=1e-5)
    assert float(found["table 2", "Greedy", "length"]["ours"]) == pytest.approx(chair["length"])
    for task in ("existence", "count"):
        if task in mme:
            cell = found["table 3", "Greedy", task.capitalize()]
            assert float(cell["ours"]) == pytest.approx(mme[task], rel=1e-5)


def test_what_is_stopped_goes_on_and_nothing_is_asked_twice(tmp_path, monkeypatch):
    """Stopped at every few batches; the report is that of one that was never stopped."""
    few = replace(TOY, limit=6, batch_size=3)
    whole, _ = quietly(["table 6"], few, tmp_path / "whole")
    own, asked, left = OpenRun.write, [], itertools.count()

    def write(self, place, answers):
        if next(left) % 5 == 4:
            raise KeyboardInterrupt
        asked.extend((str(self.files.folder), place + at) for at in range(len(answers)))
        own(self, place, answers)

    monkeypatch.setattr(OpenRun, "write", write)
    stops = 0
    for _ in range(20):
        try:
            files, _ = quietly(["table 6"], few, tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 2 and len(asked) == len(set(asked)) == 12 * 6
    assert files["cells.csv"].read_bytes() == whole["cells.csv"].read_bytes()
    before = len(asked)
    quietly(["table 6"], few, tmp_path / "stopped")
    assert len(asked) == before


def test_a_dry_run_says_what_is_left_and_makes_nothing(tmp_path, lens):
    out, said, rows = tmp_path / "out", [], []
    items = chosen(["table 6", "figure 1"])
    planned = say_plan(items, [TOY], out, said.append)
    assert not out.exists()
    most = sum(one.passes for one in planned)
    assert f"{most:,} forward passes left" in said[-1] and "12 to do" in said[1] + said[2]
    handle = lens.hf_model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    try:
        quietly(["table 6", "figure 1"], TOY, out)
    finally:
        handle.remove()
    probes = 2 + 4 + 8  # whether a picture can be shared
    assert most / 4 < sum(rows) <= most + 12 * 6 + probes
    again = say_plan(items, [TOY], out, said.append)
    assert sum(one.passes for one in again) == 0 and "13 finished" in said[-1]


def test_tables_share_runs_and_another_limit_is_another_run(tmp_path):
    first, fifth = (ITEMS.get(name).needs(TOY) for name in ("table 1", "table 5"))
    assert len(once([*first, *fifth])) == 18 + 1
    both = {need.folder(tmp_path) for need in first}
    assert len(both) == 18
    assert not both & {n.folder(tmp_path) for n in ITEMS.get("table 1").needs(SMALL)}
    seeds = ITEMS.get("table 1").needs(replace(TOY, seed=1))
    assert not both & {n.folder(tmp_path) for n in seeds}


def test_a_refused_method_is_a_reason_and_no_end(tmp_path, lens):
    benchmark = TOY.pope("random")["toy"]
    runs = [Run(TOY, benchmark, method, limit=6) for method in (None, cl.Shuffled(cl.MemVR()))]
    said = []
    make(plan(runs, tmp_path), tmp_path, said.append, progress=False)
    assert runs[0].finished(tmp_path) and not runs[1].finished(tmp_path)
    (reason,) = refusals(tmp_path, TOY.slug).values()
    assert "refused: the method 'memvr'" in reason
    with pytest.raises(Missing, match="does not act by biases"):
        Found(tmp_path).report(runs[1])
    assert [one.state == "to do" for one in plan(runs, tmp_path)] == [False, False]


def test_other_weights_under_the_same_name_are_refused(tmp_path, lens, monkeypatch):
    quietly(["figure 1"], SMALL, tmp_path)
    twin = untrained(lens)
    monkeypatch.setattr(running, "load", lambda *_, **__: twin)
    with pytest.raises(BenchmarkError, match="runs of other weights"):
        quietly(["figure 1"], TOY, tmp_path)


def test_the_untrained_twin_is_a_model_of_its_own(lens):
    state = torch.get_rng_state()
    twins = [untrained(lens, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    heads = [one.hf_model.get_output_embeddings().weight for one in (*twins, lens)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[3])
    assert heads[0].shape == heads[3].shape


# ── without a model ──


class Made(Found):
    """Answers that were drawn, whichever run is asked for: 40 pictures with six questions."""

    def report(self, run):
        name = run.benchmark.name
        kind = "" if run.method is None else run.method.name
        draws = np.random.default_rng([len(name), sum(map(ord, name))])
        own = np.random.default_rng(sum(map(ord, kind)))
        rows = []
        for at in range(240):
            label = "yes" if at % 2 else "no"
            margin = float(draws.normal(1.5 if at % 2 else -1.5))
            margin += float(own.normal(0, 0.8)) if kind else 0.0
            said = "yes" if margin > 0 else "no"
            rows.append(
                {"id": str(at), "group": f"p{at // 6}", "label": label, "prediction": said}
                | {"margin": margin, "right": said == label, "category": "existence"}
            )
        return Report({}, rows, {"benchmark": name})


def of_table(cells, row, column):
    (found,) = [one for one in cells if (one.row, one.column) == (row, column)]
    return found


def test_table_1_is_the_mean_over_sources_and_only_then_beside_the_papers(tmp_path):
    item = ITEMS.get("table 1")
    cells = item.part(PAPERS, Made(tmp_path)).cells
    cell = of_table(cells, "CLVA", "Random Acc.")
    runs = {n.benchmark.name: n for n in item.needs(PAPERS) if n.method == cl.CLVA()}
    right = [
        np.mean([row["right"] for row in Made(tmp_path).report(runs[f"pope/{s}/random"]).rows])
        for s in ("coco", "aokvqa", "gqa")
    ]
    assert cell.value == pytest.approx(100 * np.mean(right)) and cell.printed == 89.37
    assert cell.low < cell.value < cell.high and cell.verdict in ("inside", "outside")
    assert cell.change_low <= cell.change <= cell.change_high
    assert cell.printed_change == pytest.approx(89.37 - 88.26)

    class Part(Made):
        def report(self, run):
            if "gqa" in run.benchmark.name:
                raise Missing("data are missing")
            return super().report(run)

    part = item.part(PAPERS, Part(tmp_path))
    assert all(one.printed is None for one in part.cells)
    assert of_table(part.cells, "CLVA", "Random Acc.").note == "over coco, aokvqa only"
    assert any("gqa" in note for note in part.notes)
    empty = item.part(PAPERS, Found(tmp_path)).cells
    assert all(one.value is None and one.printed is None for one in empty)


def test_a_method_that_changes_nothing_changes_exactly_nothing(tmp_path):
    class Same(Made):
        def report(self, run):
            return super().report(Run(run.subject, run.benchmark))

    cells = ITEMS.get("table 1").part(PAPERS, Same(tmp_path)).cells
    changes = [(c.change, c.change_low, c.change_high) for c in cells if c.change is not None]
    assert len(changes) == 5 * 10 and set(changes) == {(0.0, 0.0, 0.0)}
    beyond = [(c.value, c.low, c.high) for c in cells if c.column == "beyond bias"]
    assert set(beyond) == {(0.0, 0.0, 0.0)}
    runs = [n for n in ITEMS.get("table 1").needs(PAPERS) if n.method is None][:3]
    assert beyond_bias(Same(tmp_path), runs, runs) == (0.0, 0.0, 0.0)


def test_intervals_are_those_of_the_bootstrap_over_pictures(tmp_path):
    """Against the one of comparisons, with other draws; one source's splits are drawn together."""
    item, made = ITEMS.get("table 6"), Made(tmp_path)
    cell = of_table(item.part(PAPERS, made).cells, "CLVA, top-p 1", "Random Acc.")
    run = next(n for n in item.needs(PAPERS) if n.method == cl.CLVA() and n.decoding.top_p == 1)
    rows = made.report(run).rows
    groups = [row["group"] for row in rows]
    other = bootstrap_interval("accuracy", Outcomes.from_rows(rows), groups, seed=5)
    assert cell.value == pytest.approx(100 * other.estimate)
    assert abs(cell.low - 100 * other.low) < 1 and abs(cell.high - 100 * other.high) < 1
    assert cell.high - cell.low > 3 and FEW == 10


def test_contradictions_are_those_of_the_arithmetic():
    places = {(table, model, method) for table, model, _, method, _ in _all()}
    qwen = MODELS[2]
    assert {p for p in places if p[0] in (1, 5)} == {
        (table, qwen, method) for table in (1, 5) for method in ("IMCCD", "CLVA")
    }
    assert {p[2] for p in places if p[0] == 4} == {"none", "swapped"}
    assert {p[1] for p in places if p[0] == 2} == set(MODELS[:2])
    assert contradiction(2, MODELS[0], "", "CLVA", "recall") is None
    assert "85.56" in contradiction(1, qwen, "average", "IMCCD", "accuracy")
    assert "86.77" in contradiction(1, qwen, "average", "CLVA", "accuracy")
    assert printed(1, MODELS[0], "average", "CLVA", "f1") == 85.67


@pytest.mark.parametrize(
    ("cell", "verdict"),
    [
        (Cell("m", "r", "c", 88.0, 87.0, 89.0, printed=87.5), "inside"),
        (Cell("m", "r", "c", 88.0, 87.0, 89.0, printed=86.996), "inside"),
        (Cell("m", "r", "c", 88.0, 87.0, 89.0, printed=86.99), "outside"),
        (Cell("m", "r", "c", 88.0, printed=88.0), "no interval"),
        (Cell("m", "r", "c", 88.0, 87.0, 89.0), "not printed"),
        (Cell("m", "r", "c", None, printed=88.0), "not measured"),
        (Cell("m", "r", "c", 8.0, 7.0, 9.0, printed=8.0, comparable=False), "not comparable"),
        (
            Cell("m", "r", "c", 88.0, 87.0, 89.0, printed=88.0, contradiction="no"),
            "printed numbers contradict each other",
        ),
    ],
    ids=["in", "rounded", "out", "bare", "unprinted", "unmeasured", "machine", "contradictory"],
)
def test_verdicts(cell, verdict):
    assert cell.verdict == verdict


def test_best_and_second_are_of_a_models_column():
    def of(model, values, better=1):
        return [Cell(model, str(n), "c", v, better=better) for n, v in enumerate(values)]

    assert marks(of("a", [1.0, 3.0, 2.0, None, 3.0])) == {1: "best", 4: "best", 2: "second"}
    assert marks(of("a", [1.0, 3.0, 2.0], better=-1)) == {0: "best", 2: "second"}
    assert marks(of("a", [2.0, 2.001])) == {} and marks(of("a", [1.0, 2.0], better=0)) == {}
    assert marks([*of("a", [1.0, 2.0]), *of("b", [4.0, 3.0])]) == {
        0: "second",
        1: "best",
        2: "best",
        3: "second",
    }


def test_the_command_line(tmp_path):
    def call(*arguments):
        return CliRunner().invoke(app, ["reproduce", "--out", str(tmp_path / "o"), *arguments])

    wrong = call("--model", "toy-llava", "--only", "table 9")
    assert wrong.exit_code == 1 and "no table or figure 'table 9'" in wrong.output
    dry = call("--model", "liuhaotian/llava-1.5-7b", "--only", "table 1", "--dry-run")
    assert dry.exit_code == 0 and "data are missing" in dry.output
    dry = call("--model", "toy-llava", "--only", "Table 1", "--limit", "12", "--dry-run")
    assert dry.exit_code == 0 and "18 to do" in dry.output and not (tmp_path / "o").exists()


def test_a_finished_folder_needs_no_model(tmp_path, monkeypatch):
    first, _ = quietly(["figure 1", "claim B.1"], SMALL, tmp_path)
    monkeypatch.setattr(running, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    before = first["report.html"].read_bytes()
    again, said = quietly(["figure 1", "claim B.1"], SMALL, tmp_path)
    assert said == [] and again["report.html"].read_bytes() == before
