"""The list of all records, which git tracks: what each one's document and figures have to be.

A record's own digest shows that something in its folder was changed. That a whole record was
removed, copied or renamed, or that the list of its figures was edited, shows here only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from clva_lens.experiments.record import DRAWN, Record, dump_json, fits, read_json
from clva_lens.ground.errors import RecordError
from clva_lens.ground.files import sha256, taking_place

LIST = "records.json"
Entry = Mapping[str, str | None]


def read_list(folder: Path) -> dict[str, Entry]:
    """Return the entries of the list in ``folder``, by the records' ids; none without a list.

    Raises:
        RecordError: if the file is not such a list.
    """
    file = folder / LIST
    if not file.is_file():
        return {}
    entries = read_json(file)
    if not isinstance(entries, dict) or not all(fits(e, {"digest": str}) for e in entries.values()):
        raise RecordError(f"'{file}' is no list of records. Restore it from git.")
    return entries


def entry_of(record: Record) -> Entry:
    """Return what the list says of a record: its digest, and the SHA-256 of its figures' list."""
    drawn = record.folder / DRAWN
    figures = sha256(drawn) if drawn.is_file() else None
    return {"digest": record.document["digest"], "figures": figures}


def enlist(folder: Path, record: Record) -> None:
    """Put a record into the list, as it is now."""
    from filelock import FileLock

    with FileLock(folder / f".{LIST}.lock"):
        entries, entry = read_list(folder), entry_of(record)
        if entries.get(record.id) != entry:
            listed = dump_json({**entries, record.id: entry})
            with taking_place(folder / LIST, hidden=True) as part:
                part.write_text(listed, encoding="utf-8")


def problems(folder: Path, records: Sequence[Record]) -> dict[str, list[str]]:
    """Return what is wrong with each record, by its id, among them those that are only listed.

    A damaged record is reported as one, and the others are looked at all the same.
    """
    try:
        entries = read_list(folder)
    except RecordError as error:
        return {LIST: [str(error)]}
    newest = {record.folder.parent: record for record in records}
    found = {name: [f"is in {LIST}, but not here"] for name in entries}
    for record in records:
        superseded = newest[record.folder.parent] is not record
        try:
            found[record.id] = [*_misplaced(record, entries), *record.problems(superseded)]
        except RecordError as error:
            found[record.id] = [str(error)]
    return found


def _misplaced(record: Record, entries: Mapping[str, Entry]) -> list[str]:
    told, listed = record.document["id"], entries.get(record.id)
    if told != record.id:
        return [f"is {told} by its document: it was copied or renamed"]
    if listed is None:
        return [f"is not in {LIST}: run its analysis again with the same inputs, which lists it"]
    now = entry_of(record)
    return [
        f"{what} is not what {LIST} says"
        for what, key in (("the digest", "digest"), (DRAWN, "figures"))
        if listed.get(key) != now[key]
    ]
