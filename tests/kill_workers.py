"""By hand, ``python tests/kill_workers.py``: workers of Ray are killed at random moments.

Runs go on, each into a folder of its own, until so many were killed (20, or the first argument),
one after at most so many seconds (45, or the second: a worker must live to load the model); the
files of every run are compared with those of a run in one process. Prints what was done.
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.lens.asking import Asking
from clva_lens.lens.evaluate import run_benchmark

FILES = ("run.json", "samples.jsonl", "answers.jsonl", "score.json", "rows.jsonl")


def workers() -> list[int]:
    """The workers that are alive of the Ray that this process started."""
    return sorted(pid for pid, name in processes() if name.startswith(b"ray::_Worker"))


def processes() -> list[tuple[int, bytes]]:
    """The descendants of this process, with what they are called."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            parents[int(path.name)], names[int(path.name)] = parent, (path / "cmdline").read_bytes()
        except (OSError, ValueError):  # it has ended
            continue
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return [(pid, names[pid]) for pid in ours if pid in names]


class Killer(threading.Thread):
    """Kills one worker after the other, at random moments."""

    def __init__(self, seed: int, wanted: float, longest: float) -> None:
        super().__init__(daemon=True)
        self.random, self.kills = random.Random(seed), []
        self.wanted, self.longest = wanted, longest

    def run(self) -> None:
        while len(self.kills) < self.wanted:
            time.sleep(self.random.uniform(1, self.longest))
            if alive := workers():
                chosen = self.random.choice(alive)
                os.kill(chosen, signal.SIGKILL)
                self.kills.append(chosen)


def main(wanted: float, longest: float) -> None:
    torch.set_num_threads(1)
    benchmark, asking = (
        BENCHMARKS.get("pope/toy/adversarial"),
        Asking(method=cl.CLVA(), batch_size=12, limit=240, share="picture"),
    )
    engine = cl.Ray(workers=2, restarts=10 * int(wanted))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run_benchmark(cl.load("toy-llava"), benchmark, asking, out=root / "one", progress=False)
        killer, runs, equal = Killer(0, wanted, longest), 0, 0
        with engine.loading("toy-llava") as pool:
            killer.start()
            while len(killer.kills) < wanted:
                out = root / str(runs)
                run_benchmark(pool, benchmark, asking, out=out, progress=False)
                same = [(out / f).read_bytes() == (root / "one" / f).read_bytes() for f in FILES]
                runs, equal = runs + 1, equal + all(same)
                print(
                    f"run {runs}: {len(killer.kills)} killed so far, equal: {all(same)}", flush=True
                )
    print(f"{len(killer.kills)} workers killed in {runs} runs; {equal} runs equal to the byte")
    sys.exit(equal != runs)


if __name__ == "__main__":
    main(*(float(one) for one in [*sys.argv[1:], *("20", "45")[len(sys.argv) - 1 :]]))
