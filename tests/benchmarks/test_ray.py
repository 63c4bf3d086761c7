"""Runs under Ray itself, stopped, on two nodes, by command: the bytes of one process."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from test_runs import files, same_but_origin
from test_runs_cli import run

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.ground.errors import BenchmarkError
from clva_lens.lens.asking import Asking
from clva_lens.lens.evaluate import run_benchmark
from clva_lens.lens.workers import Pool

pytest.importorskip("ray", reason="un-skip when Ray is installed: pip install 'clva-lens[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")

COUNT, BATCH = 240, 12
BENCHMARK = BENCHMARKS.get("pope/toy/adversarial")
ASKING = Asking(method=cl.CLVA(), batch_size=BATCH, limit=COUNT, share="picture")
COMMAND = (
    *("run", "--benchmark", BENCHMARK.name, "--method", "clva", "--limit", COUNT),
    *("--batch-size", BATCH, "--engine", "ray", "--workers", 2),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return cl.load("toy-llava")


@pytest.fixture(scope="module")
def single(tmp_path_factory, model):
    """The run of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    run_benchmark(model, BENCHMARK, ASKING, out=out, progress=False)
    return out


class Driver:
    """A command in a process of its own; it and all that it starts bear a mark."""

    def __init__(self, out, *more, command=COMMAND):
        self.mark, self.out = uuid.uuid4().hex, out
        self.before = self.count()
        words = [sys.executable, "-m", "clva_lens", *command, "--out", out, *more]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            env={**os.environ, "MARK": self.mark},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def count(self):
        return sum(path.read_bytes().count(b"\n") for path in self.out.rglob("answers.jsonl"))

    def until_it_answers(self, count=1):
        while self.process.poll() is None and self.count() < self.before + count:
            time.sleep(0.02)
        assert self.process.poll() is None, self.process.communicate()

    def alive(self):
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                found += [path.name] * (self.mark.encode() in (path / "environ").read_bytes())
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def all_ends(self):
        """Whether Ray's processes end too; its agents first try to tell others for a minute."""
        for _ in range(360):
            if not self.alive():
                return True
            time.sleep(0.5)
        return False


def test_a_driver_that_is_killed_or_interrupted_goes_on_to_the_same_bytes(tmp_path, single, model):
    out = tmp_path / "run"
    killed = Driver(out)
    killed.until_it_answers()
    assert len(killed.alive()) > 3
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.communicate()
    assert killed.all_ends() and 0 < killed.count() < COUNT
    stopped = Driver(out, "--resume")
    stopped.until_it_answers()
    os.killpg(stopped.process.pid, signal.SIGINT)  # as a terminal does
    said, told = stopped.process.communicate()
    assert stopped.process.returncode == 130, told
    assert "Stopped. Continue with the same command and --resume" in told
    assert said == "" and "Traceback" not in told
    assert stopped.all_ends() and killed.before < stopped.count() < COUNT
    run_benchmark(model, BENCHMARK, ASKING, out=out, resume=True, progress=False)
    same_but_origin(out, single)
    assert len((out / "log.jsonl").read_text().splitlines()) == 4


# ── two nodes ──


