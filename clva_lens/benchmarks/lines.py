"""JSON lines that are appended to while a run goes on, and read back after it was killed.

One line: ``{"id": "0/cup", "text": "yes", "margin": 4.2, "error": null}``.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from clva_lens.ground.errors import BenchmarkError


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of the whole lines of a file; what comes after the last newline is none.

    It was never finished; a machine that lost power may leave zeros where the last lines would be.

    Raises:
        BenchmarkError: if there is no such file, it cannot be read, or a whole line is no object.
    """
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:  # also UnicodeDecodeError
            raise broken_line(path, number, f"is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise broken_line(path, number, f"is a {type(row).__name__}, not an object")
        yield row


def end_of(path: Path, count: int | None = None) -> int:
    """Return where the first ``count`` whole lines of a file end, or all of them, in bytes."""
    return sum(len(line) for line in islice(_whole_lines(path), count))


def sha256_of_lines(path: Path) -> str:
    """Return the SHA-256 of the whole lines of a file: of an undamaged one, of the file."""
    total = hashlib.sha256()
    for line in _whole_lines(path):
        total.update(line)
    return total.hexdigest()


def _whole_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except FileNotFoundError:
        raise BenchmarkError(f"there is no file '{path}'. Check the path.") from None
    except OSError as error:
        raise BenchmarkError(
            f"'{path}' cannot be read ({error}). Check that it is a file, and may be read."
        ) from error


def broken_line(path: Path, number: int, what: str) -> BenchmarkError:
    """Return the error that names a line of a file, counted from 1, and how to go on."""
    return BenchmarkError(
        f"line {number} of {path} {what}. Mend that line, or keep the lines before it "
        f"(head -n {number - 1}) and continue the run with --resume."
    )


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """Return the rows as JSON lines, each with its newline."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
