"""``clva-lens demo``: what the toolkit is for, on a trained toy or on one's own picture."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from clva_lens.benchmarks.base import BENCHMARKS, Sample
from clva_lens.benchmarks.comparison import Comparison, compare
from clva_lens.benchmarks.metrics import Outcomes
from clva_lens.benchmarks.run_folder import Report
from clva_lens.benchmarks.statistics import bootstrap_interval
from clva_lens.benchmarks.toy_pope import ToyPope
from clva_lens.experiments.drift_nulls import (
    drift_rows,
    drift_sentences,
    measure_drift,
    untrained_twin,
)
from clva_lens.experiments.passes import methods_table
from clva_lens.experiments.toy_measures import (
    object_patches,
    question_samples,
    trace_questions,
)
from clva_lens.figures import (
    SaliencyPicture,
    head_intensity,
    method_comparison,
    saliency_overlays,
    save,
)
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.files import taking_place
from clva_lens.lens.evaluate import evaluate
from clva_lens.lens.load import LensModel, load
from clva_lens.lens.provenance import describe
from clva_lens.lens.side_by_side import Look, conditions, look_at, saliency_picture, shown_layers
from clva_lens.methods.clva import CLVA
from clva_lens.science.heads import classify_heads
from clva_lens.science.pointing import pointing
from clva_lens.toy.questions import SPLITS, exist_question
from clva_lens.toy.scenes import render, sample_scenes

RESULTS = "results.json"
TRACED = 120
# How many untrained twins stand beside a model, and of how many weights at most.
TWINS, TWIN_SIZE = 3, 10**9


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write to, which takes the place of ``out`` when all went well.

    Raises:
        ParameterError: if ``out`` is a file, or a folder that no demo wrote.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RESULTS).is_file()):
        raise ParameterError(
            f"'{out}' is there and was not written by a demo, so it is left alone. Pass another "
            "folder with --out."
        )
    with taking_place(out) as part:
        part.mkdir(parents=True)
        yield part


def demo_toy(
    name: str,
    out: Path,
    questions: int,
    console: Console,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Evaluate greedy, CLVA and the knock-out on every split; draw heads, drift and saliency."""
    model = load(name, device_map=device, dtype=dtype)
    sites = ", ".join(f"{len(site.layers)} layers of the {site.name}" for site in model.sites)
    console.print(f"[bold]{name}[/]: {sites}, {questions} questions per split")
    with output_folder(out) as folder:
        reports = {
            (split, label): evaluate(model, f"pope/toy/{split}", method, limit=questions)
            for split in SPLITS
            for label, method in conditions(model).items()
        }
        comparisons = {
            (split, label): compare(reports[split, "greedy"].score, reports[split, label].score)
            for split in SPLITS
            for label in conditions(model)
            if label != "greedy"
        }
        origin = {"model": name, "questions": questions, "method": describe(CLVA())}
        save(
            method_comparison(_comparison_rows(reports, comparisons)),
            folder,
            "accuracy",
            None,
            origin,
        )
        heads, drifting = _toy_attention(model, reports, folder, origin)
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for (split, label), report in reports.items():
                for row in report.rows:
                    file.write(json.dumps({"split": split, "method": label, **row}) + "\n")
        results = [
            {"split": split, "method": label, "metrics": report.metrics, "record": report.record}
            for (split, label), report in reports.items()
        ]
        (folder / RESULTS).write_text(json.dumps(results, indent=1), encoding="utf-8")
    _print_reports(reports, comparisons, console)
    scene = sample_scenes(1, seed=7)[0]
    console.print(methods_table(model, (render(scene), exist_question(scene, scene.kinds[0]).text)))
    _print_heads(heads, console)
    _print_drift(drifting, console)
    _print_paths(out, console)


