"""``analyse --new`` writes an analysis that runs as it is, and ``records`` names versions whole."""

import re
import shutil

import pytest
from powers import make_checkout, run
from rich.console import Console

from clva_lens.experiments.archive import Archive, analyse
from clva_lens.experiments.template import write_template
from clva_lens.ground.errors import RecordError


def test_a_template_runs_as_it_is(tmp_path, no_kernel):
    root = make_checkout(tmp_path)
    result = run("analyse", "--new", "my_question", "--root", root)
    assert result.exit_code == 0 and "clva-lens analyse 02_my_question" in result.stdout
    given = ["questions=14", 'clva={"tau": 1.5}']
    outcome = analyse("02_my_question", given, root=root, progress=False)
    assert outcome.new and outcome.record.problems() == []
    assert outcome.record.inputs["runs"][1]["method"]["tau"] == 1.5
    assert "# My question" in (root / "analyses" / "02_my_question.py").read_text()


def test_a_template_takes_no_name_twice_and_no_odd_one(tmp_path):
    root = make_checkout(tmp_path)
    assert write_template(root, "07_seven").name == "07_seven.py"
    assert write_template(root, "next_one").name == "08_next_one.py"
    before = sorted((root / "analyses").iterdir())
    for name in ("07_seven", "07_other", "01_powers"):
        with pytest.raises(RecordError, match=r"there is 0[17]_\w+ already"):
            write_template(root, name)
    for name in ("../out", "My question", "", "7_x"):
        with pytest.raises(RecordError, match="is no name of an analysis"):
            write_template(root, name)
    assert sorted((root / "analyses").iterdir()) == before


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_a_list_of_records_names_each_version_whole(checkout, columns, monkeypatch):
    record = Archive(checkout).record("01_powers")
    shutil.copytree(record.folder, record.folder.with_name("v12"))
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(Console, "width", property(lambda self: columns))
    lines = run("records", "--root", checkout).stdout.splitlines()
    for version in ("01_powers/v1", "01_powers/v12"):
        assert any(re.match(rf"\s*{version}(\s|$)", line) for line in lines)
    assert not any("…" in line for line in lines)
