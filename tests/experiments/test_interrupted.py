"""An analysis that dies leaves a whole record or none, and running it again mends the rest."""

import shutil
from pathlib import Path

import pytest
from dying import WAYS, dies

from clva_lens.experiments import archive as archives
from clva_lens.experiments import drawing
from clva_lens.experiments import notebook as notebooks
from clva_lens.experiments.archive import Archive, analyse
from clva_lens.experiments.draft import DRAFT, Draft
from clva_lens.experiments.record import DRAWN, FIGURES, dump_json
from clva_lens.ground.errors import RecordError
from clva_lens.ground.files import sha256


@pytest.fixture
def quick(monkeypatch):
    """Notebooks that keep a table and one figure, without a kernel or a drawing."""

    def execute(made, folder, environment, advance):
        draft = Draft(Path(folder))
        draft.keep_rows("grid", [{"x": 1}])
        draft.keep_metrics(largest=1.0)
        told = (folder / DRAFT).read_text().replace('"figures": []', '"figures": [%s]')
        (folder / DRAFT).write_text(told % '{"name": "a", "figure": "surface", "options": {}}')

    def draw(record, folder):
        folder.mkdir(exist_ok=True)
        (folder / "a.png").write_bytes(b"a picture")
        digests = {f"{FIGURES}/a.png": sha256(folder / "a.png")}
        told = {"matplotlib": "0", "files": digests}
        (record.folder / DRAWN).write_text(dump_json(told))
        return [folder / "a.png"]

    monkeypatch.setattr(archives, "origin", lambda: {"commit": None, "changed": False})
    monkeypatch.setattr(archives, "code_digest", lambda: "0" * 64)
    monkeypatch.setattr(notebooks, "execute", execute)
    monkeypatch.setattr(drawing, "draw_figures", draw)


def again(root):
    return analyse("01_powers", ["power=3"], root=root, progress=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_death_at_any_operation_leaves_nothing_that_the_next_run_does_not_mend(
    checkout, tmp_path, quick, way
):
    deaths = 0
    while True:
        root = shutil.copytree(checkout, tmp_path / str(deaths))
        if not dies(lambda root=root: again(root), root, deaths, way):
            break
        deaths += 1
        archive = Archive(root)
        left = archive.problems()
        assert left.pop("01_powers/v1") == []
        assert all("is not in records.json" in one for some in left.values() for one in some)
        again(root)
        assert {name: [] for name in ("01_powers/v1", "01_powers/v2")} == archive.problems()
        old, new = archive.records()
        assert not (old.folder / FIGURES / "surface.png").exists()
        assert (old.folder / DRAWN).exists() and (new.folder / FIGURES / "a.png").exists()
        shown = archive.notebook("01_powers")
        assert shown.read_bytes() == (new.folder / "notebook.ipynb").read_bytes()
        assert {one.name for one in archive.folder.iterdir() if one.is_dir()} == {"01_powers"}
    print(f"{way}: {deaths} deaths")
    assert deaths > 15


def test_a_disk_that_takes_nothing_is_named(checkout, quick, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(RecordError, match=r"could not be written: .*No space left.*Make room"):
        again(checkout)
    assert [record.id for record in Archive(checkout).records()] == ["01_powers/v1"]
    assert Archive(checkout).problems() == {"01_powers/v1": []}
