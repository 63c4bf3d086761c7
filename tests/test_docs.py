"""The pages: their Python runs, their links lead somewhere, every public name is there; Sphinx."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import torch
from pages import COMMUNITY, DOCS, README, ROOT

import clva_lens as cl
from clva_lens.figures.base import FIGURES
from clva_lens.lens.maps import MAPS
from clva_lens.methods.base import METHODS

RUNNING = tuple(page for page in DOCS if pages.blocks(page, "python"))
LANGUAGES = {"python", "text", "", "{eval-rst}", "{toctree}"}


def test_pages_have_examples():
    assert len(RUNNING) >= 11
    assert "docs/looking.md" in RUNNING
    for page in (README, *DOCS, *COMMUNITY):
        used = {language for language, _ in pages.fences(page)}
        assert used <= LANGUAGES, f"{page}: {used - LANGUAGES}"
        assert pages.text_of(page).count("\n```") % 2 == 0, page
        plain = "".join(pages.blocks(page, ""))
        assert "import clva_lens" not in plain, f"{page} has Python that is not run: mark it text"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("page", RUNNING)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.setattr(cl, "load", pages.load)
    names = pages.run(page, tmp_path)
    for check in CHECKS.get(Path(page).stem, ()):
        check(names)


def looked(names):
    assert names["saliency"].shape == (12, 64)
    assert len(names["told"].words) == names["told"].maps.shape[2] > 5
    shown = names["scanned"].findings
    assert len(shown) >= 4
    assert max(abs(one.value - one.null) for one in shown) > 0.1
    assert names["read"].parts.difference != names["parts"].difference
    assert names["reading"].layers == (0, 2, 4, 6, 8, 10)


def acted(names):
    assert names["registered"] == {"look-harder"}
    assert names["logits"].shape[:2] == names["prompt"]["input_ids"].shape
    with torch.inference_mode(), cl.intervening(names["model"], cl.CLVA()):
        clva = names["model"].hf_model(**names["prompt"]).logits
    others = (names["harder"], names["needed"])
    assert all((one.detach() - clva)[0, -1].abs().max() > 0.01 for one in others)


def answered(names):
    assert len(names["both"]) == 2
    assert len(names["greedy"].rows) == len(names["clva"].rows)


def added(names):
    assert names["always"] == 0.5
    assert names["registered"] == set()


def errors_said(names):
    assert "was called outside a trace" in names["said"]


def planned(names):
    """The table is what the code above it counts, on the shapes of three published models."""
    page = pages.text_of("docs/scale.md")
    assert len(names["lines"]) == 3 and all(f"\n{line}\n" in page for line in names["lines"])
    assert 0.05 < names["gigabytes"] < 2


CHECKS = {
    "adding": [added],
    "looking": [looked],
    "acting": [acted],
    "answering": [answered],
    "errors": [errors_said],
    "scale": [planned],
}


def slugs(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ (.*)$", pages.prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", (README, *DOCS, *COMMUNITY))
def test_links_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", pages.prose(page)):
        if target.startswith("https://"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in slugs(str(path.resolve().relative_to(ROOT))), f"{page}: {anchor}"


def test_every_page_is_in_the_contents():
    entries = "\n".join(pages.blocks("docs/index.md", "{toctree}")).split()
    listed = [one for one in entries if f"docs/{one}.md" in DOCS]
    assert sorted(listed) == sorted(Path(page).stem for page in DOCS if page != "docs/index.md")


def test_every_public_name_is_in_the_reference():
    page = pages.text_of("docs/api.md")
    named = re.findall(r"^\.\. (?:auto|py:)\w+:: clva_lens\.(\w+)(?:\(|$)", page, re.MULTILINE)
    assert sorted(named) == sorted(cl.__all__)


def test_every_method_has_its_formulas():
    page = pages.text_of("docs/methods.md")
    for _, kind in METHODS.items():
        assert f".. automodule:: {kind.__module__}\n" in page
        assert f"{kind.__name__}`](../{kind.__module__.replace('.', '/')}.py)" in page


def test_every_map_has_its_formula():
    page = pages.text_of("docs/maps.md")
    for name, kind in MAPS.items():
        assert f".. automodule:: {kind.__module__}\n" in page
        assert f"[`{name}`](../{kind.__module__.replace('.', '/')}.py)" in page


def test_every_figure_is_in_the_gallery():
    page = pages.text_of("docs/gallery.md")
    shown = re.findall(r"^!\[(\w+)\]\(pictures/gallery/\1\.png\)$", page, re.MULTILINE)
    assert shown == sorted(FIGURES.names())


def test_the_readme_is_short_and_its_pictures_small():
    assert len(pages.text_of(README).splitlines()) <= 250
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", pages.text_of(README))
    assert len(pictures) == 2
    assert all((ROOT / picture).stat().st_size < 120_000 for picture in pictures)


def test_the_site_builds(tmp_path):
    """Strictly: a warning or a reference to nothing is an error."""
    build = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going", "docs"]
    done = subprocess.run(
        [*build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    shown = html.unescape(re.sub(r"<[^>]+>", "", reference))
    assert "intensity: Float[Tensor, '*batch layer head']" in shown
    assert "prompt: Asked, method: Method | str | None" in shown
    assert "jaxtyping." not in shown
