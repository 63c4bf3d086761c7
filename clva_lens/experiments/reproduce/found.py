"""What lies in the folder of a reproduction, read back: nothing here runs a model."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.run_folder import Report, score
from clva_lens.experiments.reproduce.needs import Measure, Need, Run

REFUSED = "refused.json"


class Missing(Exception):
    """Something that a cell needs is not there; the text says why."""


@dataclass
class Found:
    """The runs and measurements of one model below ``root``; each is read once."""

    root: Path
    why: dict[str, str] = field(default_factory=dict)
    """Why a need could not be met, by its key: a method was refused, or data are missing."""
    _reports: dict[str, Report] = field(default_factory=dict, repr=False)

    def report(self, run: Run) -> Report:
        """Return a finished run's report, scored from its answers.

        Raises:
            Missing: if it is not finished, with the reason.
        """
        folder = run.folder(self.root)
        name = str(folder)
        if name not in self._reports:
            if not run.finished(self.root):
                raise Missing(self.reason(run))
            self._reports[name] = score(folder)
        return self._reports[name]

    def measured(self, measure: Measure) -> dict[str, Any]:
        """Return what was measured.

        Raises:
            Missing: if it was not, with the reason.
        """
        if not measure.finished(self.root):
            raise Missing(self.reason(measure))
        return json.loads(measure.path(self.root).read_text(encoding="utf-8"))

    def reason(self, need: Need) -> str:
        """Return why a need is not met."""
        refused = refusals(self.root, need.subject.slug)
        return refused.get(name_of(need)) or self.why.get(name_of(need)) or "not run yet"


def name_of(need: Need) -> str:
    """Return the name that a need has among those that were refused."""
    return need.folder(Path()).as_posix() if isinstance(need, Run) else need.path(Path()).as_posix()


def refusals(root: Path, slug: str) -> dict[str, str]:
    """Return why a model was not asked something, by the name of the need."""
    path = root / "runs" / slug / REFUSED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
