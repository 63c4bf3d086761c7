"""What is still missing, and making it: model by model, set by set, as ordinary run folders."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clva_lens.experiments.reproduce.found import REFUSED, Found, name_of, refusals
from clva_lens.experiments.reproduce.needs import Measure, Need, Run
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.ground.errors import (
    BenchmarkError,
    InterventionError,
    ModelLoadError,
    ParameterError,
)
from clva_lens.ground.files import taking_place
from clva_lens.lens.evaluate import check_images, run_side_by_side
from clva_lens.lens.load import LensModel, load
from clva_lens.lens.provenance import identity, machine
from clva_lens.lens.workers import Pool, Ray
from clva_lens.methods.target import Target

FAILED = "failed.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """A need of the plan: how many samples it has, whether it is there, or why it cannot be."""

    need: Need
    samples: int
    state: str
    """"finished", "to do", or why not."""

    @property
    def passes(self) -> int:
        """The most forward passes that are left to do."""
        if self.state != "to do":
            return 0
        if isinstance(self.need, Measure):
            return self.need.passes
        return round(self.samples * self.need.most_passes)


def once(needs: Sequence[Need]) -> list[Need]:
    """Return each need once, in order: tables share runs."""
    return list({name_of(need): need for need in needs}.values())


def plan(needs: Sequence[Need], root: Path) -> list[Planned]:
    """Return what there is to do; benchmarks' data are looked for, and no model is loaded."""
    known: dict[tuple[str, int | None, int], tuple[int, str]] = {}
    planned = []
    for need in once(needs):
        if need.finished(root):
            planned.append(Planned(need, 0, "finished"))
            continue
        refused = refusals(root, need.subject.slug).get(name_of(need))
        if isinstance(need, Measure):
            planned.append(Planned(need, 0, refused or "to do"))
            continue
        which = need.set_key, need.limit, need.subject.seed
        if which not in known:
            known[which] = _samples(need)
        count, why = known[which]
        planned.append(Planned(need, count, refused or why or "to do"))
    return planned


def _samples(run: Run) -> tuple[int, str]:
    """Return how many samples a run has, and why it cannot be made, "" if it can."""
    try:
        samples = run.benchmark.samples(run.limit, run.subject.seed)
        check_images(samples)
    except BenchmarkError as error:
        return 0, f"data are missing: {error}"
    return len(samples), ""


def make(
    planned: Sequence[Planned],
    root: Path,
    say: Say,
    *,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    engine: Ray | None = None,
    keep_going: bool = False,
) -> None:
    """Make what the plan says is to do; what is stopped goes on where it stood, when called again.

    With an ``engine`` several processes ask, for runs alone. With ``keep_going`` a run that is
    ended is noted (see ``failures``), and the others go on.

    Raises:
        ModelLoadError: if a model cannot be loaded.
        BenchmarkError: if a run is ended, by too many failures for example.
    """
    by_model: dict[str, list[Need]] = {}
    for one in planned:
        if one.state == "to do":
            by_model.setdefault(one.need.subject.model, []).append(one.need)
    for name, needs in by_model.items():
        say(f"{name}: {len(needs)} runs and measurements to do")
        model = load(name, device_map=device, dtype=dtype)
        _note_model(root, needs[0].subject, model)
        runs = [need for need in needs if isinstance(need, Run)]
        options = {"progress": progress, "engine": engine, "keep_going": keep_going}
        make_runs(model, runs, root, say, **options)
        for need in needs:
            if isinstance(need, Measure):
                _measure(model, need, root, say)
        del model
        gc.collect()


def make_runs(
    model: LensModel,
    runs: Sequence[Run],
    root: Path,
    say: Say,
    *,
    progress: bool = True,
    engine: Ray | None = None,
    keep_going: bool = False,
) -> None:
    """Make the runs of a loaded model, those that ask the same questions side by side.

    One whose method does not fit is noted (see ``refusals``); options are those of ``make``.

    Raises:
        BenchmarkError: if a run is ended.
    """
    if not runs:
        return
    with nullcontext(model) if engine is None else engine.of(model) as asked:
        for same in _together(runs):
            able = _able(model, same, root, say)
            _ask(asked, able, root, say, progress, keep_going)


