"""One version: in the package's metadata, the citation and the changelog, and in a commit's tag."""

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import clva_lens as cl
from clva_lens.ground.checkout import packages

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", VERSION)
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    changes = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert VERSION in changes[0]
    assert cl.__version__ == packages()["clva-lens"] == version("clva-lens") == VERSION


def test_a_tag_that_says_another_version_is_refused(tmp_path):
    """The script that packs a release stops at once, before anything is built."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "package", tmp_path / ".ci")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"], ["tag", "v99.0.0"]):
        subprocess.run([*git, *command], check=True)
    done = subprocess.run(
        ["bash", tmp_path / ".ci" / "package"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and list(tmp_path.glob("dist")) == []
    assert f"tagged v99.0.0, but pyproject.toml says {VERSION}" in done.stderr
