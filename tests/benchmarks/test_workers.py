"""Runs that several workers ask: every file is that of one process, whoever dies."""

import os
import pickle
import random
import signal
from dataclasses import replace
from typing import ClassVar

import cloudpickle
import pytest
import torch
from kill_workers import workers
from test_run_disk import stub
from test_runs import COUNT, Small, files, same_but_origin
from test_runs_cli import run as command_line

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS, read_answers
from clva_lens.experiments.reproduce import reproducing
from clva_lens.experiments.speed import several
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.lens import answering
from clva_lens.lens import evaluate as evaluating
from clva_lens.lens.asking import Asking
from clva_lens.lens.evaluate import run_benchmark, run_side_by_side
from clva_lens.lens.pool_asker import PoolAsker, Schedule, Told, digest_of
from clva_lens.lens.preparing import prepare
from clva_lens.lens.shipping import shipped
from clva_lens.lens.workers import Pool, _Worker

ASKING = Asking(batch_size=2, share="picture")


class Many(Small):
    """Its questions three times."""

    count: ClassVar[int] = 3 * COUNT

    def samples(self, limit=None, seed=0):
        every = super().samples(limit, seed)
        return [replace(one, id=f"{one.id}-{turn}") for turn in range(3) for one in every]


class Shuffled:
    """Workers of this process whose answers come in any order."""

    def __init__(self, askers, count=3, other=None, seconds=1.0, seed=0):
        self.count, self.random, self.seconds = count, random.Random(seed), seconds
        self.given, self.worker = [], object.__new__(_Worker)
        every = [(one, None, other or digest_of(one.record)) for one in askers]
        self.worker._prepared = lambda work: every

    def ask(self, number, work, jobs):
        self.given.append((number, [place for place, _ in jobs]))
        return (number, tuple(jobs), len(self.given))

    def ready(self, pending):
        return self.random.choice(pending)

    def get(self, one):
        found = self.worker.ask(None, list(one[1]))
        return [it._replace(likeliest=[7] * len(it.answers), seconds=self.seconds) for it in found]

    def words(self, ids):
        return [f"word {one}" for one in ids]


def by_workers(monkeypatch, **options):
    """Have runs asked by shuffled workers."""
    made = []

    def askers(model, benchmark, askings, samples, outs, progress, most):
        every = [
            prepare(model, benchmark, asking, some)
            for asking, some in zip(askings, samples, strict=True)
        ]
        hands = Shuffled(every, **options)
        made.append(hands)
        schedule = Schedule(hands, None)
        return [
            PoolAsker(
                hands,
                schedule,
                place,
                benchmark,
                samples[place],
                Told(one.record, one.stretches(), None),
                most,
                False,
            )
            for place, one in enumerate(every)
        ]

    monkeypatch.setattr(evaluating, "_askers", askers)
    return made


