"""What every analysis takes: CLVA's parameters, settings, device, dtype and batch size."""

import json
import shutil

import pytest
from powers import make_checkout
from test_analyses import ARCHIVE, SMALL

from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.experiments import notebook as notebooks
from clva_lens.experiments.archive import analyse
from clva_lens.experiments.measuring import (
    configured,
    measure_methods,
    measure_sweep,
    require_pictures,
)
from clva_lens.ground.errors import BenchmarkError, ParameterError, RecordError
from clva_lens.lens.asking import Asking
from clva_lens.lens.load import LensModel

SOURCES = {slug: ARCHIVE.source(slug).read_text() for slug in SMALL}
# A lesson asks one question; what a benchmark is asked there is an example.
LESSONS = {"00_tour"}
ASKING = sorted(
    slug for slug, text in SOURCES.items() if "cl.load(" in text and slug not in LESSONS
)
# One picture after the other is looked at there, so there is no batch.
SINGLE = {"02_saliency"}
# They act otherwise than by CLVA, or ask no benchmark: what they cannot use they do not take.
WITHOUT = {
    "15_attribution": {"clva", "settings", "batch_size"},
    "16_steering": {"clva"},
    "17_maps_judged": {"clva", "settings", "batch_size"},
}
USED = {"clva": "cl.CLVA(**clva)", "settings": ", settings", "batch_size": "batch_size=batch_size"}
# A picture a task there, so that there are always several.
SEVERAL = {"06_mme"}


def test_the_analyses_that_ask_a_model_are_those():
    assert len(ASKING) >= 12 and {"08_speed", "12_paper_arithmetic"}.isdisjoint(ASKING)


@pytest.mark.parametrize("slug", ASKING)
def test_each_takes_what_all_take_and_uses_it(slug):
    source = notebooks.read_source(ARCHIVE.source(slug))
    defaults = notebooks.parameters(source)
    taken = USED.keys() - WITHOUT.get(slug, {"batch_size"} if slug in SINGLE else set())
    assert taken == USED.keys() & defaults.keys()
    code = "\n".join(cell.source for cell in source.cells if cell.cell_type == "code")
    assert [name for name, used in USED.items() if (used in code) != (name in taken)] == []
    # No other CLVA and no benchmark as registered: what is given holds for the whole analysis.
    assert code.count("cl.CLVA(") == ("clva" in taken) and "BENCHMARKS.get(" not in code
    values = {"clva": {"tau": 1.5}, "settings": {"parser": "lmms"}}
    for name, value in values.items():
        given = [f"{name}={json.dumps(value)}"]
        if name in taken:
            assert defaults[name] == {}
            assert notebooks.parse_parameters(slug, defaults, given) == {name: value}
        else:
            with pytest.raises(ParameterError, match=f"'{name}'"):
                notebooks.parse_parameters(slug, defaults, given)


def checkout(tmp_path):
    shutil.copytree(
        ARCHIVE.root / "analyses", tmp_path / "analyses", ignore=lambda *_: ["records", "measured"]
    )
    return tmp_path


def test_what_is_given_reaches_the_runs_and_the_model(tmp_path, no_kernel, monkeypatch):
    given = [*SMALL["07_anchors"], 'benchmarks=["pope/toy/random"]', 'clva={"tau": 1.5}']
    given += ['settings={"parser": "lmms", "readout": "first token"}', "batch_size=3"]
    given += ["dtype=float64", "device=cpu"]
    record = analyse("07_anchors", given, root=checkout(tmp_path), progress=False).record
    (model,) = record.inputs["models"]
    assert (model["dtype"], model["device"]) == ("torch.float64", "cpu")
    runs = record.inputs["runs"]
    assert [run["method"].get("tau") for run in runs] == [None, 1.5, 1.5, 1.5, 1.5]
    assert {run["settings"]["parser"] for run in runs} == {"lmms"}
    assert {run["settings"]["readout"] for run in runs} == {"first token"}
    assert {run["batch_size"] for run in runs} == {3}


