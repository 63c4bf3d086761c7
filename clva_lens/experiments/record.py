"""A record: what an analysis was given, what it found, and what decides whether it is the same.

==========================  ======================================================================
``record.json``             the inputs, the surroundings, the exclusions, the SHA-256 of each file
``metrics.json``            the numbers that the finding rests on
``rows/NAME.parquet``       tables, one row a measurement
``arrays/NAME.npz``         arrays by name
``figures/NAME.pdf …``      each figure as PDF and PNG, with the rows drawn as CSV
``figures/figures.json``    the SHA-256 of these; figures are drawn from the rest and may be redrawn
``notebook.ipynb``          the notebook as it was executed
``NAME.html``               a page that it wrote
==========================  ======================================================================

Only the newest version of an analysis keeps its figures and its notebook. Of an older one, figures
are drawn again from what is kept, to the byte; its notebook is in the history of git, and
``record.json`` has its SHA-256 (``Record.thin``).

The *inputs* say which record it is: parameters, models by the SHA-256 of their weights, data files
by theirs, the analysis' code cells, this package's sources, kernel, dtype, device, packages. The
surroundings (commit, machine, time, memory) do not.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from clva_lens.ground.errors import RecordError
from clva_lens.ground.files import Row, sha256

RECORD, METRICS, NOTEBOOK = "record.json", "metrics.json", "notebook.ipynb"
ROWS, ARRAYS, FIGURES = "rows", "arrays", "figures"
DRAWN = f"{FIGURES}/figures.json"
_DOCUMENT = {
    "id": str,
    "digest": str,
    "files": dict,
    "figures": [{"name": str, "figure": str, "options": dict}],
    "inputs": {"given": dict, "parameters": dict, "models": [{"name": str}]},
    "surroundings": {"date": str},
}


class Kept:
    """The tables, arrays and metrics in a folder; a record, or one that is being made."""

    def __init__(self, folder: Path) -> None:
        """Read from ``folder``."""
        self.folder = folder

    @property
    def id(self) -> str:
        """The record's name: analysis and version."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def rows(self, name: str) -> list[Row]:
        """Return a table that was kept, one dictionary a row.

        Raises:
            RecordError: if there is none of that name.
        """
        from pyarrow import parquet

        return parquet.read_table(self._file(ROWS, name, ".parquet")).to_pylist()

    def arrays(self, name: str) -> dict[str, Any]:
        """Return arrays that were kept under a name; pickles are refused.

        Raises:
            RecordError: if there are none of that name.
        """
        import numpy as np

        with np.load(self._file(ARRAYS, name, ".npz"), allow_pickle=False) as found:
            return dict(found)

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that were kept."""
        file = self.folder / METRICS
        found = read_json(file) if file.is_file() else {}
        if not isinstance(found, dict):
            raise RecordError(f"'{file}' holds no metrics by name. Restore it from git.")
        return found

    def _file(self, room: str, name: str, ending: str) -> Path:
        file = self.folder / room / f"{name}{ending}"
        if not file.is_file():
            known = sorted(path.name.removesuffix(ending) for path in file.parent.glob("*"))
            raise RecordError(
                f"{self.id} keeps no {room} '{name}', but {', '.join(known) or 'none'}. Pass one "
                "of these, or run the analysis again."
            )
        return file


class Record(Kept):
    """A record on disk, which is never changed."""

    @cached_property
    def document(self) -> dict[str, Any]:
        """What ``record.json`` says.

        Raises:
            RecordError: if there is none, or it is no JSON of this shape.
        """
        file = self.folder / RECORD
        if not file.is_file():
            raise RecordError(f"'{self.folder}' has no {RECORD}, so it is no record. Check it.")
        document = read_json(file)
        if not fits(document, _DOCUMENT):
            raise RecordError(f"'{file}' does not say what a record says. Restore it from git.")
        return document

    @property
    def version(self) -> int:
        """The number of the version, from 1."""
        return int(self.folder.name.removeprefix("v"))

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything that decides which record it is."""
        return self.document["inputs"]

    @property
    def figures(self) -> list[dict[str, Any]]:
        """The figures of the analysis: ``name``, ``figure`` (as registered) and ``options``."""
        return self.document["figures"]

    def draw(self, name: str) -> Any:
        """Return one of its figures, a ``Drawing``, drawn from what is kept.

        Raises:
            RecordError: if it has no such figure.
        """
        found = next((one for one in self.figures if one["name"] == name), None)
        if found is None:
            known = ", ".join(one["name"] for one in self.figures) or "none"
            raise RecordError(f"{self.id} has no figure '{name}', but {known}. Pass one of these.")
        from clva_lens.figures.base import drawing_of_record

        return drawing_of_record(found["figure"])(self, **found["options"])

    def thin(self) -> None:
        """Remove what a version with a newer one beside it does not keep."""
        for name in self._thinned():
            (self.folder / name).unlink(missing_ok=True)

    def problems(self, superseded: bool = False) -> list[str]:
        """Return what is wrong with the files: changed, missing, or not of the record.

        ``superseded``: there is a newer version, so that this one may be thin.
        """
        told = {**self.document["files"], **self.drawn()["files"]}
        here = {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        }
        needed = set(told) - (self._thinned() if superseded else set())
        found = [f"{name} is missing" for name in sorted(needed - here)]
        found += [
            f"{name} was changed"
            for name in sorted(set(told) & here)
            if sha256(self.folder / name) != told[name]
        ]
        found += [
            f"{name} is no part of the record"
            for name in sorted(here - set(told) - {RECORD, DRAWN})
        ]
        if self.document["digest"] != digest_of(self.document):
            found.insert(0, f"{RECORD} was changed")
        return found

    def drawn(self) -> dict[str, Any]:
        """What was drawn: ``files``, the SHA-256 of each, and ``matplotlib``, the version.

        Raises:
            RecordError: if the list of figures is of another shape.
        """
        file = self.folder / DRAWN
        told = read_json(file) if file.is_file() else {"files": {}, "matplotlib": None}
        if not fits(told, {"files": dict}) or "matplotlib" not in told:
            raise RecordError(f"'{file}' is no list of figures. Restore it from git.")
        return told

    def _thinned(self) -> set[str]:
        return {*self.drawn()["files"], NOTEBOOK}

    def __repr__(self) -> str:
        """Return its name and metrics."""
        numbers = "".join(f"\n  {name}  {value:.4g}" for name, value in self.metrics.items())
        return f"Record {self.id}{numbers}"


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record's document without that digest."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(dump_json(rest).encode()).hexdigest()


def dump_json(value: Any) -> str:
    """Return JSON with sorted keys; the same value gives the same text."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def fits(value: Any, shape: Any) -> bool:
    """Return whether JSON has a shape: a type, a mapping of keys to shapes, or a list of one."""
    if isinstance(shape, Mapping):
        return isinstance(value, Mapping) and all(
            name in value and fits(value[name], inner) for name, inner in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    return isinstance(value, shape)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        RecordError: if it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"'{path}' is no JSON: {error}. Restore it from git.") from error
