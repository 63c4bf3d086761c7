"""A set of runs as one: what is done, failed and left, how long the rest takes, and making it."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.lines import each_line
from clva_lens.benchmarks.run_folder import ANSWERS, LOG, SCORE
from clva_lens.experiments.reproduce.needs import Run
from clva_lens.experiments.reproduce.running import Planned, Say, failures, make, plan
from clva_lens.ground.files import taking_place
from clva_lens.lens.provenance import describe
from clva_lens.lens.workers import Ray

TABLE = "sweep.csv"


@dataclass(frozen=True)
class State:
    """How far a run is: answers of samples, and "done", "left", "refused: …" or "failed: …"."""

    run: Run
    answers: int
    samples: int
    word: str

    @property
    def row(self) -> dict[str, Any]:
        """What the table says of it, its method's parameters as JSON."""
        run = self.run
        told = dict(describe(run.method))
        how = "greedy" if run.decoding is None else type(run.decoding).__name__.lower()
        return {
            "model": run.subject.model,
            "benchmark": run.benchmark.name,
            "method": told.pop("name"),
            "parameters": json.dumps(told),
            "decoding": how,
            "seed": run.subject.seed,
            "answers": self.answers,
            "samples": self.samples,
            "state": self.word,
        }


def states(runs: Sequence[Run], root: Path) -> list[State]:
    """Return how far each run is; no model is loaded."""
    found = []
    for planned in plan(runs, root):
        run = planned.need
        assert isinstance(run, Run)
        folder = run.folder(root)
        answers = sum(1 for _ in each_line(folder / ANSWERS)) if (folder / ANSWERS).is_file() else 0
        failed = failures(root, run)
        word = {"finished": "done", "to do": "left"}.get(planned.state, planned.state)
        if word == "left" and failed is not None:
            word = f"failed: {failed}"
        samples = answers if word == "done" else planned.samples
        found.append(State(run, answers, samples, word))
    return found


def forecast(found: Sequence[State], root: Path, workers: int = 1) -> float | None:
    """Return the seconds in the model that are left, for so many workers; None if nothing is known.

    A run's logs say how many seconds its answers took. What is left takes as long a forward pass
    as the model's runs on the same benchmark did, or else its others; passes are counted at most
    (``Run.most_passes``), so answers that end early make a forecast too long or too short alike.
    """
    spent: dict[tuple[str, str | None], list[float]] = {}
    for state in found:
        seconds, passes = _spent(state.run, root)
        for key in (
            (state.run.subject.model, state.run.benchmark.name),
            (state.run.subject.model, None),
        ):
            sums = spent.setdefault(key, [0.0, 0.0])
            sums[0] += seconds
            sums[1] += passes
    total = 0.0
    for state in found:
        left = (state.samples - state.answers) * state.run.most_passes
        if left <= 0 or state.word.startswith("refused"):
            continue
        model = state.run.subject.model
        known = [spent[model, name] for name in (state.run.benchmark.name, None)]
        seconds, passes = next((one for one in known if one[1]), (0.0, 0.0))
        if not passes:
            return None
        total += left * seconds / passes
    return total / workers


def _spent(run: Run, root: Path) -> tuple[float, float]:
    """Return the seconds that a run's log knows of, and the passes that they were for, at most."""
    path = run.folder(root) / LOG
    seconds = passes = 0.0
    before = 0
    for row in each_line(path) if path.is_file() else ():
        if row.get("event") == "finished" and row.get("seconds"):
            seconds += row["seconds"]
            passes += (row["answers"] - before) * run.most_passes
        before = row.get("answers", before)
    return seconds, passes


def sweep(
    runs: Sequence[Run],
    root: Path,
    say: Say,
    *,
    engine: Ray | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> list[State]:
    """Make what is left, model by model; return how far each run is then, and write ``sweep.csv``.

    A model is loaded once, and a picture read once for all that ask the same questions about it.
    A run that fails is noted, and the others go on; called again, it is tried again.
    """
    planned: list[Planned] = plan(runs, root)
    options = {"device": device, "dtype": dtype, "progress": progress}
    make(planned, root, say, engine=engine, keep_going=True, **options)
    found = states(runs, root)
    write_table(found, root)
    return found


def write_table(found: Sequence[State], root: Path) -> Path:
    """Write one row a run, with its metrics once it is done."""
    rows = []
    for state in found:
        path = state.run.folder(root)
        score = json.loads((path / SCORE).read_bytes()) if (path / SCORE).is_file() else {}
        rows.append(
            {**state.row, "folder": str(path.relative_to(root)), **score.get("metrics", {})}
        )
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    root.mkdir(parents=True, exist_ok=True)
    with taking_place(root / TABLE) as part:
        part.write_text(text.getvalue(), encoding="utf-8", newline="")
    return root / TABLE