@pytest.mark.parametrize("slug", sorted({*ASKING} - SINGLE - SEVERAL))
def test_one_picture_fails_before_anything_is_run(slug, tmp_path, no_kernel, monkeypatch):
    """Six questions are of one picture; intervals are over pictures."""
    passes = []
    defaults = notebooks.parameters(notebooks.read_source(ARCHIVE.source(slug)))
    few = {"questions": 6, "captions": 1, "pictures": 1, "scenes": 1, "pairs": 1}
    given = [f"{name}={count}" for name, count in few.items() if name in defaults]
    assert given

    stop = lambda *args, **kwargs: passes.append(args)  # noqa: E731
    monkeypatch.setattr("clva_lens.experiments.measuring.run_benchmark", stop)
    monkeypatch.setattr("clva_lens.experiments.measuring.trace_attention", stop)
    with pytest.raises(RecordError, match=r"are of 1 picture, and intervals are over pictures"):
        analyse(slug, given, root=checkout(tmp_path), progress=False)
    assert passes == []


def test_settings_go_to_those_that_have_them_and_to_none_unseen():
    pope, chair = configured(["pope/toy/random", "chair/toy"], {"parser": "lmms"})
    assert pope.settings["parser"] == "lmms" and pope.name == "pope/toy/random"
    assert chair == BENCHMARKS.get("chair/toy")
    with pytest.raises(ParameterError, match="no benchmark of chair/toy has the setting 'parser'"):
        configured(["chair/toy"], {"parser": "lmms"})


def test_pictures_are_counted_not_questions():
    samples = BENCHMARKS.get("pope/toy/random").samples(12)
    require_pictures("all", samples)
    first = [sample for sample in samples if sample.group == samples[0].group]
    with pytest.raises(BenchmarkError, match=rf"{len(first)} samples of one are of 1 picture"):
        require_pictures("one", first)


def test_methods_of_few_pictures_have_no_interval_in_rows(monkeypatch):
    import clva_lens as cl

    lens = cl.load("toy-llava")
    assert isinstance(lens, LensModel)
    for limit, wide in ((24, False), (66, True)):
        askings = Asking(limit=limit, batch_size=33).each({"greedy": None, "CLVA": cl.CLVA()})
        rows = measure_methods(lens, ["pope/toy/random"], askings, progress=False)
        changes = [r for r in rows if r["method"] == "CLVA" and r["metric"] == "accuracy"]
        assert [row["low"] is not None for row in changes] == [wide]


def test_a_sweep_has_the_rows_of_its_methods_and_is_continued(tmp_path):
    import clva_lens as cl

    lens, benchmark = cl.load("toy-llava"), BENCHMARKS.get("pope/toy/random")
    asked = Asking(limit=24, batch_size=12, share="picture")
    askings = asked.each({"greedy": None, "CLVA": cl.CLVA(alpha=40)})
    alone = measure_methods(lens, [benchmark], askings, progress=False)
    kept = {}
    for _ in range(2):
        rows = measure_sweep(
            lens, [benchmark], askings, tmp_path, keep=kept.__setitem__, progress=False
        )
        assert rows == [row for row in alone if row["metric"] != "seconds"]
    assert [*kept] == ["greedy", "CLVA"]
    assert kept["greedy"].rows[0]["margin"] != kept["CLVA"].rows[0]["margin"]
    logs = [path.read_text().splitlines() for path in tmp_path.rglob("log.jsonl")]
    assert [len(log) for log in logs] == [2, 2]  # started and finished, once
    wrong = asked.each({"greedy": None, "none": cl.KnockOut(layers=[99])})
    with pytest.raises(ParameterError, match=r"refused: .*layers names layer 99"):
        measure_sweep(lens, [benchmark], wrong, tmp_path, progress=False)


def test_a_checkout_of_powers_takes_a_device_too(tmp_path, no_kernel):
    """Every analysis takes device and dtype, though its parameters do not name them."""
    source = '# %% tags=["parameters"]\nx = 1\n\n# %%\nimport os\n\nimport clva_lens as cl\n'
    source += 'told = [os.environ.get(f"CLVA_LENS_{one}") for one in ("DEVICE", "DTYPE")]\n'
    source += 'cl.new_record().keep_rows("told", [{"device": told[0], "dtype": told[1]}])\n'
    root = make_checkout(tmp_path, source)
    record = analyse("01_powers", ["device=cpu", "dtype=float16", "x=2"], root=root).record
    assert record.rows("told") == [{"device": "cpu", "dtype": "float16"}]
    assert record.inputs["given"] == {"x": 2}
