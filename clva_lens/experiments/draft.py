"""What a notebook keeps while it runs; ``clva-lens analyse`` makes a record of it."""

import os
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from numpy.typing import ArrayLike
from torch import Tensor

from clva_lens.benchmarks.run_folder import Report, plain
from clva_lens.experiments.record import ARRAYS, METRICS, ROWS, Kept, dump_json
from clva_lens.figures.base import Drawing, drawing_of_record
from clva_lens.ground.errors import RecordError
from clva_lens.ground.files import Row
from clva_lens.lens.load import LensModel
from clva_lens.lens.provenance import identity, machine

STAGING = "CLVA_LENS_STAGING"
DRAFT = "draft.json"

# Of a benchmark's run: what decides it, and what is kept of each answer.
_DECIDES = (
    "benchmark",
    "benchmark_version",
    "settings",
    "method",
    "decoding",
    "seed",
    "limit",
    "batch_size",
    "samples",
)
_ANSWER = ("id", "question", "label", "answer", "prediction", "margin", "error")


class Draft(Kept):
    """A record in the making. What is drawn is read back from what was kept."""

    def __init__(self, folder: Path) -> None:
        """Keep everything in ``folder``."""
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._models: list[dict[str, Any]] = []
        self._data: dict[str, str] = {}
        self._excluded: dict[str, int] = {}
        self._figures: list[dict[str, Any]] = []
        self._runs: list[dict[str, Any]] = []
        self._answers: list[Row] = []
        self._write()

    @property
    def id(self) -> str:
        """What stands for the record's name until it has one."""
        return "draft"

    def uses(self, model: LensModel) -> None:
        """Note a model: its name, revision, weights, and how it is run."""
        # A folder's path says nothing elsewhere; the weights' SHA-256 does.
        name = Path(model.name).name if Path(model.name).is_dir() else model.name
        told = {"name": name, **identity(model), **machine(model)}
        told.pop("code")
        if told not in self._models:
            self._models.append(told)
        self._write()

    def data(self, digests: Mapping[str, str]) -> None:
        """Note the SHA-256 of data files by name, as ``Benchmark.digests`` gives them."""
        self._data |= digests
        self._write()

    def ran(self, name: str, report: Report) -> None:
        """Note a benchmark's run: what decided it, and every answer, in the table "answers".

        ``name`` is what the analysis calls the method. Samples that failed are exclusions.
        """
        told = {key: report.record[key] for key in _DECIDES}
        self._runs.append(plain({"name": name, **told}))
        place = {
            "benchmark": told["benchmark"],
            "method": name,
            "decoding": told["decoding"]["name"],
        }
        self._answers += [place | {key: row.get(key) for key in _ANSWER} for row in report.rows]
        parquet.write_table(
            arrow.Table.from_pylist(self._answers), self._file_of(ROWS, "answers", ".parquet")
        )
        failed = sum(row.get("error") is not None for row in report.rows)
        self.excludes("failed samples", self._excluded.get("failed samples", 0) + failed)

    def excludes(self, reason: str, count: int) -> None:
        """Note how many samples were left out, and why; 0 is worth noting too."""
        self._excluded[reason] = count
        self._write()

    def keep_rows(self, name: str, rows: Sequence[Row]) -> None:
        """Keep a table.

        Raises:
            RecordError: if there are no rows, or the name is taken.
        """
        if not rows:
            raise RecordError(f"the table '{name}' has no rows. Keep a table that has some.")
        file = self._free(ROWS, name, ".parquet")
        parquet.write_table(arrow.Table.from_pylist(list(rows)), file)
        self._write()

    def keep_arrays(self, name: str, **arrays: ArrayLike | Tensor) -> None:
        """Keep arrays by their names.

        Raises:
            RecordError: if one holds Python objects, or the name is taken.
        """
        plain = {key: np.asarray(value) for key, value in arrays.items()}
        odd = [key for key, value in plain.items() if value.dtype.hasobject]
        if odd:
            raise RecordError(f"the array '{odd[0]}' holds Python objects. Keep numbers or text.")
        np.savez_compressed(self._free(ARRAYS, name, ".npz"), allow_pickle=False, **plain)
        self._write()

    def keep_metrics(self, **metrics: float | int | None) -> None:
        """Keep the numbers that the finding rests on; they are what ``diff`` compares.

        None says that a number is undefined here: it is left out.

        Raises:
            RecordError: if one is nan or infinite.
        """
        defined = {name: value for name, value in metrics.items() if value is not None}
        odd = [name for name, value in defined.items() if not np.isfinite(value)]
        if odd:
            raise RecordError(f"the metric '{odd[0]}' is {metrics[odd[0]]}. Leave it out.")
        told = self.metrics | {name: float(value) for name, value in defined.items()}
        (self.folder / METRICS).write_text(dump_json(told), encoding="utf-8")
        self._write()

    def draw(self, figure: str, name: str | None = None, **options: Any) -> Drawing:
        """Return a registered figure of what was kept, and make it one of the record's.

        ``name`` is its file's, if one figure is drawn more than once; ``options`` are JSON.

        Raises:
            UnknownName: if there is no such figure.
            RecordError: if the name is taken, or what it draws was not kept.
        """
        name = name or figure
        if any(one["name"] == name for one in self._figures):
            raise RecordError(f"there is a figure '{name}' already. Pass name= another one.")
        drawing = drawing_of_record(figure)(self, **options)
        self._figures.append({"name": name, "figure": figure, "options": options})
        self._write()
        return drawing

    def _free(self, room: str, name: str, ending: str) -> Path:
        file = self._file_of(room, name, ending)
        if file.exists():
            raise RecordError(f"there are {room} '{name}' already. Keep them under another name.")
        return file

    def _file_of(self, room: str, name: str, ending: str) -> Path:
        file = self.folder / room / f"{name}{ending}"
        file.parent.mkdir(exist_ok=True)
        return file

    def _write(self) -> None:
        """Write what is no table, array or metric."""
        told = {
            "models": self._models,
            "data": self._data,
            "excluded": self._excluded,
            "runs": self._runs,
            "figures": self._figures,
            "peak_memory_mib": process_peak(),
        }
        (self.folder / DRAFT).write_text(dump_json(told), encoding="utf-8")


def process_peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def new_record() -> Draft:
    """Return where a notebook keeps what it found.

    ``clva-lens analyse`` makes it a record. In a notebook that is run by hand it lies in a
    temporary folder, so that everything works and nothing is recorded.

    >>> record = cl.new_record()
    >>> record.keep_metrics(largest=14)
    """
    staging = os.environ.get(STAGING)
    return Draft(Path(staging) if staging else Path(tempfile.mkdtemp(prefix="clva_lens_draft_")))
