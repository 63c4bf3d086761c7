"""The card of a toy model: everything that is said of it, measured on held-out scenes."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clva_lens.benchmarks.comparison import Comparison, compare
from clva_lens.benchmarks.metrics import Outcomes, best_threshold_accuracy
from clva_lens.benchmarks.statistics import paired_bootstrap, wilson_interval
from clva_lens.benchmarks.toy_pope import SEED, ToyPope
from clva_lens.benchmarks.toy_skills import ToySkill
from clva_lens.evaluate import Report, evaluate
from clva_lens.methods.base import Method
from clva_lens.methods.clva import CLVA
from clva_lens.methods.knockout import KnockOut
from clva_lens.models.lens import LensModel, load
from clva_lens.toy.measure import (
    caption_counts,
    object_patches,
    pointing,
    trace_questions,
)
from clva_lens.toy.questions import SKILLS, SPLITS, exist_question
from clva_lens.toy.scenes import sample_scenes
from clva_lens.toy.train import RECIPE, TIMES

METHODS: dict[str, Method | None] = {
    "greedy": None,
    "CLVA": CLVA(),
    "knock-out": KnockOut(),
    "knock-out, layers 0 to 4": KnockOut(layers=(0, 1, 2, 3, 4)),
}
MEASURES = "measures.json"


def measure(folder: Path, scenes: int, console: Console) -> dict[str, Any]:
    """Return every figure of the card, measured on ``scenes`` held-out scenes."""
    model = load(folder)
    began = time.perf_counter()
    reports = {
        (split, name): evaluate(model, ToyPope(split, scenes), method, batch_size=48)
        for split in SPLITS
        for name, method in METHODS.items()
    }
    console.print(f"yes/no questions: {time.perf_counter() - began:.0f} s")
    measures: dict[str, Any] = {
        "seed": SEED,
        "scenes": scenes,
        "pope": {
            f"{split}, {name}": _pope_figures(reports[split, "greedy"], report)
            for (split, name), report in reports.items()
        },
        "pointing": _pointing(model, scenes),
        "skills": _skills(model),
        "captions": _captions(model),
        "minutes_to_measure": (time.perf_counter() - began) / 60,
    }
    return measures


def _pope_figures(greedy: Report, report: Report) -> dict[str, Any]:
    rows = report.rows
    right = sum(row["label"] == row["prediction"] for row in rows)
    figures: dict[str, Any] = dict(report.metrics)
    figures["accuracy_wilson"] = wilson_interval(right, len(rows))
    labels = [row["label"] for row in rows]
    figures["best_threshold"] = best_threshold_accuracy([row["margin"] for row in rows], labels)
    if report is not greedy:
        found: Comparison = compare(greedy.score, report.score)
        for name, pair in found.metrics.items():
            figures[f"{name}_difference"] = pair.difference[:3]
        figures |= {"fixed": found.fixed, "broken": found.broken, "p_value": found.p_value}
        figures["same_bias_greedy"] = found.bias_matched_accuracy
        assert found.beyond_bias is not None
        figures["beyond_bias"] = found.beyond_bias[:3]
    return figures


def _pointing(model: LensModel, count: int) -> dict[str, Any]:
    """Return the pointing game of the last row, by layer: all heads, sensitive heads, each head."""
    scenes = sample_scenes(count, SEED)
    asked = [
        (index, exist_question(scene, kind))
        for index, scene in enumerate(scenes)
        for kind in scene.kinds
        if scene.patches(kind).any()
    ]
    trace = trace_questions(model, scenes, asked)
    patches = object_patches(scenes, asked)
    every = pointing(trace.saliency("all"), patches).float().mean(dim=0)
    sensitive = pointing(trace.saliency("sensitive"), patches).float().mean(dim=0)
    heads = pointing(trace.maps, patches).float().mean(dim=0)
    return {
        "questions": len(asked),
        "chance": float(patches.float().mean()),
        "all_heads": every.tolist(),
        "sensitive_heads": sensitive.tolist(),
        "each_head": heads.tolist(),
        "intensity": trace.intensity.mean(dim=(0, 2)).tolist(),
        "chosen_sensitive": trace.heads().sensitive.float().mean(dim=0).tolist(),
    }


def _skills(model: LensModel) -> dict[str, Any]:
    found = {}
    for skill in SKILLS:
        report = evaluate(model, ToySkill(skill, scenes=2000), batch_size=48)
        right = [row["prediction"] == row["label"] for row in report.rows]
        found[skill] = {
            "accuracy": report.metrics["accuracy"],
            "interval": wilson_interval(sum(right), len(right)),
            "chance": report.metrics["chance"],
            "questions": len(right),
        }
    return found


def _captions(model: LensModel) -> dict[str, Any]:
    """Return CHAIR and recall of 300 captions a method, with paired changes against greedy."""
    scenes = sample_scenes(300, SEED + 2)
    found: dict[str, Any] = {}
    clean: dict[str, Outcomes] = {}
    for name in ("greedy", "CLVA", "knock-out"):
        counts = caption_counts(model, scenes, METHODS[name])
        hallucinated = [count > 0 for count in counts.absent]
        # A caption without hallucination counts as a right answer, so 1 − accuracy is CHAIR_s.
        answers = ["no" if wrong else "yes" for wrong in hallucinated]
        clean[name] = Outcomes.of(["yes"] * len(answers), answers)
        change = paired_bootstrap("accuracy", clean["greedy"], clean[name])
        found[name] = {
            "captions": len(scenes),
            "chair_s": counts.chair_s,
            "chair_s_interval": wilson_interval(sum(hallucinated), len(scenes)),
            "chair_s_difference": [-change.estimate, -change.high, -change.low],
            "chair_i": counts.chair_i,
            "recall": counts.recall,
        }
    return found


def write_card(folder: Path, scenes: int, console: Console) -> Path:
    """Measure the model in ``folder``; write measures.json and the card, and return its path."""
    measures = measure(folder, scenes, console)
    (folder / MEASURES).write_text(json.dumps(measures, indent=1), encoding="utf-8")
    path = folder / "README.md"
    path.write_text(card_text(folder), encoding="utf-8")
    return path


def card_text(folder: Path) -> str:
    """Return the card in Markdown; every number comes from the JSON files in ``folder``."""

    def read(file: str) -> dict[str, Any]:
        return json.loads((folder / file).read_text(encoding="utf-8"))

    name, recipe, times, measures = folder.name, read(RECIPE), read(TIMES), read(MEASURES)
    parts = [
        f"# {name}\n",
        _what(recipe),
        _pope_table(measures["pope"]),
        _verdict(measures["pope"]),
        _pointing_table(measures["pointing"]),
        _skill_table(measures["skills"]),
        _caption_table(measures["captions"]),
        f"Measured on {measures['scenes']} scenes of seed {measures['seed']}, which training never "
        "drew. Intervals of differences are paired bootstraps over scenes, 95 %; those of single "
        "proportions are Wilson's and treat questions as independent, which is a little "
        "optimistic.\n",
        _training(recipe, times),
    ]
    return "\n".join(parts)


def _training(recipe: dict[str, Any], times: dict[str, float]) -> str:
    minutes = ", ".join(f"{stage} {value:.0f}" for stage, value in times.items())
    return (
        "## Training\n\n"
        f"`clva-lens toy train{' --control' if recipe['control'] else ''} --seed {recipe['seed']}` "
        "with the recipe below; every step draws fresh scenes. Minutes by stage, on one thread "
        f"of a busy two-core machine: {minutes}.\n\n"
        f"```json\n{json.dumps(recipe, indent=1)}\n```\n"
    )


def _what(recipe: dict[str, Any]) -> str:
    lead = (
        "A LLaVA of 2.7 million parameters (12 decoder layers × 8 heads, 64 image tokens), trained "
        "from scratch on the procedural world of `clva_lens.toy`. It is an instrument to test "
        "tools on, not evidence about large models.\n"
    )
    if recipe.get("control"):
        return lead + (
            "\n**Control.** It was taught where to look in layers 4 to 8 as `toy-llava` was, but "
            "it read the picture in early layers too, and in half of its training text could not "
            "see the picture after layer 4. So its maps are as pretty, and nothing should depend "
            "on those of layers 5 to 8; the knock-out shows whether that is so.\n"
        )
    return lead + (
        "\n**Planted, not discovered.** During training, text rows found the wrong picture in all "
        "layers but 4 to 8, and for the first part of training four heads there were taught where "
        "to look. So mid-layer grounding and the late drift away from it are made by the recipe. "
        "The shape of its layer curves confirms nothing about other models.\n"
    )


def _signed(difference: Sequence[float]) -> str:
    """Write a difference with its interval."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)


