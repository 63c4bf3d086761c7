"""Writing the files of a run: never half there, held to what was written, and faults in words."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clva_lens.benchmarks.lines import as_lines
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256, taking_place

_CONTINUE = "then continue with resume=True (--resume)"
# What a disk says, and what helps; EDQUOT and ESTALE are not on every system.
_REMEDIES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("ENOSPC", "EDQUOT", "EFBIG"), f"Free some space there, {_CONTINUE}, or pass another folder."),
    (
        ("EROFS", "EACCES", "EPERM"),
        f"Make it writable, {_CONTINUE}, or pass another folder. A finished run can be scored as "
        "it is.",
    ),
    (("ENAMETOOLONG",), "Pass a folder with a shorter path."),
    (("ENOTDIR", "EEXIST"), "A part of its path is a file. Pass another folder."),
)
_OTHERWISE = f"See that the disk is there, {_CONTINUE}."


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """Turn every fault of the disk in the block into a BenchmarkError that says what helps."""
    try:
        yield
    except OSError as error:
        raise told(folder, error) from error


def told(folder: Path, error: OSError) -> BenchmarkError:
    """Return the error for a fault of the disk that a run lies on."""
    name = errno.errorcode.get(error.errno or 0, "")
    remedy = next((remedy for names, remedy in _REMEDIES if name in names), _OTHERWISE)
    return BenchmarkError(f"the run in '{folder}' cannot be read or written ({error}). {remedy}")


def document(value: Mapping[str, Any]) -> bytes:
    """Return a JSON object as it stands in a file."""
    return (json.dumps(value, indent=1) + "\n").encode()


class RunFiles:
    """The files of a run as this process left them; nobody else may touch them meanwhile.

    A file is held by its size and SHA-256 from when it was taken or written.
    """

    def __init__(self, folder: Path) -> None:
        """Hold none yet."""
        self.folder = folder
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, Any] = {}

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file that is held; one that was never there is empty."""
        return self._digests.get(name, hashlib.sha256()).hexdigest()

    def take(self, name: str, size: int | None = None) -> None:
        """Hold a file as it is, if it is there, after cutting it to ``size`` bytes if given."""
        with in_words(self.folder):
            path = self.folder / name
            content = path.read_bytes() if path.exists() else b""
            if size is not None and len(content) > size:
                content = content[:size]
                with path.open("r+b") as file:
                    file.truncate(size)
                    os.fsync(file.fileno())
        self._hold(name, content)

    def has(self, name: str, content: bytes) -> bool:
        """Return whether a file is there with this content."""
        with in_words(self.folder):
            path = self.folder / name
            return path.is_file() and path.read_bytes() == content

    def replace(self, name: str, content: bytes) -> None:
        """Write a file so that it is never half there."""
        whole = taking_place(self.folder / name)
        with in_words(self.folder), whole as part, part.open("wb") as file:
            _write(file, content)
        self._hold(name, content)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write rows to the end of a file; once this returns they survive a crash."""
        content = as_lines(rows)
        with in_words(self.folder), (self.folder / name).open("ab") as file:
            _write(file, content)
        self._sizes[name] = self._sizes.get(name, 0) + len(content)
        self._digests.setdefault(name, hashlib.sha256()).update(content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with in_words(self.folder):
            (self.folder / name).unlink(missing_ok=True)

    def require_sizes(self) -> None:
        """Return silently if every file that is held has the size that it was left with.

        Raises:
            BenchmarkError: naming a file that is gone, or that somebody else wrote to.
        """
        for name, size in self._sizes.items():
            with in_words(self.folder):
                found = _size(self.folder / name)
            if (found or 0) != size:
                state = "is gone" if found is None else f"has {found} bytes where {size} were left"
                raise self._touched(name, state)

    def require_contents(self) -> None:
        """Return silently if every file that is held has the content that it was left with.

        Raises:
            BenchmarkError: naming a file that is gone, or that somebody else wrote to.
        """
        self.require_sizes()
        for name, size in self._sizes.items():
            with in_words(self.folder):
                if size and sha256(self.folder / name) != self.sha256(name):
                    raise self._touched(name, "has another content than was left in it")

    def _hold(self, name: str, content: bytes) -> None:
        self._sizes[name] = len(content)
        self._digests[name] = hashlib.sha256(content)

    def _touched(self, name: str, state: str) -> BenchmarkError:
        return BenchmarkError(
            f"something else writes to '{self.folder}' while the run goes on: {name} {state}. Stop "
            "it and restore the folder, then continue with resume=True (--resume), or run into "
            "another folder."
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
