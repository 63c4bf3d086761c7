"""The questions that a method fixed and broke: photo, maps and margins of each, and its page."""

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clva_lens.benchmarks.base import Sample
from clva_lens.benchmarks.comparison import changed_answers
from clva_lens.benchmarks.run_folder import Report, benchmark_of
from clva_lens.ground.errors import BenchmarkError, ParameterError
from clva_lens.ground.progress import progress_bar
from clva_lens.ground.settings import restore_settings
from clva_lens.lens.explorer.explored import Explored
from clva_lens.lens.explorer.exploring import looked
from clva_lens.lens.explorer.packing import photo_url
from clva_lens.lens.explorer.page import framed, write_page
from clva_lens.lens.load import LensModel
from clva_lens.methods.base import METHODS, Method, MethodLike, as_method

MOST = 12
_SIDE = 220  # pixels of a small photo
# The explorer's brightest colour, and how much light the photo keeps under it.
_ORANGE, _LIGHT = np.array([255, 157, 75]), 0.6
_LUMA = np.array([0.299, 0.587, 0.114])


def gallery_of(
    report: Report,
    model: LensModel,
    against: Report,
    folder: str | Path,
    *,
    method: MethodLike | None = None,
    most: int = MOST,
    knock_outs: bool = False,
    progress: bool = True,
) -> Path:
    """Write the gallery of ``Report.explore``, and return the path of its first page."""
    chosen = as_method(method) if method is not None else method_of(report.record)
    fixed, broken = changed_answers(against.score, report.score)
    rows = [{row["id"]: row for row in one.rows} for one in (against, report)]
    moved = {name: _moved(rows, name) for name in (*fixed, *broken)}
    shown = {
        kind: sorted(ids, key=lambda name: -moved[name])[:most]
        for kind, ids in (("fixed", fixed), ("broken", broken))
    }
    samples = _samples(report.record, [*shown["fixed"], *shown["broken"]])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with progress_bar("questions", len(samples), wanted=progress) as advance:
        for kind, ids in shown.items():
            cards = []
            for number, name in enumerate(ids):
                sample, picture = samples[name]
                system = sample.system if model.family.chats else None
                asked: Any = (picture, sample.question, system)
                told = looked(model, asked, chosen, knock_outs=knock_outs, progress=False)
                page = told.to_html(folder / f"{kind}-{number + 1:02}.html")
                cards.append(_card(told, page.name, sample, [one[name] for one in rows]))
                advance(1)
            count = len(fixed if kind == "fixed" else broken)
            parts.append(_section(kind, count, cards))
    heading = f"<h1>{html.escape(report.title)}</h1>\n<p>{_summary(report, against)}</p>\n"
    css = (files("clva_lens.lens.explorer") / "gallery.css").read_text(encoding="utf-8")
    body = f"<main>\n{heading}{''.join(parts)}</main>\n"
    return write_page(folder / "index.html", framed(report.title, css, body))


def method_of(record: Mapping[str, Any]) -> Method:
    """Return the method of a run's record.

    Raises:
        ParameterError: if it had none, or one that its record alone does not make again.
    """
    told = dict(record.get("method") or {"name": "none"})
    name = told.pop("name")
    if name not in METHODS.names() or any(isinstance(one, dict) for one in told.values()):
        raise ParameterError(
            f"the run's method is '{name}', which its record does not make again. Call explore() "
            "of the report of a method, or pass method=."
        )
    kind = METHODS.get(name)
    return kind(**restore_settings(kind, told))


def _moved(rows: Sequence[Mapping[str, Mapping[str, Any]]], name: str) -> float:
    """Return how far the margin of a question moved; 0 where it was not recorded."""
    before, after = (one[name].get("margin") for one in rows)
    return 0.0 if before is None or after is None else abs(after - before)


def _samples(record: Mapping[str, Any], ids: Sequence[str]) -> dict[str, tuple[Sample, Any]]:
    """Return samples by id, each with the picture that the model is shown.

    Raises:
        BenchmarkError: if the benchmark does not have them.
    """
    benchmark = benchmark_of(record, {})
    known = {one.id: one for one in benchmark.samples(record.get("limit"), record.get("seed", 0))}
    absent = [name for name in ids if name not in known]
    if absent:
        raise BenchmarkError(
            f"{benchmark.name} has no sample '{absent[0]}' here, so its picture is not known. Put "
            "the data of the run where its settings say."
        )
    return {name: (known[name], benchmark.picture(known[name])) for name in ids}


def _summary(report: Report, against: Report) -> str:
    pairs = [(name, against.metrics.get(name), report.metrics.get(name)) for name in report.metrics]
    told = [
        f"{name} {before:.3f} → {after:.3f}"
        for name, before, after in pairs
        if name in ("accuracy", "auc", "yes_ratio") and before is not None and after is not None
    ]
    return html.escape(
        f"{len(report.rows)} questions. {', '.join(told)}. A fixed answer is no proof of better "
        "sight: compare with a moved threshold (cl.compare)."
    )


def _section(kind: str, count: int, cards: Sequence[str]) -> str:
    shown = f", {len(cards)} shown, those whose margins moved most" if len(cards) < count else ""
    cards_ = f"<ul>\n{''.join(cards)}</ul>\n" if cards else "<p>None.</p>\n"
    return f"<h2>{kind.title()}: {count}{shown}</h2>\n{cards_}"


def _card(told: Explored, page: str, sample: Sample, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one question as a link to its page; all text is escaped."""
    layer = told.layers[int(np.abs(told.maps[1] - told.maps[0]).sum(axis=(1, 2, 3)).argmax())]
    maps = [told.map(layer=layer, look=look) for look in (0, 1)]
    top = float(np.quantile(np.stack(maps), 0.99)) or 1.0
    said = [
        f"{name}: {row.get('text', row.get('prediction', ''))}{_margin(row)}"
        for name, row in zip(told.names, rows, strict=True)
    ]
    pictures = [
        (_small(told.photo), "photo", f"label: {sample.label}"),
        *(
            (_small(told.photo, one / top), f"{name}, layer {layer}", text)
            for one, name, text in zip(maps, told.names, said, strict=True)
        ),
    ]
    figures = "".join(
        f'<figure><img src="{url}" alt="{html.escape(alt)}"><figcaption>{html.escape(text)}'
        "</figcaption></figure>"
        for url, alt, text in pictures
    )
    question = html.escape(sample.question)
    return f'<li><a href="{page}"><b>{question}</b><div class="maps">{figures}</div></a></li>\n'


def _margin(row: Mapping[str, Any]) -> str:
    margin = row.get("margin")
    return "" if margin is None else f" ({margin:+.2f})".replace("-", "−")


def _small(photo: np.ndarray, share: np.ndarray | None = None) -> str:
    """Return a small photo, with a map over it whose colours end at 1."""
    image = Image.fromarray(photo)
    image.thumbnail((_SIDE, _SIDE))
    if share is not None:
        grey = (np.asarray(image) @ _LUMA)[..., None] * _LIGHT
        heat = Image.fromarray(np.uint8(255 * share.clip(0, 1) ** 0.75))
        alpha = np.asarray(heat.resize(image.size, Image.Resampling.NEAREST))[..., None] / 255
        image = Image.fromarray(np.uint8((1 - 0.9 * alpha) * grey + 0.9 * alpha * _ORANGE))
    return photo_url(np.asarray(image), 80)
