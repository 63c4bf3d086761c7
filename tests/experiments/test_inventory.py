"""The list of all records: what was removed, copied, renamed or damaged is named, and no more."""

import json
import shutil

import pytest
from powers import run

from clva_lens.experiments.archive import Archive, analyse
from clva_lens.experiments.drawing import check_figures, draw_figures
from clva_lens.experiments.inventory import enlist
from clva_lens.experiments.record import dump_json
from clva_lens.ground.errors import RecordError

ID, OTHER = "01_powers/v1", "01_powers/v2"


@pytest.fixture
def archive(checkout):
    return Archive(checkout)


@pytest.fixture
def two(archive):
    """A record and one beside it that is listed too: a copy under another number and document."""
    first = archive.record("01_powers")
    copy = shutil.copytree(first.folder, first.folder.with_name("v2"))
    document = json.loads((copy / "record.json").read_text())
    document |= {"id": OTHER, "inputs": document["inputs"] | {"data": {}}}
    write_document(copy, document)
    enlist(archive.folder, archive.record("01_powers"))
    assert archive.problems() == {ID: [], OTHER: []}
    return archive


def write_document(folder, document):
    from clva_lens.experiments.record import digest_of

    document["digest"] = digest_of(document)
    (folder / "record.json").write_text(dump_json(document))


def test_a_removed_record_is_missed(two):
    shutil.rmtree(two.record("01_powers").folder)
    assert two.problems() == {ID: [], OTHER: ["is in records.json, but not here"]}
    result = run("verify", "--root", two.root)
    assert result.exit_code == 1 and f"{OTHER}: is in records.json" in result.stdout


@pytest.mark.parametrize("rename", [False, True])
def test_a_copied_and_a_renamed_record_are_told_from_their_originals(archive, rename):
    folder = archive.record("01_powers").folder
    (shutil.move if rename else shutil.copytree)(folder, folder.with_name("v7"))
    found = archive.problems()
    assert found["01_powers/v7"] == [f"is {ID} by its document: it was copied or renamed"]
    assert found[ID] == (["is in records.json, but not here"] if rename else [])


def test_a_record_that_was_made_over_again_is_not_the_listed_one(archive):
    folder = archive.record("01_powers").folder
    document = json.loads((folder / "record.json").read_text())
    document["inputs"]["parameters"]["power"] = 5
    write_document(folder, document)  # with a digest that fits
    assert archive.problems() == {ID: ["the digest is not what records.json says"]}


def test_the_list_of_figures_is_held_by_the_list_of_records(archive):
    file = archive.record("01_powers").folder / "figures" / "figures.json"
    told = json.loads(file.read_text())
    file.write_text(dump_json(told | {"matplotlib": "0.1"}))
    assert archive.problems() == {ID: ["figures/figures.json is not what records.json says"]}
    assert run("figures", "01_powers", "--root", archive.root).exit_code == 0
    assert archive.problems() == {ID: []}, "figures that were drawn again are listed again"


SHAPES = ["[]", "3", "null", "{}", '{"files": 1}', '{"digest": 4, "id": "a"}', "{"]


@pytest.mark.parametrize("name", ["record.json", "figures/figures.json", "metrics.json"])
@pytest.mark.parametrize("text", SHAPES)
def test_one_damaged_record_is_reported_and_the_others_go_on(two, name, text):
    (two.record("01_powers", 1).folder / name).write_text(text)
    found = two.problems()
    assert found[ID] and found[OTHER] == []
    for command in (["verify"], ["records"], ["figures", "--all", "--check"]):
        result = run(*command, "--root", two.root)
        if (name, command[0]) not in QUIET:
            assert result.exit_code == 1 and ID in result.stdout, command
        assert command[0] == "verify" or OTHER in result.stdout, command


# What does not read a file cannot say that it is damaged.
QUIET = {
    ("figures/figures.json", "records"),
    ("metrics.json", "records"),
    ("metrics.json", "figures"),
}


@pytest.mark.parametrize("text", ["[]", "{", '{"01_powers/v1": 3}'])
def test_a_damaged_list_is_named(archive, text):
    (archive.folder / "records.json").write_text(text)
    (problem,) = archive.problems()["records.json"]
    assert "records.json" in problem and "Restore it from git" in problem
    assert run("verify", "--root", archive.root).exit_code == 1


def test_a_damaged_record_does_not_lose_the_work_of_the_next_run(archive, no_kernel):
    (archive.record("01_powers").folder / "record.json").write_text("[]")
    assert analyse("01_powers", root=archive.root, progress=False).record.id == OTHER


def test_only_the_newest_version_keeps_figures_and_notebook(two):
    old = two.record("01_powers", 1)
    two.take_in(two.record("01_powers"))
    assert not [*old.folder.rglob("*.png"), *old.folder.rglob("*.pdf"), *old.folder.rglob("*.csv")]
    assert not (old.folder / "notebook.ipynb").exists()
    assert two.problems() == {ID: [], OTHER: []}
    assert check_figures(old) == ("byte for byte", [])
    before = two.folder / "records.json"
    listed = before.read_bytes()
    assert run("figures", ID, "--root", two.root).exit_code == 0  # on wish they are drawn again
    assert (old.folder / "figures" / "surface.png").is_file() and before.read_bytes() == listed
    draw_figures(old, old.folder / "figures")
    (old.folder / "rows" / "grid.parquet").unlink()
    assert two.problems()[ID] == ["rows/grid.parquet is missing"]


def test_figures_that_are_not_kept_are_compared_by_their_digests(two):
    old = two.record("01_powers", 1)
    old.thin()
    file = old.folder / "figures" / "figures.json"
    told = json.loads(file.read_text())
    told["files"]["figures/surface.csv"] = "0" * 64
    file.write_text(dump_json(told))
    assert check_figures(old)[1] == [f"{ID}: surface.csv is not what the record draws"]
    file.write_text(dump_json(told | {"matplotlib": "0.1"}))
    assert check_figures(old)[1] == [f"{ID}: surface.csv is not what the record draws"]


def test_a_version_that_is_no_number_is_no_record(archive):
    with pytest.raises(RecordError, match="there is no record 01_powers/vnewest"):
        archive.record("01_powers", "newest")
