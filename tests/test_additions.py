"""To add a method, a benchmark, a figure or a family is two files: its own, and its room's list.

A package that is made for this test does it, with the README's own example for the method. What
it adds is listed, keeps the laws of its room as they stand, and is taken out again.
"""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from test_readme import blocks

import clva_lens as cl
from clva_lens.benchmarks.base import BENCHMARKS
from clva_lens.figures.base import FIGURES
from clva_lens.methods.base import METHODS
from clva_lens.models.family import FAMILIES

TESTS = Path(__file__).parent
BENCHMARK = '''
from dataclasses import dataclass
from typing import ClassVar

from clva_lens.benchmarks.base import BENCHMARKS, Benchmark, Sample, choose
from clva_lens.benchmarks.pope import score_pope


@dataclass(frozen=True)
class Parity(Benchmark):
    """Is a number even?"""

    version: ClassVar[str] = "1"
    parser: str = "strict"
    max_new_tokens: int = 4
    name: ClassVar[str] = "parity"

    def samples(self, limit=None, seed=0):
        """Ten numbers."""
        found = [
            Sample(str(n), None, f"is {n} even?", "no" if n % 2 else "yes", str(n // 2))
            for n in range(10)
        ]
        return choose(found, limit, seed)

    def score(self, samples, answers):
        """As POPE."""
        return score_pope(samples, answers, self.parser)


BENCHMARKS.register("parity", Parity())
'''
FIGURE = '''
from clva_lens.figures.base import COLUMN, Drawing, Example, figure

ROWS = [{"x": 0, "y": 1.0}, {"x": 1, "y": 2.0}]


def recorded(record, table):
    """Draw a table."""
    return dots(record.rows(table))


@figure(
    "dots",
    of_record=recorded,
    example=Example({"rows": ROWS}, tables={"points": ROWS}, options={"table": "points"}),
)
def dots(rows):
    """Return a dot a row."""
    fig = Drawing(COLUMN, 2.0, rows)
    ax = fig.add_subplot()
    ax.plot([row["x"] for row in rows], [row["y"] for row in rows], "o")
    ax.set_xlabel("x")
    return fig
'''
FAMILY = '''
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig
from transformers import VipLlavaForConditionalGeneration

from clva_lens.models.family import FAMILIES, TINY_DECODER
from clva_lens.models.llava import Llava


class Vip(Llava):
    """ViP-LLaVA: features of several layers."""

    name = "vip"
    architectures = ("VipLlavaForConditionalGeneration",)

    def visual_count(self, model, site):
        """Return the number of patches."""
        rows, columns = self.grid(model, site)
        return rows * columns

    def grid(self, model, site):
        """Return the patch grid."""
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return side, side

    def tiny(self, **text_config):
        """Return a small one."""
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=24,
        )
        config = VipLlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**(TINY_DECODER | text_config)),
            image_token_index=5,
            vision_feature_layers=[-1, -2],
        )
        return VipLlavaForConditionalGeneration(config).eval()


FAMILIES.register("vip", Vip())
'''


def method_source():
    (own,) = [code for code in blocks("python") if "@cl.register_method" in code]
    return "import clva_lens as cl\n" + own[: own.index("\n\nwith model.trace")]


ADDITIONS = {
    "methods": (METHODS, "look-harder", method_source),
    "benchmarks": (BENCHMARKS, "parity", lambda: BENCHMARK),
    "figures": (FIGURES, "dots", lambda: FIGURE),
    "models": (FAMILIES, "vip", lambda: FAMILY),
}


@pytest.fixture
def added(request, tmp_path, monkeypatch):
    """One addition to one room, in a package of its own; returns its name."""
    registry, name, source = ADDITIONS[request.param]
    package = tmp_path / "additions"
    package.mkdir()
    (package / "mine.py").write_text(source())
    (package / "__init__.py").write_text("from additions import mine as mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = registry.names()
    try:
        importlib.import_module("additions")
        assert set(registry.names()) - set(before) == {name}
        assert sorted(path.name for path in package.glob("*.py")) == ["__init__.py", "mine.py"]
        assert len((package / "__init__.py").read_text().splitlines()) == 1
        assert name in getattr(cl, request.param)()
        yield name
    finally:
        if name in registry.names():
            registry.remove(name)
        for module in ("additions", "additions.mine"):
            sys.modules.pop(module, None)
    assert registry.names() == before


def laws_of(monkeypatch, *files):
    """The laws of those test files that are held for every name of a registry."""
    found = {}
    for file in files:
        monkeypatch.syspath_prepend(str((TESTS / file).parent))
        module = importlib.import_module(Path(file).stem)
        for law, function in inspect.getmembers(module, inspect.isfunction):
            marks = getattr(function, "pytestmark", ())
            names = [mark.args[0] for mark in marks if mark.name == "parametrize"]
            if law.startswith("test_") and {"name", ("place", "name")} & set(names):
                found[law] = function
    return found


def hold(laws, **given):
    """Call each law with what it asks for, and return which were held, not skipped."""
    held = []
    for law, function in laws.items():
        wanted = inspect.signature(function).parameters
        try:
            function(**{key: given[key] for key in wanted})
        except pytest.skip.Exception as reason:
            print(f"{law}: {reason}")
        else:
            held.append(law)
    return set(held)


@pytest.mark.parametrize("added", ["benchmarks"], indirect=True)
def test_a_benchmark_more(added, monkeypatch):
    files = ("benchmarks/test_benchmark_laws.py", "test_settings.py")
    laws = laws_of(monkeypatch, *files)
    laws = {law: one for law, one in laws.items() if "method" not in law}
    assert len(laws) == 6
    assert hold(laws, name=added) == set(laws)


@pytest.mark.parametrize("added", ["figures"], indirect=True)
def test_a_figure_more(added, monkeypatch, tmp_path):
    laws = laws_of(monkeypatch, "figures/test_figure_laws.py")
    assert len(laws) == 3
    assert hold(laws, name=added, tmp_path=tmp_path, monkeypatch=monkeypatch) == set(laws)


@pytest.mark.parametrize("added", ["models"], indirect=True)
def test_a_family_more(added, monkeypatch, tmp_path):
    laws = laws_of(monkeypatch, "models/test_family_laws.py")
    assert len(laws) == 6
    assert hold(laws, name=added, tmp_path=tmp_path) == set(laws)


@pytest.mark.parametrize("added", ["methods"], indirect=True)
def test_the_readmes_own_method(added, monkeypatch, ask, one):
    """It is a method like those of the package: all laws of methods hold for it."""
    laws = laws_of(monkeypatch, "acting/test_identity.py", "acting/test_registering.py")
    laws |= {
        law: function
        for law, function in laws_of(monkeypatch, "test_settings.py").items()
        if "method" in law
    }
    assert len(laws) >= 10 and "test_zero_strength" in laws
    with torch.inference_mode():
        bare = one.hf_model(**ask(one, 3).inputs).logits
    method = METHODS.get(added)()
    given = {"lens": one, "ask": ask, "one": one, "bare": bare, "site": "decoder"}
    assert hold(laws, name=added, method=method, **given) == set(laws)