@pytest.fixture
def cluster():
    """Two nodes with a processor each, so that each has one of two workers."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def by_node():
    """What loads the toy; on a node that says so, with one weight moved."""

    def loads():  # inside, so that it is sent whole
        import os

        import clva_lens as cl

        model = cl.load("toy-llava")
        if os.environ.get("OTHER_WEIGHTS"):
            model.hf_model.model.multi_modal_projector.linear_1.bias.data[0] += 1e-3
        return model

    return loads


def test_two_nodes_are_one_process_to_the_byte(cluster, tmp_path, single, monkeypatch):
    """By the command; then one node is lost in the middle; then one is of another kind."""
    import ray

    asked = Driver(tmp_path / "command", "--address", cluster.address)
    said, told = asked.process.communicate()
    assert asked.process.returncode == 0, told
    assert "Score of 240 samples" in said
    same_but_origin(tmp_path / "command", single)

    free, get = [], Pool.get

    def lose(self, one):
        found = get(self, one)
        free.append(ray.available_resources().get("CPU", 0))
        if len(free) == 3:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = cluster.add_node(num_cpus=1)
        return found

    engine = cl.Ray(workers=2, address=cluster.address)
    with monkeypatch.context() as patch, engine.loading("toy-llava") as pool:
        patch.setattr(Pool, "get", lose)
        run_benchmark(pool, BENCHMARK, ASKING, out=tmp_path / "lost", progress=False)
        assert len([node for node in ray.nodes() if not node["Alive"]]) == 1
    assert free[:3] == [0] * 3  # both processors were taken: a worker on each node
    same_but_origin(tmp_path / "lost", single)

    cluster.remove_node(cluster.second, allow_graceful=False)
    fake = tmp_path / "site" / "nnsight-9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: nnsight\nVersion: 9.9\n")
    paths = os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")])
    cluster.second = cluster.add_node(
        num_cpus=1, env_vars={"PYTHONPATH": paths, "OTHER_WEIGHTS": "1"}
    )
    with (
        Pool(engine, by_node()) as pool,
        pytest.raises(BenchmarkError, match="differ in what decides the answers") as raised,
    ):
        run_benchmark(pool, BENCHMARK, ASKING, out=tmp_path / "other", progress=False)
    assert "packages.nnsight" in str(raised.value) and "'9.9'" in str(raised.value)
    assert "weights: " in str(raised.value)
    assert not (tmp_path / "other").exists()


# ── many runs ──

SPEC = """
models = ["toy-llava"]
limit = 24
batch_size = 6

[[benchmarks]]
name = "pope/toy/adversarial"

[[methods]]
name = "none"

[[methods]]
name = "clva"
alpha = [6, 14]
"""
REPRODUCE = ("reproduce", "--model", "toy-llava", "--only", "table 6", "--limit", 12)
WORKERS = ("--engine", "ray", "--workers", 2)


def killed_in_the_middle(out, command, answers, of):
    """Have a command with workers killed once there are so many answers of all."""
    driver = Driver(out, *WORKERS, command=command)
    driver.until_it_answers(answers)
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.process.communicate()
    assert answers <= driver.count() < of


def runs_in(root):
    """Every byte of the runs below a folder, by name."""
    found = (root / "runs").rglob("answers.jsonl")
    return {path.parent.relative_to(root): files(path.parent) for path in found}


def test_a_sweep_by_workers_is_that_of_one_process(tmp_path):
    """It is killed in the middle; one of its runs is in the way of a file, until that is gone."""
    spec = tmp_path / "spec.toml"
    spec.write_text(SPEC)
    asked, out = ("sweep", spec), tmp_path / "ray"
    assert "3 runs: 3 done" in run(*asked, "--out", tmp_path / "one")
    wanted = runs_in(tmp_path / "one")
    assert len(wanted) == 3 and len({it["answers.jsonl"] for it in wanted.values()}) == 3

    blocked = out / sorted(wanted)[0] / "notes.txt"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("of somebody else")
    killed_in_the_middle(out, asked, 6, 2 * 24)
    run(*asked, "--out", out, *WORKERS, code=1)
    assert "3 runs: 2 done, 1 failed" in run(*asked, "--out", out, "--dry-run")
    assert "holds 'notes.txt' and no run.json" in (out / "sweep.csv").read_text()
    assert {**wanted, **runs_in(out)} == wanted and len(runs_in(out)) == 2

    blocked.unlink()
    assert "3 runs: 3 done" in run(*asked, "--out", out, *WORKERS)
    assert runs_in(out) == wanted
    tables = [root / "sweep.csv" for root in (out, tmp_path / "one")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_a_reproduction_by_workers_is_that_of_one_process(tmp_path):
    """It is killed in the middle too."""
    run(*REPRODUCE, "--out", tmp_path / "one")
    wanted = runs_in(tmp_path / "one")
    killed_in_the_middle(tmp_path / "ray", REPRODUCE, 24, 12 * 12)
    run(*REPRODUCE, "--out", tmp_path / "ray", *WORKERS)
    assert len(wanted) == 12 and runs_in(tmp_path / "ray") == wanted
    cells = [tmp_path / one / "cells.csv" for one in ("one", "ray")]
    assert cells[0].read_bytes() == cells[1].read_bytes()
    assert len({one["answers.jsonl"] for one in wanted.values()}) > 5