def test_answers_that_come_in_any_order_are_written_in_theirs(one, tmp_path, monkeypatch):
    stub(monkeypatch)
    run_benchmark(one, Small(), ASKING, out=tmp_path / "one", progress=False)
    made = by_workers(monkeypatch)
    report = run_benchmark(one, Small(), ASKING, out=tmp_path / "several", progress=False)
    assert files(tmp_path / "several") == files(tmp_path / "one")
    assert len({number for number, _ in made[0].given}) == 3
    assert report.record["seconds"] == len(made[0].given) == 6
    folders = [tmp_path / "a", tmp_path / "b"]
    run_side_by_side(one, Small(), [ASKING] * 2, folders, progress=False)
    assert all(places == [0, 1] for _, places in made[1].given)  # a picture's methods, by one
    assert files(folders[0]) == files(folders[1]) == files(tmp_path / "one")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("seconds", "most"),
    [(1.0, 1), (0.6, 1), (0.3, 3), (1e-9, 7)],  # a second's, or a quarter of what two workers lack
)
def test_quick_batches_are_given_together_and_few_at_the_end(one, seconds, most, seed, monkeypatch):
    stub(monkeypatch)
    made = by_workers(monkeypatch, count=2, seconds=seconds, seed=seed)
    run_side_by_side(one, Many(), [replace(ASKING, batch_size=1)], [None], progress=False)
    sizes = [len(places) for _, places in made[0].given]
    assert sum(sizes) == Many.count and max(sizes) == most
    assert sizes[:4] == [1] * 4  # how long a batch takes is not known yet
    assert sizes[-4:] == [1] * 4 and sizes[5:] == sorted(sizes[5:], reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("place", [1, 9, 20, 32])
def test_a_batch_that_ends_a_run_leaves_all_before_it(one, place, seed, tmp_path, monkeypatch):
    """As in one process, though it was given to a worker together with others."""
    stub(monkeypatch)
    asking = replace(ASKING, batch_size=1)
    run_benchmark(one, Many(), asking, out=tmp_path / "one", progress=False)
    canned = answering.generate_batches

    def ends(model, asked, asking, *, first, **options):
        if first == place:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from canned(model, asked, asking, first=first, **options)

    options = {"out": tmp_path / "run", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(answering, "generate_batches", ends)
        made = by_workers(patch, count=2, seconds=0.2, seed=seed)
        with pytest.raises(BenchmarkError, match=f"memory ran out at sample {place + 1} "):
            run_benchmark(one, Many(), asking, **options)
    assert len((tmp_path / "run" / "answers.jsonl").read_bytes().splitlines()) == place
    assert place == 1 or max(len(places) for _, places in made[0].given) == 5
    by_workers(monkeypatch, count=2, seconds=0.2, seed=seed)
    run_benchmark(one, Many(), asking, **options, resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "one")


def test_a_run_of_workers_is_resumed_by_any_engine(one, tmp_path, monkeypatch):
    stub(monkeypatch)
    run_benchmark(one, Small(), ASKING, out=tmp_path / "one", progress=False)
    out = tmp_path / "cut"
    for engine in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if engine:
                made = by_workers(patch)
            run_benchmark(one, Small(), ASKING, out=out, progress=False, resume=out.exists())
        assert files(out) == files(tmp_path / "one")
        lines = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)
        (out / "answers.jsonl").write_bytes(b"".join(lines[:5]) + b'{"id"')
        (out / "score.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        made = by_workers(patch)
        run_benchmark(one, Small(), ASKING, out=out, progress=False, resume=True)
    assert files(out) == files(tmp_path / "one") and len(made[0].given) == 4


def test_another_worker_under_the_same_name_is_refused(one, tmp_path, monkeypatch):
    stub(monkeypatch)
    by_workers(monkeypatch, other="someone else")
    with pytest.raises(BenchmarkError, match="started again has other packages, weights"):
        run_benchmark(one, Small(), ASKING, out=tmp_path / "run", progress=False)
    stub(monkeypatch, failing=range(COUNT))
    monkeypatch.setattr("clva_lens.lens.answering.FEW", 3)
    by_workers(monkeypatch)
    with pytest.raises(BenchmarkError, match=r"4 of 11 samples failed, more than max_failed=0.1"):
        run_benchmark(one, Small(), ASKING, out=tmp_path / "bad", progress=False)
    assert len((tmp_path / "bad" / "answers.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "other"}, "weights: 'w', 'other' on worker 2"),
        ({"packages": {"torch": "9"}}, "packages.torch: '2', '9' on worker 2"),
        ({"pictures": "q"}, "pictures: 'p', 'q' on worker 2"),
        ({"code": "older"}, "code: "),
    ],
)
def test_workers_that_differ_are_refused_by_what_differs(change, said):
    """Ray is played by a list of what workers say."""
    alike = {"weights": "w", "packages": {"torch": "2"}, "pictures": "p"}
    pool = Pool(cl.Ray(), lambda: None)
    told = [Told(one, [range(1)], None) for one in (alike, {**alike, **change})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clva_lens.lens.workers._of_this_process", lambda: {})
        patch.setattr("clva_lens.lens.workers._pictures_of", lambda samples: "p")
        patch.setattr(pool, "_get", lambda wanted: [[one] for one in told])
        patch.setattr(
            pool, "_ray", type("", (), {"put": staticmethod(lambda it: it)}), raising=False
        )
        with pytest.raises(BenchmarkError, match=f"differ in what decides the answers:\n  {said}"):
            pool.askers(Small(), [ASKING], [[]], progress=False, max_failed=1.0)


def test_a_model_is_sent_as_it_is(one):
    # As Ray sends it; in one process the tensors would be this model's own.
    sent = pickle.loads(cloudpickle.dumps(shipped(one)))()
    assert sent.hf_model is not one.hf_model
    told = prepare(one, Small(), ASKING, Small().samples()).record
    assert prepare(sent, Small(), ASKING, Small().samples()).record == told
    bias = sent.hf_model.model.multi_modal_projector.linear_1.bias
    bias.data[0] += 1e-3
    assert prepare(sent, Small(), ASKING, Small().samples()).record["weights"] != told["weights"]


def test_settings_that_start_nothing_are_refused(monkeypatch):
    for wrong in ({"workers": 0}, {"threads": 0}, {"gpus": -1}, {"restarts": -1}):
        with pytest.raises(ParameterError, match=f"{next(iter(wrong))} must be >="):
            cl.Ray(**wrong)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ParameterError, match=r"pip install 'clva-lens\[ray\]'"):
        Pool(cl.Ray(), lambda: None).__enter__()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Invalid address format: x"), "at 'x' (Invalid address format: x)"),
        (ConnectionError("no instance"), "at 'x' (no instance)"),
        (SystemExit(15), "at 'x' (nothing answers)"),  # so it ends, after two minutes
    ],
)
def test_a_ray_that_is_not_there_is_told(error, said, monkeypatch):
    """Ray is played by what it raises; without an address it is told to look for none."""
    given = []

    def init(**options):
        given.append(options)
        raise error

    fake = type("", (), {"init": staticmethod(init), "is_initialized": staticmethod(bool)})
    monkeypatch.setattr("clva_lens.lens.workers._import_ray", lambda: fake)
    for address in ("x", None):
        with pytest.raises(ParameterError, match="start says it") as raised:
            Pool(cl.Ray(address=address), lambda: None).__enter__()
        assert (said if address else "could not be had here (") in str(raised.value)
    assert [one["address"] for one in given] == ["x", "local"]
    assert ["num_cpus" in one for one in given] == [False, True]


