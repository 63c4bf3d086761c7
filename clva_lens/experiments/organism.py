"""Does late regression emerge? Trained folders beside what they are without training.

The paper's claim is that maps of late layers go back to the first layer's. A training of
``clva-lens toy train`` is asked: how far r with the first layer's map rises from the positive
anchor's layer to the last three (as analyses 03 and 13 have it), beside two nulls: models of its
shape with random weights, and its own initial weights (all of them, tower and projector too),
whose decoder is biased towards looking at equal content. And whether it learned its task, and
where it needs the picture: an answer that does not change when a layer is blind tells nothing
about that layer's map.
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from clva_lens.benchmarks.base import BENCHMARKS, Sample
from clva_lens.experiments.drift_nulls import (
    AWAY,
    BACK,
    LESS,
    drift_of,
    drift_rows,
    untrained_twin,
)
from clva_lens.experiments.toy_measures import question_samples
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.files import Row, taking_place
from clva_lens.lens.evaluate import evaluate
from clva_lens.lens.load import LensModel, load
from clva_lens.methods.clva import CLVA
from clva_lens.methods.knockout import KnockOut
from clva_lens.toy.build import untrained
from clva_lens.toy.questions import CAPTION_REQUEST, Question, exist_question
from clva_lens.toy.scenes import sample_scenes
from clva_lens.toy.train import RECIPE, Recipe

LAST = 3
"""Over how many last layers a map is averaged: analysis 13's number."""
TWINS, START = "random weights", "its initial weights"
COLUMNS = ("model", "seed", "layers", "captions", "early", "weight_decay", "steps")
TOLD = ("what", "run", "value", "low", "high", "n")


class Trained(NamedTuple):
    """A finished training: its name, what it was trained by, and the model."""

    name: str
    recipe: Recipe
    lens: LensModel

    @classmethod
    def read(cls, folder: Path) -> "Trained":
        """Return what ``clva-lens toy train`` wrote into a folder.

        Raises:
            ParameterError: if it is no folder of a finished training of a toy LLaVA.
        """
        source = folder / "model" if (folder / "model").is_dir() else folder
        path = source / RECIPE
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            recipe = Recipe(**{**told, "noise": tuple(told["noise"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ParameterError(
                f"{folder} is no finished training of a toy LLaVA ({error}). Pass a folder that "
                "'clva-lens toy train' wrote to its end."
            ) from error
        return cls(folder.name, recipe, load(source))

    @property
    def facts(self) -> Row:
        """Return what tells trainings apart."""
        recipe = self.recipe
        told = (self.name, recipe.seed, recipe.layers, recipe.captions, recipe.early)
        ends = recipe.weight_decay, recipe.decoder_steps
        return dict(zip(COLUMNS, (*told, *ends), strict=True))


def asked_of(recipe: Recipe, scenes: int, seed: int) -> list[Sample]:
    """Return what a model is looked at for: its caption of each picture, or present objects."""
    pictures = sample_scenes(scenes, seed)
    if recipe.captions:
        request = Question("caption", CAPTION_REQUEST, "", "")
        return question_samples(pictures, [(number, request) for number in range(scenes)])
    asked = [
        (number, exist_question(scene, kind))
        for number, scene in enumerate(pictures)
        for kind in scene.kinds
    ]
    return question_samples(pictures, asked)


def late_regression(
    trained: Trained, *, scenes: int = 60, twins: int = 2, seed: int = 77
) -> list[Row]:
    """Return how far maps go back to the first layer's and leave the anchor's, beside both nulls.

    A row has ``what, run, value, low, high, n``; differences are paired by picture, and intervals
    are over pictures.
    """
    lens, recipe = trained.lens, trained.recipe
    samples = asked_of(recipe, scenes, seed)
    start = LensModel(
        untrained(recipe.seed, recipe.layers).eval(), lens.processor, f"{lens.name}, as it started"
    )
    nulls = {TWINS: [untrained_twin(lens, number) for number in range(twins)], START: [start]}
    rows: list[Row] = []
    for null, models in nulls.items():
        found = drift_of(
            {"greedy": ([lens], None), "untrained": (models, None)},
            samples,
            CLVA(),
            batch_size=20,
            progress=False,
        )
        named = {"greedy": "trained", "untrained": null}
        for row in drift_rows(found, last=LAST):
            if row["what"] in (BACK, AWAY, BACK + LESS, AWAY + LESS):
                what = row["what"].replace(LESS, f", less {null}")
                told = (what, named[row["run"]], row["mean"], row["low"], row["high"])
                rows.append(dict(zip(TOLD, (*told, len(found.groups)), strict=True)))
    return list({(row["what"], row["run"]): row for row in rows}.values())


def needs_picture(trained: Trained, *, limit: int = 40) -> list[Row]:
    """Return how well a model does its task, and blind in its first or its last half.

    Of captions CHAIR's recall and CHAIR_i, of questions adversarial accuracy, in fractions.
    """
    lens, recipe = trained.lens, trained.recipe
    half = recipe.layers // 2
    runs = {
        "trained": None,
        f"blind in layers 0 to {half - 1}": KnockOut(layers=range(half)),
        f"blind in layers {half} to {recipe.layers - 1}": KnockOut(
            layers=range(half, recipe.layers)
        ),
        "blind in all layers": KnockOut(layers=range(recipe.layers)),
    }
    name = "chair/toy" if recipe.captions else "pope/toy/adversarial"
    metrics = ("recall", "chair_i") if recipe.captions else ("accuracy", "auc")
    reports = evaluate(
        lens, BENCHMARKS.get(name), methods=list(runs.values()), limit=limit, progress=False
    )
    return [
        dict(zip(TOLD, (metric, run, report.metrics[metric], None, None, limit), strict=True))
        for run, report in zip(runs, reports, strict=True)
        for metric in metrics
    ]


def measure_organisms(
    folders: Sequence[Path],
    out: Path,
    say: Callable[[str], None],
    *,
    scenes: int = 60,
    twins: int = 2,
    limit: int = 40,
) -> list[Row]:
    """Measure trained folders, and write all rows as CSV; return them.

    Raises:
        ParameterError: if one is no finished training.
    """
    rows: list[Row] = []
    for trained in [Trained.read(folder) for folder in folders]:
        found = late_regression(trained, scenes=scenes, twins=twins)
        found += needs_picture(trained, limit=limit)
        rows += [{**trained.facts, **row} for row in found]
        for row in found:
            ends = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
            value = "undefined" if row["value"] is None else f"{row['value']:+.3f}"
            say(f"{trained.name}: {row['what']}, {row['run']}: {value}{ends} (n = {row['n']})")
    columns: list[str] = [*COLUMNS, *TOLD]
    with taking_place(out) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows
