"""All records of a checkout: which there are, how one is added, and how two differ."""

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from clva_lens.experiments import inventory
from clva_lens.experiments.record import (
    NOTEBOOK,
    RECORD,
    Record,
    digest_of,
    dump_json,
    read_json,
)
from clva_lens.ground.checkout import HOUSE, code_digest, origin, packages
from clva_lens.ground.errors import RecordError
from clva_lens.ground.files import sha256, taking_place
from clva_lens.ground.parameters import check_arguments
from clva_lens.ground.progress import progress_bar


def find_root(given: Path | None = None) -> Path:
    """Return the folder with ``analyses/``: the given one, the current one, or the checkout.

    Raises:
        RecordError: if none has it.
    """
    tried = [given] if given else [Path.cwd(), HOUSE.parent]
    for folder in tried:
        if (folder / "analyses").is_dir():
            return folder
    raise RecordError(
        f"there is no folder 'analyses' in {' or '.join(str(one) for one in tried)}. Run this in a "
        "checkout of clva_lens, or pass --root."
    )


class Archive:
    """The analyses, notebooks and records below one folder."""

    def __init__(self, root: Path) -> None:
        """Take the folder that holds ``analyses/``."""
        self.root = root
        self.folder = root / "analyses" / "records"

    def analyses(self) -> list[str]:
        """Return the names of the analyses, sorted."""
        return sorted(path.stem for path in (self.root / "analyses").glob("[0-9][0-9]_*.py"))

    def source(self, slug: str) -> Path:
        """Return the source of an analysis.

        Raises:
            RecordError: if there is none of that name.
        """
        path = self.root / "analyses" / f"{slug}.py"
        if slug not in self.analyses():
            raise RecordError(
                f"there is no analysis '{slug}'. Pass one of: {', '.join(self.analyses()) or '–'}."
            )
        return path

    def notebook(self, slug: str) -> Path:
        """Return where the executed notebook of an analysis lies."""
        return self.root / "notebooks" / f"{slug}.ipynb"

    def records(self, slug: str | None = None) -> list[Record]:
        """Return the records of one analysis or of all, oldest version first."""
        found = [
            Record(path)
            for path in self.folder.glob(f"{slug or '*'}/v*")
            if path.name[1:].isdecimal() and not path.parent.name.startswith(".")
        ]
        return sorted(found, key=lambda one: (one.folder.parent.name, one.version))

    def record(self, slug: str, version: int | str | None = None) -> Record:
        """Return one version, or the newest.

        Raises:
            RecordError: if there is none.
        """
        known = self.records(slug)
        wanted = None if version is None else str(version).removeprefix("v")
        found = [one for one in known if wanted in (None, str(one.version))]
        if not found:
            listed = ", ".join(one.id for one in known) or "none"
            raise RecordError(
                f"there is no record {slug}{'' if wanted is None else f'/v{wanted}'}; there is "
                f"{listed}. Make one: clva-lens analyse {slug}."
            )
        return found[-1]

    def problems(self) -> dict[str, list[str]]:
        """Return what is wrong with each record, by its id; see ``inventory.problems``."""
        return inventory.problems(self.folder, self.records())

    def take_in(self, record: Record) -> None:
        """List a record, show its notebook, and thin the versions before it."""
        from clva_lens.experiments.notebook import shown

        inventory.enlist(self.folder, record)
        slug, executed = record.folder.parent.name, record.folder / NOTEBOOK
        *older, newest = self.records(slug)
        if record.version != newest.version or not executed.is_file():
            return
        place = self.notebook(slug)
        place.parent.mkdir(parents=True, exist_ok=True)
        with taking_place(place, hidden=True) as part:
            part.write_bytes(shown(executed))
        for one in older:
            with suppress(RecordError):  # a damaged one is left for verify to report
                one.thin()


def open_record(
    slug: str, version: int | str | None = None, root: str | Path | None = None
) -> Record:
    """Return a record: the newest version unless one is named.

    Args:
        slug: the analysis, such as "03_drift".
        version: such as 2 or "v2"; None is the newest.
        root: the folder with ``analyses/``; None is the current one, or the checkout.

    Raises:
        RecordError: if there is none.
        ParameterError: if an argument is none of these.

    Example::

        drift = cl.open_record("03_drift")
        drift.metrics, drift.rows("regression")
    """
    check_arguments(open_record, slug=slug, version=version, root=root)
    return Archive(find_root(None if root is None else Path(root))).record(slug, version)


@dataclass(frozen=True)
class Outcome:
    """What running an analysis led to.

    ``new``: the record was written. Else one with the same inputs was there, and ``changed`` names
    the metrics that came out differently this time.
    """

    record: Record
    new: bool
    changed: tuple[str, ...] = ()


def analyse(
    slug: str,
    texts: list[str] | None = None,
    *,
    root: Path | None = None,
    progress: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run an analysis, and keep it as a new version unless its inputs are those of an old one.

    ``texts`` are parameters as ``name=value``; every analysis takes ``device`` and ``dtype`` beside
    its own, which stand for ``load``'s, and which the record tells of each model. ``environment``
    is added to the notebook's. The executed notebook of a
    new version goes to ``notebooks/`` too. However this is stopped, there is a whole record or
    none, and running it again puts everything beside it right.

    Raises:
        RecordError: if there is no such analysis, it fails, another process is running it, or
            nothing can be written.
        ParameterError: if a parameter does not fit.
    """
    require("jupytext", "nbclient", "ipykernel", "pyarrow")
    from clva_lens.experiments import notebook as notebooks
    from clva_lens.experiments.draft import DRAFT, STAGING

    archive = Archive(find_root(root))
    source = notebooks.read_source(archive.source(slug))
    defaults = notebooks.parameters(source)
    own, around_all = _for_all(texts or [], defaults)
    given = notebooks.parse_parameters(slug, defaults, own)
    made = notebooks.inject(source, given)
    with _alone(archive, slug) as staging:
        around = {STAGING: str(staging), **around_all, **(environment or {})}
        whence, began = origin(), time.perf_counter()  # before the notebook is written
        with progress_bar(slug, len(made.cells), wanted=progress) as advance:
            error = notebooks.execute(made, staging, around, advance)
        seconds = round(time.perf_counter() - began, 1)
        if error is not None:
            failed = archive.folder / ".failed" / f"{slug}.ipynb"
            notebooks.write(made, failed)
            raise RecordError(
                f"the notebook of {slug} failed: {error}. Nothing was recorded; look at {failed}."
            )
        told = _taken(staging / DRAFT, slug)
        asked = {"parameters": defaults | given, "given": given}
        inputs = {"analysis": slug, "source": notebooks.code_cells(source), **asked, **_used(told)}
        versions = archive.records(slug)
        same = [one for one in versions if _inputs(one) == inputs]
        if same:
            outcome = Outcome(same[-1], False, _changed(same[-1], Record(staging)))
        else:
            notebooks.write(made, staging / NOTEBOOK)
            version = max((one.version for one in versions), default=0) + 1
            document = _document(f"{slug}/v{version}", inputs, told, {**whence, "seconds": seconds})
            target = archive.folder / slug / f"v{version}"
            outcome = Outcome(_finish(staging, target, document), True)
        archive.take_in(outcome.record)
        return outcome


def _for_all(texts: Sequence[str], own: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the parameters of an analysis itself, and the environment of those that all have."""
    from clva_lens.lens.load import DEVICE, DTYPE

    everywhere = {"device": DEVICE, "dtype": DTYPE}
    pairs = [(text, *text.partition("=")) for text in texts]
    common = {
        everywhere[name]: value
        for _, name, sign, value in pairs
        if sign and name in everywhere and name not in own
    }
    rest = [text for text, name, _, _ in pairs if everywhere.get(name) not in common]
    return rest, common


def _taken(draft: Path, slug: str) -> dict[str, Any]:
    """Return what a notebook told of itself, whose file is removed: it is no part of the record."""
    if not draft.is_file():
        raise RecordError(f"{slug} keeps nothing. Call cl.new_record() in it, and keep rows.")
    told = read_json(draft)
    draft.unlink()
    return told


def _used(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a notebook used, and with what code."""
    used = {key: told[key] for key in ("models", "runs", "data")}
    return {**used, "code": code_digest(), "packages": packages()}


def _document(
    id: str, inputs: dict[str, Any], told: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """Return a record's document; ``measured`` are origin and seconds of the run."""
    return {
        "id": id,
        "inputs": inputs,
        "surroundings": {
            **measured,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "peak_memory_mib": told["peak_memory_mib"],
            "processors": os.cpu_count(),
        },
        "excluded": told["excluded"],
        "figures": told["figures"],
    }


def _finish(staging: Path, target: Path, document: dict[str, Any]) -> Record:
    """Draw the figures, write the document, and move the whole folder to its place at once."""
    from clva_lens.experiments.drawing import draw_figures

    files = {
        path.relative_to(staging).as_posix(): sha256(path)
        for path in sorted(staging.rglob("*"))
        if path.is_file()
    }
    document["files"] = files
    document["digest"] = digest_of(document)
    (staging / RECORD).write_text(dump_json(document), encoding="utf-8")
    draw_figures(Record(staging), staging / "figures")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.rename(target)
    return Record(target)


def _inputs(record: Record) -> dict[str, Any] | None:
    """Return a record's inputs; None of a damaged one, which no run is the same as."""
    try:
        return record.inputs
    except RecordError:
        return None


def _changed(old: Record, new: Record) -> tuple[str, ...]:
    names = sorted(old.metrics.keys() | new.metrics.keys())
    return tuple(name for name in names if old.metrics.get(name) != new.metrics.get(name))


@contextmanager
def _alone(archive: Archive, slug: str) -> Iterator[Path]:
    """Yield an empty folder that this process alone writes to, and remove it afterwards."""
    from filelock import FileLock, Timeout

    lock, staging = FileLock(archive.folder / f".{slug}.lock"), None
    try:
        archive.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        for left in archive.folder.glob(f".{slug}.*.staging"):  # by a process that was killed,
            shutil.rmtree(left, ignore_errors=True)  # whose kernel may still write there
        staging = Path(mkdtemp(".staging", f".{slug}.", archive.folder))
        yield staging
    except Timeout:
        raise RecordError(f"{slug} is being run by another process. Wait for it.") from None
    except OSError as error:
        raise RecordError(
            f"the record of {slug} could not be written: {error}. Make room, or pass a folder that "
            "can be written to with --root, and run it again."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        lock.release()


def differences(first: Record, second: Record) -> list[tuple[str, Any, Any]]:
    """Return every input and metric that differs, as (name, first's, second's); None if absent."""
    a, b = ({**_flat("", one.inputs), **_flat("metrics.", one.metrics)} for one in (first, second))
    names = [*a, *(name for name in b if name not in a)]
    return [(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def _flat(start: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        pairs = enumerate(value)
    else:
        return {start.rstrip("."): value}
    return {name: one for key, part in pairs for name, one in _flat(f"{start}{key}.", part).items()}


def require(*modules: str) -> None:
    """Raise unless optional packages are there.

    Raises:
        RecordError: naming them and how to install them.
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise RecordError(
            f"analyses need {', '.join(absent)}. Install: pip install 'clva-lens[analyses]'."
        )
