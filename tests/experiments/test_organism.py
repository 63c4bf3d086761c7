"""Organisms: trainings of any depth, on captions, with a picture read early; and their drift."""

import csv
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from typer.testing import CliRunner

from clva_lens.__main__ import app
from clva_lens.experiments.organism import COLUMNS, START, TOLD, TWINS, Trained
from clva_lens.ground.errors import ParameterError
from clva_lens.toy import train as training
from clva_lens.toy.build import tokenizer, untrained
from clva_lens.toy.packing import CAPTION_ROWS, pack
from clva_lens.toy.questions import caption
from clva_lens.toy.reading import Reader
from clva_lens.toy.scenes import sample_scenes
from clva_lens.toy.toys import TOYS


@torch.no_grad()
def test_an_early_reader_sees_its_picture_in_the_first_layers_only():
    scenes = sample_scenes(3, 0)
    packed = pack(scenes, [[caption(one)] for one in scenes], tokenizer(), CAPTION_ROWS)
    start = len(packed.prefix) + 64
    image = slice(len(packed.prefix), start)
    generator = torch.Generator().manual_seed(1)
    length = start + CAPTION_ROWS
    query, key, value = (torch.randn(3, 8, length, 16, generator=generator) for _ in range(3))
    changed = value.clone()
    changed[0, :, image] += 1.0  # only the first picture changes
    module = torch.nn.Module()
    moved = {}
    for layer in (0, 1, 2, 5):
        module.layer_idx, outputs = layer, []
        for values in (value, changed):
            reader = Reader(early=2, generator=torch.Generator().manual_seed(2))
            reader.begin(packed)
            outputs.append(reader(module, query, key, values, None)[0])
        difference = (outputs[0] - outputs[1]).abs().amax(dim=(2, 3))[:, start:]
        moved[layer] = difference.amax(dim=1).tolist()
    print(moved)
    for layer in (0, 1):
        assert moved[layer][0] > 0.1 and moved[layer][1:] == [0, 0]
    for layer in (2, 5):
        assert moved[layer][0] == 0 and max(moved[layer][1:]) > 0.1


def test_every_caption_fits_its_rows():
    words = tokenizer()
    for scene in sample_scenes(200, 3):
        packed = pack([scene], [[caption(scene)]], words, CAPTION_ROWS)
        told = packed.target[0][packed.weight[0] > 0]
        assert words.decode(told, skip_special_tokens=True) == caption(scene).answer


def test_recipes_of_before_go_on(tmp_path):
    """A recipe without the new fields is the recipe with their defaults; another one is not."""
    recipe = training.Recipe(seed=4)
    old = asdict(recipe)
    for name in ("layers", "batch", "captions", "weight_decay", "early", "tower"):
        del old[name]
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    training.check_recipe(recipe, tmp_path)
    with pytest.raises(ParameterError, match="another recipe"):
        training.check_recipe(replace(recipe, layers=16), tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An organism of four layers, after two steps."""
    root = tmp_path_factory.mktemp("organisms")
    name = "toy-llava-captions-early"
    short = replace(
        TOYS.get(name).recipe, layers=6, early=3, batch=2, projector_steps=1, decoder_steps=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: None)
        patch.setitem(TOYS._items, name, TOYS.get(name)._replace(recipe=short))
        told = CliRunner().invoke(app, ["toy", "train", name, "--folder", str(root / name)])
    assert told.exit_code == 0, told.output
    return root / name


def test_what_was_trained_is_what_the_recipe_says(folder):
    trained = Trained.read(folder)
    text = trained.lens.hf_model.model.language_model
    assert len(text.layers) == 6 == trained.recipe.layers
    shipped, own = (
        one.hf_model.model.vision_tower.state_dict() for one in (cl_toy(), trained.lens)
    )
    assert all(torch.equal(shipped[name], own[name]) for name in shipped)
    start = untrained(trained.recipe.seed, 6).model.language_model.layers[3].mlp.up_proj.weight
    assert not torch.equal(start, text.layers[3].mlp.up_proj.weight)
    assert AttentionInterface._global_mapping.get(training.ATTENTION) is not None


def cl_toy():
    import clva_lens as cl

    return cl.load("toy-llava")


def test_drift_is_told_beside_both_nulls(folder, tmp_path):
    out = tmp_path / "told.csv"
    arguments = ["toy", "drift", str(folder), "--out", str(out), "--scenes", "10"]
    told = CliRunner().invoke(app, [*arguments, "--twins", "1", "--limit", "2"])
    assert told.exit_code == 0, told.output
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == (*COLUMNS, *TOLD)
    found = {(row["what"], row["run"]): row for row in rows}
    back = "change of r(first layer)"
    for null in (TWINS, START):
        own, other = (float(found[back, run]["value"]) for run in ("trained", null))
        less = float(found[f"{back}, less {null}", "trained"]["value"])
        assert less == pytest.approx(own - other, abs=1e-6)
    assert {row["early"] for row in rows} == {"3"} and {row["layers"] for row in rows} == {"6"}
    assert found["recall", "blind in all layers"]["n"] == "2"
    with pytest.raises(ParameterError, match="no finished training"):
        Trained.read(tmp_path)


def test_the_page_has_the_numbers_of_its_rows():
    docs = Path(__file__).parents[2] / "docs"
    with (docs / "organism.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["low"]]
    told = {
        " ".join(f"{float(row[name]):+.3f}" for name in ("value", "low", "high")) for row in rows
    }
    page = (docs / "organism.md").read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    shown = re.findall(r"([+-]\d\.\d{3}) \[([+-]\d\.\d{3}), ([+-]\d\.\d{3})\]", page)
    assert len(shown) >= 40
    assert {" ".join(one) for one in shown} <= told
