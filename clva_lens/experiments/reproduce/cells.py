"""One cell of a table: the paper's printed number, ours, its interval, and the verdict."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal[
    "inside",
    "outside",
    "printed numbers contradict each other",
    "not printed",
    "not measured",
    "no interval",
    "not comparable",
]


@dataclass(frozen=True)
class Cell:
    """A number of ours beside the paper's, in the paper's units.

    ``row`` and ``column`` are where it stands. ``low`` and ``high`` are the ends of a 95 %
    interval, None where there is none. ``change`` is ours less that of the first row, with its
    paired interval; ``printed_change`` the same of the paper. ``better`` is 1 where more is
    better, −1 where less is, 0 where neither. ``note`` says why something is undefined.
    ``comparable``: both measure the same, on any machine.
    """

    model: str
    row: str
    column: str
    value: float | None
    low: float | None = None
    high: float | None = None
    printed: float | None = None
    contradiction: str | None = None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    printed_change: float | None = None
    better: int = 1
    digits: int = 2
    n: int | None = None
    note: str = ""
    comparable: bool = True

    @property
    def verdict(self) -> Verdict:
        """What our interval says of the printed number; half a printed digit is rounding."""
        if self.printed is None:
            return "not measured" if self.value is None else "not printed"
        if self.contradiction is not None:
            return "printed numbers contradict each other"
        if self.value is None:
            return "not measured"
        if not self.comparable:
            return "not comparable"
        if self.low is None or self.high is None:
            return "no interval"
        half = 0.5 * 10.0**-self.digits
        return "inside" if self.low - half <= self.printed <= self.high + half else "outside"


def marks(cells: list[Cell]) -> dict[int, str]:
    """Return "best" and "second" for cells (by their places) of each model and column.

    Ties share a mark; a column with one value, or one in which all are the same, has none.
    """
    found: dict[int, str] = {}
    columns = dict.fromkeys((one.model, one.column) for one in cells)
    for column in columns:
        here = [
            (place, round(one.value, one.digits) * one.better)
            for place, one in enumerate(cells)
            if (one.model, one.column) == column and one.value is not None and one.better
        ]
        values = sorted({value for _, value in here}, reverse=True)
        if len(values) < 2:
            continue
        words = dict(zip(values, ("best", "second"), strict=False))
        found |= {place: words[value] for place, value in here if value in words}
    return found
