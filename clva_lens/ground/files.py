"""Files and tables, as all rooms mean them: the digest of a file, and a row of a table."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clva_lens.ground.errors import ParameterError

Row = dict[str, Any]
"""A row of a table that is kept, compared or drawn: a value for each column."""


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def taking_place(path: Path, *, hidden: bool = False) -> Iterator[Path]:
    """Yield what to write, a file or a folder, which takes the place of ``path`` when all is well.

    So ``path`` is never half there. What is written is named as ``path`` with ".part" after it, and
    a dot before it if it is ``hidden``. After an exception it is removed; ``path`` is as it was.
    """
    part = path.with_name(f"{'.' * hidden}{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        if part.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            raise ParameterError(f"'{path}' is a folder. Pass the path of a file in it.")
        part.replace(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