def _together(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Yield the runs that ask the same questions, which read each picture once for all."""
    groups: dict[tuple[str, int | None, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.set_key, run.limit, run.subject.seed), []).append(run)
    yield from groups.values()


def _able(model: LensModel, runs: Sequence[Run], root: Path, say: Say) -> list[Run]:
    """Return the runs whose method fits the model; the others are noted as refused."""
    able = []
    for run in runs:
        try:
            asking = run.asking.fitted(model, run.benchmark.max_new_tokens)
            if asking.method is not None:
                asking.method.sessions(Target(model.hf_model, model.processor))
            able.append(run)
        except (ParameterError, InterventionError, ModelLoadError) as error:
            _refuse(run, root, str(error))
            say(f"  {run.benchmark.name}: {run.method and run.method.name} refused: {error}")
    return able


def _ask(
    model: LensModel | Pool,
    able: Sequence[Run],
    root: Path,
    say: Say,
    progress: bool,
    keep_going: bool,
) -> None:
    """Ask runs side by side; if that is ended and the others shall go on, one by one."""
    if not able:
        return
    say(f"  {able[0].benchmark.name}: {len(able)} methods")
    for run in able:
        run.folder(root).parent.mkdir(parents=True, exist_ok=True)
    try:
        run_side_by_side(
            model,
            able[0].benchmark,
            [run.asking for run in able],
            [run.folder(root) for run in able],
            progress=progress,
            resume=True,
        )
        error = None
    except BenchmarkError as ended:
        if not keep_going:
            raise
        error = ended
    if error is not None and len(able) > 1:
        for run in able:
            _ask(model, [run], root, say, progress, keep_going)
        return
    for run in able:
        _note_failure(run, root, None if error is None else str(error))
    if error is not None:
        say(f"  {able[0].benchmark.name} failed: {error}")


def failures(root: Path, run: Run) -> str | None:
    """Return why a run was ended when it was last tried; None if it was not."""
    path = root / "runs" / run.subject.slug / FAILED
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return told.get(name_of(run))


def _note_failure(run: Run, root: Path, reason: str | None) -> None:
    path = root / "runs" / run.subject.slug / FAILED
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = {name: why for name, why in told.items() if name != name_of(run)}
    changed |= {} if reason is None else {name_of(run): reason}
    if changed != told:
        _write(path, changed)


def _measure(model: LensModel, measure: Measure, root: Path, say: Say) -> None:
    say(f"  {measure.name}")
    try:
        found = measure.call(model)
    except (ParameterError, InterventionError, ModelLoadError, BenchmarkError) as error:
        _refuse(measure, root, str(error))
        say(f"  {measure.name} refused: {error}")
        return
    _write(measure.path(root), found)


def _refuse(need: Need, root: Path, reason: str) -> None:
    slug = need.subject.slug
    told = refusals(root, slug) | {name_of(need): f"refused: {reason}"}
    _write(root / "runs" / slug / REFUSED, told)


def _note_model(root: Path, subject: Subject, model: LensModel) -> None:
    """Keep what the model is; refuse another one under the same name.

    Raises:
        BenchmarkError: if the folder holds runs of other weights.
    """
    path = root / "runs" / subject.slug / "model.json"
    told = {**identity(model), **machine(model)}
    weights = told.get("weights")
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("weights") != json.loads(json.dumps(weights)):
            raise BenchmarkError(
                f"{path.parent} holds runs of other weights than {subject.model} has now. Pass "
                "another --out."
            )
        return
    _write(path, told)


def _write(path: Path, told: dict[str, Any]) -> None:
    """Write JSON so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with taking_place(path) as part:
        part.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def found_in(root: Path, planned: Sequence[Planned], subject: Subject) -> Found:
    """Return what a model has in the folder, with why the rest is missing."""
    why = {
        name_of(one.need): one.state
        for one in planned
        if one.need.subject == subject and one.state not in ("finished", "to do")
    }
    return Found(root, why)
