"""A reproduction from its plan to its report."""

import importlib
import json
import pkgutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import clva_lens.experiments.reproduce as room
from clva_lens.experiments.reproduce.items import Item, Part
from clva_lens.experiments.reproduce.needs import Run
from clva_lens.experiments.reproduce.running import Planned, Say, found_in, make, plan
from clva_lens.experiments.reproduce.subjects import Subject
from clva_lens.experiments.reproduce.writing import write_report
from clva_lens.ground.checkout import packages
from clva_lens.lens.workers import Ray

REPRODUCTION = "reproduction.json"


def items_of() -> None:
    """Import every file of this folder, which registers the tables and figures."""
    for found in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{found.name}")


def reproduce_paper(
    items: Mapping[str, Item],
    subjects: Sequence[Subject],
    out: Path,
    say: Say,
    *,
    engine: Ray | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Make what is missing, then the report; return the paths of its files.

    With an ``engine`` several processes ask the benchmarks' questions; attention is looked at here.

    Raises:
        ModelLoadError: if a model cannot be loaded.
        BenchmarkError: if a run is ended, or the folder holds runs of other weights.
    """
    planned = _plan(items, subjects, out)
    make(planned, out, say, engine=engine, device=device, dtype=dtype, progress=progress)
    parts = {
        item: {one.slug: _part(item, one, found_in(out, planned, one)) for one in subjects}
        for item in items.values()
    }
    origin = {"models": [one.model for one in subjects], **packages()}
    out.mkdir(parents=True, exist_ok=True)
    paths = write_report(parts, out, facts(subjects, planned), origin)
    told = {
        "models": {one.slug: one.model for one in subjects},
        "items": list(items),
        "limits": {one.slug: one.limit for one in subjects},
        "seed": subjects[0].seed,
        "runs": sorted(
            p.need.folder(out).relative_to(out).as_posix()
            for p in planned
            if isinstance(p.need, Run) and p.need.finished(out)
        ),
        "not made": {
            state: count
            for state, count in Counter(p.state for p in planned).items()
            if state not in ("finished", "to do")
        },
        "packages": packages(),
    }
    path = out / REPRODUCTION
    path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*paths, path]


def _part(item: Item, subject: Subject, found: Any) -> Part:
    return item.part(subject, found)


def _plan(items: Mapping[str, Item], subjects: Sequence[Subject], out: Path) -> list[Planned]:
    needs = [need for one in subjects for item in items.values() for need in item.needs(one)]
    return plan(needs, out)


def facts(subjects: Sequence[Subject], planned: Sequence[Planned]) -> list[tuple[str, str]]:
    """Return what the top of the report says: of whom, how much, and what could not be made."""
    found = []
    for one in subjects:
        whose = "not a model of the paper" if one.printed is None else f"the paper's {one.printed}"
        limit = one.limit_of("pope")
        size = "all samples" if limit is None else f"{limit} samples of each set"
        found.append((one.model, f"{whose}; {size}, seed {one.seed}"))
    reasons = Counter(
        (p.need.subject.model, p.state) for p in planned if p.state not in ("finished", "to do")
    )
    found += [(model, f"{count} × {state}") for (model, state), count in reasons.items()]
    return found


def say_plan(
    items: Mapping[str, Item], subjects: Sequence[Subject], out: Path, say: Say
) -> list[Planned]:
    """Say what each item needs, what is there, and how many forward passes are left at most."""
    every = _plan(items, subjects, out)
    state = {id(one.need): one for one in every}
    for subject in subjects:
        say(subject.model)
        for name, item in items.items():
            mine = _plan({name: item}, [subject], out)
            states = Counter(
                one.state if one.state in ("finished", "to do") else "not possible" for one in mine
            )
            told = ", ".join(f"{count} {word}" for word, count in sorted(states.items()))
            passes = sum(one.passes for one in mine)
            say(f"  {name}: {told or 'nothing needed'}; at most {passes:,} forward passes left")
            for reason in dict.fromkeys(
                one.state for one in mine if one.state not in ("finished", "to do")
            ):
                say(f"    {reason}")
    total = sum(one.passes for one in state.values())
    say(
        f"In all {len(every)} runs and measurements ({sum(p.state == 'finished' for p in every)} "
        f"finished), at most {total:,} forward passes left: tables share runs, and answers may be "
        "shorter."
    )
    return every
