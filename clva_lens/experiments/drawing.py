"""A record's figures as files, and whether the files are still what the record says."""

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from clva_lens.experiments.record import (
    DRAWN,
    FIGURES,
    METRICS,
    Record,
    dump_json,
)
from clva_lens.figures.base import save
from clva_lens.ground.files import sha256

# Of 255 levels: another matplotlib places text and edges a little differently.
_PIXEL, _SHARE = 32, 0.02


def draw_figures(record: Record, folder: Path) -> list[Path]:
    """Draw a record's figures into ``folder`` as PDF, PNG and CSV; return the paths.

    The same record gives the same bytes. The record's id and the SHA-256 of what was drawn from
    stand in the metadata of each picture.

    Raises:
        UnknownName: if a figure is registered no longer.
        FigureError: if the rows cannot be drawn.
    """
    kept = {
        name: digest
        for name, digest in record.document["files"].items()
        if name.startswith(("rows/", "arrays/")) or name == METRICS
    }
    origin = {"record": record.document["id"], "files": kept}
    paths = [
        path
        for one in record.figures
        for path in save(record.draw(one["name"]), folder, one["name"], None, origin)
    ]
    if folder == record.folder / FIGURES:
        told = {
            "matplotlib": version("matplotlib"),
            "files": {f"{FIGURES}/{path.name}": sha256(path) for path in paths},
        }
        folder.mkdir(exist_ok=True)
        (record.folder / DRAWN).write_text(dump_json(told), encoding="utf-8")
    return paths


def check_figures(record: Record) -> tuple[str, list[str]]:
    """Return how a record's figures were compared with new drawings, and which differ.

    With the matplotlib that drew them, files must be equal byte for byte. With another one, the
    rows drawn must be equal, and the pictures but for fewer than 2 % of the pixels, as far as they
    are kept.
    """
    told = record.drawn()
    same = told["matplotlib"] == version("matplotlib")
    how = "byte for byte" if same else f"rows and pixels (drawn by matplotlib {told['matplotlib']})"
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for new in draw_figures(record, Path(folder)):
            old = record.folder / FIGURES / new.name
            digest = told["files"].get(f"{FIGURES}/{new.name}")
            if digest is None:
                wrong.append(f"{record.id}: {new.name} is missing")
            elif not (_equal(old, new, same) if old.is_file() else _was(digest, new, same)):
                wrong.append(f"{record.id}: {new.name} is not what the record draws")
    return how, wrong


def _was(digest: str, new: Path, same: bool) -> bool:
    """Return whether a file that is not kept was the same; only one matplotlib draws it alike."""
    return sha256(new) == digest or not (same or new.suffix == ".csv")


def _equal(old: Path, new: Path, same: bool) -> bool:
    if same or new.suffix == ".csv":
        return old.read_bytes() == new.read_bytes()
    if new.suffix == ".pdf":
        return True
    first, second = (np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in (old, new))
    if first.shape != second.shape:
        return False
    return bool((np.abs(first - second).max(axis=-1) > _PIXEL).mean() < _SHARE)