def _toy_attention(
    model: LensModel, reports: dict[tuple[str, str], Report], folder: Path, origin: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw Figs. 1, 2a and 2b from the adversarial questions.

    Returns the anchor heads' figures, and what Fig. 2b says beside its nulls.
    """
    benchmark = BENCHMARKS.get("pope/toy/adversarial")
    assert isinstance(benchmark, ToyPope)
    rows = reports["adversarial", "greedy"].rows
    asked = [
        (int(row["group"]), exist_question(benchmark.scenes[int(row["group"])], _kind(row)))
        for row in rows[:TRACED]
    ]
    plain = trace_questions(model, benchmark.scenes, asked)
    mean = plain.intensity.mean(dim=0)
    classes = classify_heads(mean)
    figure = head_intensity(
        mean.numpy(),
        classes.sensitive.numpy(),
        classes.insensitive.numpy(),
        layers=plain.layers,
    )
    save(figure, folder, "head_intensity", None, origin)
    drift = measure_drift(model, question_samples(benchmark.scenes, asked), twins=_twins(model))
    save(drift.draw(), folder, "drift", None, {**origin, "samples_left_out": drift.left_out})
    looks = []
    for row in _telling_rows(reports):
        scene = benchmark.scenes[int(row["group"])]
        look = look_at(model, model.prompt(render(scene), row["question"]))
        objects = scene.patches(_kind(row))
        looks.append((look, saliency_picture(model, look, label=row["label"], objects=objects)))
    _draw_pictures(looks, folder, origin)
    positive = [i for i, (_, question) in enumerate(asked) if question.answer == "yes"]
    patches = object_patches(benchmark.scenes, [asked[i] for i in positive])
    hits = pointing(plain.maps[positive], patches).hit.float().mean(dim=0)
    chance = float(patches.float().mean())
    row = plain.layers.index(drift.positive_layer)
    told = [
        {
            "layer": drift.positive_layer,
            "head": head,
            "intensity": float(mean[row, head]),
            "pointing": float(hits[row, head]),
            "chance": chance,
            "selected": float(plain.heads().sensitive[:, row, head].float().mean()),
        }
        for head in range(mean.shape[1])
    ]
    return told, drift_sentences(drift_rows(drift))


def _twins(model: LensModel) -> list[LensModel]:
    """Return untrained twins of a model that is small enough for them, else none."""
    size = sum(weight.numel() for weight in model.hf_model.parameters())
    return [untrained_twin(model, seed) for seed in range(TWINS)] if size <= TWIN_SIZE else []


def _kind(row: dict[str, Any]) -> str:
    return row["id"].split("/")[1]


def _telling_rows(reports: dict[tuple[str, str], Report]) -> list[dict[str, Any]]:
    """Return up to three questions: a right yes, a false yes, and one whose answer CLVA changes."""
    greedy = reports["adversarial", "greedy"].rows
    clva = reports["adversarial", "CLVA"].rows
    pairs = list(zip(greedy, clva, strict=True))
    rules = (
        lambda a, b: a["label"] == "yes" == a["prediction"],
        lambda a, b: a["label"] == "no" and a["prediction"] == "yes",
        lambda a, b: a["prediction"] != b["prediction"],
    )
    chosen = [next((a for a, b in pairs if rule(a, b)), None) for rule in rules]
    return list({row["id"]: row for row in chosen if row is not None}.values())


def _draw_pictures(
    looks: Sequence[tuple[Look, SaliencyPicture]], folder: Path, origin: dict[str, Any]
) -> None:
    """Draw the maps of the site that CLVA acts on, and what a language model behind it sees."""
    first, several = looks[0][0].plain, looks[0][0].composed is not None
    figure = saliency_overlays(
        [drawn for _, drawn in looks],
        shown_layers(first.layers),
        site=first.site if several else "",
    )
    save(figure, folder, "saliency", None, origin)
    if not several:
        return
    composed, layers = [], []
    for look, drawn in looks:
        assert look.composed is not None
        layers = shown_layers(range(len(look.composed[0])))
        before, after = (
            look.prompt.on_grid(maps[layers]).float().cpu().numpy() for maps in look.composed
        )
        composed.append(replace(drawn, before=before, after=after))
    save(saliency_overlays(composed, layers, site="decoder"), folder, "composed", None, origin)


def demo_picture(
    name: str,
    image: Path,
    question: str,
    out: Path,
    console: Console,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Show one picture and question on any model: answers, heads, drift, saliency, knock-out."""
    model = load(name, device_map=device, dtype=dtype)
    prompt = model.prompt(image, question)
    console.print(f"[bold]{name}[/]: {prompt}")
    with output_folder(out) as folder:
        origin = {"model": name, "image": image.name, "question": question}
        look = look_at(model, prompt)
        picture = saliency_picture(model, look)
        _draw_pictures([(look, picture)], folder, origin)
        classes = look.plain.heads()
        figure = head_intensity(
            look.plain.intensity.cpu().numpy(),
            classes.sensitive.cpu().numpy(),
            classes.insensitive.cpu().numpy(),
            layers=look.plain.layers,
        )
        save(figure, folder, "head_intensity", None, origin)
        twins = _twins(model)
        drift = measure_drift(model, [Sample("", image, question, "")], twins=twins)
        save(drift.draw(), folder, "drift", None, origin)
        answers = {key: {"text": t, "margin": m} for key, (t, m) in picture.answers.items()}
        (folder / RESULTS).write_text(json.dumps({**origin, "answers": answers}, indent=1))
    table = Table("condition", "answer", "yes − no (nats)")
    for key, (text, margin) in picture.answers.items():
        table.add_row(key, text or "(empty)", "–" if margin is None else f"{margin:+.2f}")
    console.print(table)
    console.print(repr(look.anchors))
    _print_drift(drift_sentences(drift_rows(drift)), console)
    if not twins:
        console.print(
            f"[dim]{name} has more than {TWIN_SIZE:.0e} weights, so no untrained twin was made to "
            "compare with.[/]"
        )
    _print_paths(out, console)


def _print_drift(sentences: Sequence[str], console: Console) -> None:
    console.print("Drift (Fig. 2b), beside what random tokens and untrained models show:")
    for sentence in sentences:
        console.print(f"  {sentence}", highlight=False, markup=False)


def _comparison_rows(
    reports: dict[tuple[str, str], Report], comparisons: dict[tuple[str, str], Comparison]
) -> list[dict[str, Any]]:
    rows = []
    for (split, label), report in reports.items():
        outcomes = Outcomes.from_rows(report.rows)
        groups = [row["group"] for row in report.rows]
        for metric in ("accuracy", "yes_ratio", "auc"):
            found = bootstrap_interval(metric, outcomes, groups)
            rows.append((split, label, metric, *found[:3]))
        if label != "greedy":
            matched = comparisons[split, label].bias_matched_accuracy
            if matched is not None:
                rows.append((split, label, "bias_matched_accuracy", matched, None, None))
    names = ("split", "method", "metric", "value", "low", "high")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _print_reports(
    reports: dict[tuple[str, str], Report],
    comparisons: dict[tuple[str, str], Comparison],
    console: Console,
) -> None:
    table = Table(
        title="POPE on the toy world, in % (AUC in [0, 1])",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
        title_justify="left",
    )
    for title in ("split", "method", "acc.", "change [95 %]", "F1", "yes", "AUC"):
        table.add_column(title, no_wrap=True)
    table.add_column("same\nbias")
    table.add_column("other")
    for (split, label), report in reports.items():
        metrics = report.metrics
        change = matched = "–"
        if label != "greedy":
            found = comparisons[split, label]
            gap = [100 * value for value in found.metrics["accuracy"].difference[:3]]
            change = f"{gap[0]:+.1f} [{gap[1]:+.1f}, {gap[2]:+.1f}]"
            same_bias = found.bias_matched_accuracy
            matched = "undefined" if same_bias is None else f"{100 * same_bias:.1f}"
        table.add_row(
            split if label == "greedy" else "",
            label,
            f"{100 * metrics['accuracy']:.1f}",
            change,
            f"{100 * metrics['f1']:.1f}",
            f"{100 * metrics['yes_ratio']:.1f}",
            f"{metrics['auc']:.3f}",
            matched,
            f"{metrics['unparsed']:.0f}",
            end_section=label == "knock-out",
        )
    console.print(table)
    console.print(
        "[dim]change: accuracy against greedy on the same questions, interval paired by picture. "
        "yes: share of yes answers. same bias: accuracy of greedy with its yes/no threshold moved "
        "until it says yes as often as the method; a method that does not beat it has only moved "
        "the threshold; undefined where greedy's answers are not those of a threshold. other: "
        "answers that are neither yes nor no. knock-out: no attention to "
        "the image where CLVA edits it, in the layers after the positive anchor.[/]"
    )


def _print_heads(heads: Sequence[dict[str, Any]], console: Console) -> None:
    layer, chance = heads[0]["layer"], heads[0]["chance"]
    table = Table(
        "head",
        "visual intensity",
        "chosen as sensitive",
        "points at the object",
        title=f"Heads of the positive anchor layer {layer} (pointing by chance: {chance:.2f})",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for row in heads:
        table.add_row(
            str(row["head"]),
            f"{row['intensity']:.2f}",
            f"{row['selected']:.0%} of prompts",
            f"{row['pointing']:.2f}",
        )
    console.print(table)


def _print_paths(out: Path, console: Console) -> None:
    console.print(f"Written to [bold]{out}[/]:")
    for path in sorted(out.iterdir()):
        console.print(f"  {out.name}/{path.name}", highlight=False)
