"""Files and tables, as all rooms mean them: the digest of a file, and a row of a table."""

import hashlib
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A row of a table that is kept, compared or drawn: a value for each column."""


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
