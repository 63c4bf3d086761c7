"""One table or figure of the report, of all models together."""

from collections import Counter
from dataclasses import dataclass

from clva_lens.experiments.reproduce.cells import Cell, marks
from clva_lens.experiments.reproduce.items import Answered


@dataclass(frozen=True)
class Section:
    """One item of the report: its cells of all models, figures by file, answers and sentences."""

    name: str
    title: str
    method: str
    cells: list[Cell]
    figures: list[tuple[str, str]]
    answers: list[Answered]
    notes: list[str]

    @property
    def slug(self) -> str:
        """Its name as a file's."""
        return self.name.replace(" ", "_").replace("-", "_")

    @property
    def marks(self) -> dict[int, str]:
        """Which cells are best and second of their model and column."""
        return marks(self.cells)

    @property
    def verdicts(self) -> Counter[str]:
        """How many cells have each verdict."""
        return Counter(cell.verdict for cell in self.cells)