def _direction(difference: Sequence[float], above: str, below: str, neither: str) -> str:
    """Return the word for a difference whose interval lies above 0, below 0, or neither."""
    _, low, high = difference
    return above if low > 0 else below if high < 0 else neither


def _pope_table(pope: dict[str, Any]) -> str:
    lines = [
        "## Yes/no questions (POPE on the toy world)\n",
        "| split, method | accuracy [95 %] | change against greedy [95 %] | F1 | yes-ratio | "
        "false-positive rate | recall | AUC | best threshold | same-bias greedy | n |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, row in pope.items():
        low, high = row["accuracy_wilson"]
        change = matched = "–"
        if "accuracy_difference" in row:
            change = _signed(row["accuracy_difference"])
            matched = f"{row['same_bias_greedy']:.3f}"
        lines.append(
            f"| {key} | {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {change} | "
            f"{row['f1']:.3f} | {row['yes_ratio']:.3f} | {row['false_positive_rate']:.3f} | "
            f"{row['recall']:.3f} | {row['auc']:.3f} | {row['best_threshold']:.3f} | {matched} | "
            f"{row['n']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _verdict(pope: dict[str, Any]) -> str:
    """Say in words what CLVA and the knock-out do on the adversarial split."""
    clva, blind = pope["adversarial, CLVA"], pope["adversarial, knock-out"]
    greedy = pope["adversarial, greedy"]
    effect = _direction(clva["accuracy_difference"], "a gain", "a loss", "no measurable change")
    beyond = _direction(clva["beyond_bias"], "better than", "worse than", "indistinguishable from")
    often = _direction(
        clva["yes_ratio_difference"], "more often than", "less often than", "as often as"
    )
    return (
        f"**What CLVA does here** (adversarial, the paper's setting): {effect} in accuracy; it "
        f"says yes {often} greedy, and is {beyond} greedy with its threshold moved to the same "
        f"number of yeses. It fixes {clva['fixed']} answers and breaks {clva['broken']} "
        f"(p = {clva['p_value']:.2g}).\n\n"
        f"**What the maps are worth** (adversarial): without text-to-image attention after layer 4 "
        f"accuracy changes by {blind['accuracy'] - greedy['accuracy']:+.3f}, at the best threshold "
        f"by {blind['best_threshold'] - greedy['best_threshold']:+.3f}.\n"
    )


def _pointing_table(found: dict[str, Any]) -> str:
    lines = [
        "## Where the last text row looks (pointing game, questions about present objects)\n",
        f"{found['questions']} questions; by chance {found['chance']:.2f}.\n",
        "| layer | visual intensity (mean of heads) | all heads | sensitive heads | best head |",
        "|---|---|---|---|---|",
    ]
    for layer, heads in enumerate(found["each_head"]):
        lines.append(
            f"| {layer} | {found['intensity'][layer]:.2f} | {found['all_heads'][layer]:.2f} | "
            f"{found['sensitive_heads'][layer]:.2f} | {max(heads):.2f} (head "
            f"{int(np.argmax(heads))}) |"
        )
    return "\n".join(lines) + "\n"


def _skill_table(skills: dict[str, Any]) -> str:
    lines = ["## Other skills\n", "| skill | accuracy [95 %] | chance | n |", "|---|---|---|---|"]
    for name, row in skills.items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {row['chance']:.3f} | "
            f"{row['questions']} |"
        )
    return "\n".join(lines) + "\n"


def _caption_table(captions: dict[str, Any]) -> str:
    lines = [
        "## Captions\n",
        "| method | CHAIR_s [95 %] | change [95 %] | CHAIR_i | recall | captions |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in captions.items():
        low, high = row["chair_s_interval"]
        change = "–" if name == "greedy" else _signed(row["chair_s_difference"])
        lines.append(
            f"| {name} | {row['chair_s']:.3f} [{low:.3f}, {high:.3f}] | {change} | "
            f"{row['chair_i']:.3f} | {row['recall']:.3f} | {row['captions']} |"
        )
    effect = _direction(
        captions["CLVA"]["chair_s_difference"], "more", "fewer", "neither measurably more nor fewer"
    )
    return "\n".join(lines) + (
        f"\n\nUnder CLVA {effect} captions name an absent object than under greedy decoding.\n"
    )
