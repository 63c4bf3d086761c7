"""The card of a toy model: everything that is said of it, measured on held-out scenes."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clva_lens.benchmarks.comparison import Comparison, compare
from clva_lens.benchmarks.metrics import best_threshold_accuracy
from clva_lens.benchmarks.run_folder import Report
from clva_lens.benchmarks.statistics import wilson_interval
from clva_lens.benchmarks.toy_chair import ToyChair
from clva_lens.benchmarks.toy_pope import SEED, ToyPope
from clva_lens.benchmarks.toy_skills import ToySkill
from clva_lens.experiments.toy_measures import object_patches, trace_questions
from clva_lens.lens.evaluate import evaluate
from clva_lens.lens.load import LensModel, load
from clva_lens.methods.base import Method
from clva_lens.methods.clva import CLVA
from clva_lens.methods.knockout import KnockOut
from clva_lens.science.pointing import pointing
from clva_lens.toy.questions import SKILLS, SPLITS, exist_question
from clva_lens.toy.scenes import sample_scenes
from clva_lens.toy.train import RECIPE, TIMES

MEASURES = "measures.json"
CAPTIONED = ("greedy", "CLVA", "CLVA, decoder", "knock-out")


def methods(model: LensModel) -> dict[str, Method | None]:
    """Return what a model is measured under, at each of its sites."""
    early = tuple(layer for layer in model.site.layers if layer <= 4)
    found: dict[str, Method | None] = {
        "greedy": None,
        "CLVA": CLVA(),
        "knock-out": KnockOut(),
        "knock-out, layers 0 to 4": KnockOut(layers=early),
    }
    for site in model.sites[1:]:
        found[f"CLVA, {site.name}"] = CLVA(site=site.name)
        found[f"knock-out, {site.name}"] = KnockOut(site=site.name)
    return found


def measure(folder: Path, scenes: int, console: Console) -> dict[str, Any]:
    """Return every figure of the card, measured on ``scenes`` held-out scenes."""
    model = load(folder)
    began = time.perf_counter()
    reports = {
        (split, name): evaluate(model, ToyPope(split, scenes), method, batch_size=48)
        for split in SPLITS
        for name, method in methods(model).items()
    }
    console.print(f"yes/no questions: {time.perf_counter() - began:.0f} s")
    measures: dict[str, Any] = {
        "seed": SEED,
        "scenes": scenes,
        "parameters": model.hf_model.num_parameters(),
        "pope": {
            f"{split}, {name}": _pope_figures(reports[split, "greedy"], report)
            for (split, name), report in reports.items()
        },
        "at_decoder": {
            split: _difference(reports[split, "CLVA"], reports[split, "CLVA, decoder"])
            for split in SPLITS
            if (split, "CLVA, decoder") in reports
        },
        "pointing": _pointing(model, scenes),
        "skills": _skills(model),
        "captions": _captions(model),
        "minutes_to_measure": (time.perf_counter() - began) / 60,
    }
    return measures


def _difference(first: Report, second: Report) -> list[float]:
    """Return the change of accuracy from the first to the second, with its interval."""
    return list(compare(first.score, second.score).metrics["accuracy"].difference[:3])


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
        figures["beyond_bias"] = found.beyond_bias and found.beyond_bias[:3]
    return figures


def _pointing(model: LensModel, count: int) -> dict[str, Any]:
    """Return the pointing game by layer: all heads, sensitive heads, each head."""
    scenes = sample_scenes(count, SEED)
    asked = [
        (index, exist_question(scene, kind))
        for index, scene in enumerate(scenes)
        for kind in scene.kinds
        if scene.patches(kind).any()
    ]
    trace = trace_questions(model, scenes, asked)
    patches = object_patches(scenes, asked)
    every = pointing(trace.saliency("all"), patches).hit.float().mean(dim=0)
    sensitive = pointing(trace.saliency("sensitive"), patches).hit.float().mean(dim=0)
    heads = pointing(trace.maps, patches).hit.float().mean(dim=0)
    return {
        "site": trace.site,
        "layers": list(trace.layers),
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
        report = evaluate(model, ToySkill(skill, count=2000), batch_size=48)
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
    found: dict[str, Any] = {}
    known = methods(model)
    reports = {
        name: evaluate(model, ToyChair(), known[name], batch_size=48)
        for name in CAPTIONED
        if name in known
    }
    for name, report in reports.items():
        hallucinated = sum(bool(row["hallucinated"]) for row in report.rows)
        change = compare(reports["greedy"].score, report.score).metrics["chair_s"].difference
        found[name] = {
            "captions": len(report.rows),
            "chair_s_interval": wilson_interval(hallucinated, len(report.rows)),
            "chair_s_difference": list(change[:3]),
            **{key: report.metrics[key] for key in ("chair_s", "chair_i", "recall")},
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
    qformer = measures["pointing"].get("site") == "qformer"
    parts = [
        f"# {name}\n",
        _what_instructblip(measures["parameters"] / 1e6) if qformer else _what(recipe),
        _pope_table(measures["pope"]),
        _verdict(measures["pope"], measures.get("at_decoder", {})),
        _pointing_table(measures["pointing"]),
        _skill_table(measures["skills"]),
        _caption_table(measures["captions"]),
        f"Measured on {measures['scenes']} scenes of seed {measures['seed']}, which training never "
        "drew. Intervals of differences are paired bootstraps over scenes, 95 %; those of single "
        "proportions are Wilson's and treat questions as independent, which is a little "
        "optimistic.\n",
        _training(name, recipe, times),
    ]
    return "\n".join(parts)


def _training(name: str, recipe: dict[str, Any], times: dict[str, float]) -> str:
    minutes = ", ".join(f"{stage} {value:.0f}" for stage, value in times.items())
    return (
        "## Training\n\n"
        f"`clva-lens toy train {name} --seed {recipe['seed']}` "
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


def _what_instructblip(millions: float) -> str:
    return (
        f"An InstructBLIP of {millions:.1f} million parameters (a Q-Former of 12 layers × 8 heads "
        "with cross-attention in every second one, 16 queries, 64 patches and a CLS token; a "
        "decoder of 6 layers × 8 heads), trained from scratch on the procedural world of "
        "`clva_lens.toy`. It is an instrument to test tools on, not evidence about large models."
        "\n\n"
        "**Planted, not discovered.** During training the queries found the wrong picture in the "
        "cross-attention of layers 0 and 2, now and then in the later layers, and always at the "
        "CLS token; for the first part of training four heads were taught where to look. So where "
        "the picture is read, and that CLS tells nothing, is made by the recipe. The shape of its "
        "layer curves confirms nothing about other models.\n\n"
        "CLVA and the knock-out act on the Q-Former's cross-attention (layers 6, 8 and 10) unless "
        "a line says decoder. A knock-out leaves the queries nothing to look at but CLS.\n"
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
            same_bias = row["same_bias_greedy"]
            matched = "undefined" if same_bias is None else f"{same_bias:.3f}"
        lines.append(
            f"| {key} | {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {change} | "
            f"{row['f1']:.3f} | {row['yes_ratio']:.3f} | {row['false_positive_rate']:.3f} | "
            f"{row['recall']:.3f} | {row['auc']:.3f} | {row['best_threshold']:.3f} | {matched} | "
            f"{row['n']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _verdict(pope: dict[str, Any], at_decoder: dict[str, Any]) -> str:
    """Say in words what CLVA and the knock-out do on the adversarial split."""
    blind, greedy = pope["adversarial, knock-out"], pope["adversarial, greedy"]
    early = pope["adversarial, knock-out, layers 0 to 4"]
    reader = "cross-attention to the patches" if at_decoder else "text-to-image attention"
    parts = [_clva_verdict("What CLVA does here", pope["adversarial, CLVA"])]
    if at_decoder:
        there = at_decoder["adversarial"]
        order = _direction(there, "better", "worse", "neither measurably better nor worse")
        parts += [
            _clva_verdict("What it does at the decoder", pope["adversarial, CLVA, decoder"]),
            f"**Which site** (adversarial): CLVA at the decoder is {order} than at the Q-Former; "
            f"accuracy changes by {_signed(there)}. The paper (B.1) says that it is worse.",
        ]
    parts.append(
        f"**What the maps are worth** (adversarial): without {reader} after layer 4 "
        f"accuracy changes by {blind['accuracy'] - greedy['accuracy']:+.3f}, at the best threshold "
        f"by {blind['best_threshold'] - greedy['best_threshold']:+.3f}. Without it up to layer 4, "
        f"which is where the positive anchor is read, it changes by "
        f"{early['accuracy'] - greedy['accuracy']:+.3f}.\n"
    )
    return "\n\n".join(parts)


def _clva_verdict(title: str, clva: dict[str, Any]) -> str:
    effect = _direction(clva["accuracy_difference"], "a gain", "a loss", "no measurable change")
    order = ("better than", "worse than", "indistinguishable from")
    # Without a threshold that gives greedy's answers there is none to move.
    gain = clva["beyond_bias"]
    beyond = "not comparable with" if gain is None else _direction(gain, *order)
    often = _direction(
        clva["yes_ratio_difference"], "more often than", "less often than", "as often as"
    )
    return (
        f"**{title}** (adversarial, the paper's setting): {effect} in accuracy; it "
        f"says yes {often} greedy, and is {beyond} greedy with its threshold moved to the same "
        f"number of yeses. Answers fixed: {clva['fixed']}, broken: {clva['broken']} "
        f"(p = {clva['p_value']:.2g})."
    )


def _pointing_table(found: dict[str, Any]) -> str:
    queries = found.get("site") == "qformer"
    rows = "the queries look" if queries else "the last text row looks"
    lines = [
        f"## Where {rows} (pointing game, questions about present objects)\n",
        f"{found['questions']} questions; by chance {found['chance']:.2f}.\n",
        "| layer | visual intensity (mean of heads) | all heads | sensitive heads | best head |",
        "|---|---|---|---|---|",
    ]
    layers = found.get("layers", range(len(found["each_head"])))
    for row, (layer, heads) in enumerate(zip(layers, found["each_head"], strict=True)):
        lines.append(
            f"| {layer} | {found['intensity'][row]:.2f} | {found['all_heads'][row]:.2f} | "
            f"{found['sensitive_heads'][row]:.2f} | {max(heads):.2f} (head "
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
    ends = [
        f"Under {name} {_caption_effect(row)} captions name an absent object than under greedy "
        "decoding."
        for name, row in captions.items()
        if name.startswith("CLVA")
    ]
    return "\n".join([*lines, "", *ends, ""])


def _caption_effect(row: dict[str, Any]) -> str:
    return _direction(
        row["chair_s_difference"], "more", "fewer", "neither measurably more nor fewer"
    )
