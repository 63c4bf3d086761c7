"""JSON lines that are appended to while a run goes on, and read back after it was killed.

One line: ``{"id": "0/cup", "text": "yes", "margin": 4.2, "error": null}``.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from clva_lens.ground.errors import BenchmarkError

RESUME = (
    "Mend that line, or keep the lines before it (head -n {before}) and continue the run with "
    "--resume."
)
FOREIGN = "Mend that line, or pass a file whose rows have id, text, margin and error."


class Lines(NamedTuple):
    """The objects of a file of JSON lines, and where each line ends, in bytes."""

    rows: list[dict[str, Any]]
    ends: list[int]


def read_lines(path: Path, remedy: str = RESUME) -> Lines:
    """Return the whole lines of a file; what comes after the last newline was never finished.

    Raises:
        BenchmarkError: if there is no such file, or a whole line is no JSON object.
    """
    if not path.is_file():
        raise BenchmarkError(f"there is no file '{path}'. Check the path.")
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    start = 0
    # A machine that lost power may leave zeros where the last lines were to be.
    content = path.read_bytes().rstrip(b"\0")
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        start += len(line) + 1
        try:
            row = json.loads(line)
        except ValueError as error:  # also UnicodeDecodeError
            raise broken_line(path, number, f"is no JSON ({error})", remedy) from None
        if not isinstance(row, dict):
            raise broken_line(path, number, f"is a {type(row).__name__}, not an object", remedy)
        rows.append(row)
        ends.append(start)
    return Lines(rows, ends)


def broken_line(path: Path, number: int, what: str, remedy: str = RESUME) -> BenchmarkError:
    """Return the error that names a line of a file, counted from 1, and how to go on."""
    told = remedy.format(before=number - 1)
    return BenchmarkError(f"line {number} of {path} {what}. {told}")


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """Return the rows as JSON lines, each with its newline."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
