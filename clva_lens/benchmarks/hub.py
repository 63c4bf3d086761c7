"""Data sets of the Hugging Face Hub, read from their parquet files, pictures included.

A data set is named ``hf://datasets/OWNER/NAME@COMMIT``. The commit is asked for because a data set
can change under its name. ``lmms-lab`` became ``lmms-lab-encoder``; either owner is tried.
"""

import io
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image

from clva_lens.ground.errors import BenchmarkError

_NAME = re.compile(r"hf://datasets/([\w.-]+)/([\w.-]+)(?:@(.+))?")
_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@([^/]+)/(.+)")
_RENAMED = {"lmms-lab": "lmms-lab-encoder", "lmms-lab-encoder": "lmms-lab"}


def is_hub(data: str | Path | None) -> bool:
    """Return whether ``data`` names a data set of the Hub."""
    return isinstance(data, str) and data.startswith("hf:")


def download(data: str) -> Path:
    """Return the folder of a data set's parquet files, downloaded if they are not in the cache.

    Raises:
        BenchmarkError: if the name is malformed or has no commit, or there is no such data set.
    """
    found = _NAME.fullmatch(data)
    if not found or not found.group(3):
        raise BenchmarkError(
            f"'{data}' is not hf://datasets/OWNER/NAME@COMMIT. Write it in full: the commit is on "
            "the data set's page, and without it the result could not be repeated."
        )
    owner, name, revision = found.groups()
    owners = [owner, _RENAMED[owner]] if owner in _RENAMED else [owner]
    errors = []
    for one in owners:
        try:
            folder = snapshot_download(
                f"{one}/{name}", repo_type="dataset", revision=revision, allow_patterns="*.parquet"
            )
            return Path(folder)
        except (OSError, ValueError) as error:
            errors.append(f"{one}/{name}: {str(error).strip().splitlines()[0]}")
    raise BenchmarkError(
        f"the data set could not be had from the Hub ({'; '.join(errors)}). Check its name and "
        "commit, or download it and pass its folder."
    )


def download_file(data: str) -> Path:
    """Return one file of a data set, downloaded if it is not in the cache.

    Raises:
        BenchmarkError: if the name is malformed or has no commit, or there is no such file.
    """
    found = _FILE.fullmatch(data)
    if not found:
        raise BenchmarkError(
            f"'{data}' is not hf://datasets/OWNER/NAME@COMMIT/FILE. Write it in full: without the "
            "commit the result could not be repeated."
        )
    name, revision, file = found.groups()
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        raise BenchmarkError(
            f"'{file}' could not be had from {name} on the Hub "
            f"({str(error).strip().splitlines()[0]}). Check the name and the commit, or download "
            "it and pass its path."
        ) from error


def has_parquet(folder: str | Path) -> bool:
    """Return whether there are parquet files in a folder or its sub-folders."""
    return any(any(Path(folder).glob(place)) for place in ("*.parquet", "*/*.parquet"))


def parquet_files(folder: Path, splits: Sequence[str]) -> list[Path]:
    """Return the parquet files of the first of ``splits`` that has any, in the order of names.

    Files are called ``SPLIT-00000-of-00003….parquet``, in any sub-folder.

    Raises:
        BenchmarkError: if there are none.
    """
    everything = sorted(folder.rglob("*.parquet"))
    for split in splits:
        files = [path for path in everything if path.name.startswith(f"{split}-")]
        if files:
            return files
    names = ", ".join(path.name for path in everything[:5]) or "no parquet file"
    raise BenchmarkError(
        f"there is no split {' or '.join(splits)} in {folder}; it has {names}. Pass the folder "
        "with the data set's parquet files."
    )


def read_parquet(files: Sequence[Path], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the columns ``keys`` of every row.

    Raises:
        BenchmarkError: if pyarrow is not installed, or a file cannot be read or lacks a column.
    """
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise BenchmarkError(
            "reading a data set of the Hub needs pyarrow. Run `pip install pyarrow`, or pass the "
            "benchmark's own files."
        ) from error
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                absent = set(keys) - set(file.schema_arrow.names)
                if absent:
                    raise BenchmarkError(
                        f"{path} has no column {', '.join(sorted(absent))}; it has "
                        f"{', '.join(file.schema_arrow.names)}. Pass the lmms-eval data set."
                    )
                for batch in file.iter_batches(batch_size=64, columns=list(keys)):
                    yield from batch.to_pylist()
        except (OSError, ValueError) as error:
            if isinstance(error, BenchmarkError):
                raise
            raise BenchmarkError(
                f"{path} could not be read as parquet ({error}). Download it again."
            ) from error


def picture(cell: Any) -> Image.Image:
    """Return the picture in a cell of an image column, decoded when it is first used."""
    if not isinstance(cell, dict) or not cell.get("bytes"):
        raise BenchmarkError(
            f"the image column has {type(cell).__name__} without bytes. Pass a data set that "
            "carries its pictures."
        )
    return Image.open(io.BytesIO(cell["bytes"]))
