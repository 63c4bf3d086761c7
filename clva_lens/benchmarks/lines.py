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

RESUME = (
    "Mend that line, or keep the lines before it (head -n {before}) and continue the run with "
    "--resume."
)
FOREIGN = "Mend that line, or pass a file whose rows have id, text, margin and error."


_NEWLINE = ord("\n")
_decode = json.JSONDecoder().raw_decode


def each_line(path: Path, remedy: str = RESUME) -> Iterator[dict[str, Any]]:
    """Yield the objects of the whole lines of a file; what comes after the last newline is none.

    It was never finished; a machine that lost power may leave zeros where the last lines would be.

    Raises:
        BenchmarkError: if there is no such file, it cannot be read, or a whole line is no object.
    """
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = value_of(line)
        except ValueError as error:
            raise broken_line(path, number, f"is no JSON ({error})", remedy) from None
        if not isinstance(row, dict):
            raise broken_line(path, number, f"is a {type(row).__name__}, not an object", remedy)
        yield row


def value_of(line: bytes) -> Any:
    """Return what a line of JSON says; it is half the work of ``json.loads`` where nothing is odd.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        value, end = _decode(text := line.decode())
        if end == len(text) - 1 and line[-1] == _NEWLINE:
            return value
    except ValueError:
        pass
    return json.loads(line)  # white space around the value, another encoding, or no JSON


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
            for line in file:
                if line[-1] == _NEWLINE:
                    yield line
    except FileNotFoundError:
        raise BenchmarkError(f"there is no file '{path}'. Check the path.") from None
    except OSError as error:
        raise BenchmarkError(
            f"'{path}' cannot be read ({error}). Check that it is a file, and may be read."
        ) from error


def broken_line(path: Path, number: int, what: str, remedy: str = RESUME) -> BenchmarkError:
    """Return the error that names a line of a file, counted from 1, and how to go on."""
    told = remedy.format(before=number - 1)
    return BenchmarkError(f"line {number} of {path} {what}. {told}")


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """Return the rows as JSON lines, each with its newline."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