@pytest.mark.parametrize("command", ["run", "sweep", "reproduce"])
def test_commands_take_an_engine_alike(command, tmp_path, monkeypatch):
    """What is passed is what Ray is made with, before anything is loaded."""
    made = []

    def ray(**given):
        made.append(given)
        raise ParameterError("seen")

    monkeypatch.setattr("clva_lens.lens.workers.Ray", ray)
    spec = tmp_path / "spec.toml"
    spec.write_text("models = ['toy-llava']\n[[benchmarks]]\nname = 'pope/toy/random'\n")
    needed = {"run": ["--benchmark", "pope/toy/random"], "sweep": [spec]}
    asked = (command, *needed.get(command, ["--model", "toy-llava"]), "--out", tmp_path / "out")
    more = ("--workers", 3, "--threads", 2, "--gpus-per-worker", 0.5, "--address", "auto")
    assert "seen" in command_line(*asked, "--engine", "ray", *more, code=1)
    assert "seen" in command_line(*asked, "--engine", "ray", code=1)
    assert made == [{"workers": 3, "threads": 2, "gpus": 0.5, "address": "auto"}, {}]
    for option, value in zip(more[::2], more[1::2], strict=True):
        said = command_line(*asked, option, value, code=1)
        assert f"{option} is an option of --engine ray" in said
    assert "there is no engine 'dask'" in command_line(*asked, "--engine", "dask", code=1)


def test_a_reproduction_hands_its_engine_on(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(reproducing, "make", lambda *_, **options: given.append(options))
    monkeypatch.setattr(reproducing, "write_report", lambda *_: [])
    for engine in ((), ("--engine", "ray", "--workers", 5)):
        out = ("--out", tmp_path / "out", "--only", "table 6")
        command_line("reproduce", "--model", "toy-llava", *out, *engine)
    assert [one["engine"] for one in given] == [None, cl.Ray(workers=5)]


def test_what_asking_takes_is_measured_once_all_is_ready(one, tmp_path):
    samples, clock = Small().samples(), iter([[1.0, 2.0], [1.5, 4.0]])
    pool = type("", (), {"processor_seconds": staticmethod(lambda: next(clock))})
    spent = several._asked(prepare(one, Small(), ASKING, samples), samples, tmp_path / "run", pool)
    assert min(spent.wall, spent.here, spent.writer) > 0 and spent.workers == [0.5, 2.0]
    assert len((tmp_path / "run" / "answers.jsonl").read_text().splitlines()) == COUNT
    said = command_line("bench", "--workers", 2, "--scaling", "tokens", code=1)
    assert "do not go with it" in said


# ── with Ray ──


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_is_killed_changes_no_byte(tmp_path, monkeypatch):
    """One of two, after the third batch; then an error of a worker is told as it was raised."""
    pytest.importorskip("ray", reason="un-skip when Ray is installed: pip install 'clva-lens[ray]'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark = BENCHMARKS.get("pope/toy/adversarial")
    asking = Asking(method=cl.CLVA(), batch_size=6, limit=36, share="picture")
    model = cl.load("toy-llava")
    run_benchmark(model, benchmark, asking, out=tmp_path / "one", progress=False)
    killed, get = [], Pool.get

    def kill(self, one):
        found = get(self, one)
        killed.append(0)
        if len(killed) == 3:
            os.kill(workers()[0], signal.SIGKILL)
        return found

    monkeypatch.setattr(Pool, "get", kill)
    with cl.Ray(workers=2).of(model) as pool:
        run_benchmark(pool, benchmark, asking, out=tmp_path / "ray", progress=False)
        with pytest.raises(ParameterError, match="layers names layer 99"):
            run_benchmark(pool, benchmark, replace(asking, method=cl.KnockOut(layers=[99])))
    assert len(killed) == 6 and not workers()
    same_but_origin(tmp_path / "ray", tmp_path / "one")
    assert len({one.margin for one in read_answers(tmp_path / "ray" / "answers.jsonl")}) > 30
    torch.set_num_threads(threads)
