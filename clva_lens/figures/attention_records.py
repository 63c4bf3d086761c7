"""The paper's figures of attention, from what a record keeps."""

from typing import Any

import numpy as np

from clva_lens.figures.base import Drawing
from clva_lens.figures.drift import drift_curves
from clva_lens.figures.heads import head_intensity
from clva_lens.figures.of_records import record_figure
from clva_lens.figures.saliency import SaliencyPicture, saliency_overlays


@record_figure("head_intensity")
def recorded_intensity(record: Any) -> Drawing:
    """Draw Fig. 1 from the arrays ``heads``: intensity, sensitive, insensitive, layers."""
    kept = record.arrays("heads")
    marked = kept["sensitive"], kept["insensitive"]
    return head_intensity(kept["intensity"], *marked, layers=kept["layers"].tolist())


@record_figure("drift")
def recorded_drift(record: Any) -> Drawing:
    """Draw Fig. 2b from the arrays ``drift``: three curves by sample, without and with CLVA."""
    kept = record.arrays("drift")
    names = ("entropy", "toward_positive", "toward_negative")
    first, second, third = (kept[name] for name in names)
    changed = (kept["clva_entropy"], kept["clva_toward_positive"], kept["clva_toward_negative"])
    positive, negative = kept["anchors"].tolist()
    return drift_curves(
        first,
        second,
        third,
        positive,
        negative,
        clva=changed,
        layers=kept["layers"].tolist(),
        groups=kept["groups"].tolist(),
    )


@record_figure("saliency")
def recorded_saliency(record: Any, table: str = "questions", site: str = "") -> Drawing:
    """Draw Figs. 2a, 6 and 7 from the rows ``questions`` and the arrays ``picture_0`` and so on.

    A row has the question, its label and the answer and margin under each condition.
    """
    pictures = []
    rows = record.rows(table)
    layers: list[int] = []
    for number, row in enumerate(rows):
        kept: dict[str, np.ndarray] = record.arrays(f"picture_{number}")
        layers = kept.pop("layers").tolist()
        answers = {
            name.removeprefix("answer "): (text, row[f"margin {name.removeprefix('answer ')}"])
            for name, text in row.items()
            if name.startswith("answer ")
        }
        asked = {"question": row["question"], "label": row["label"], "answers": answers}
        pictures.append(SaliencyPicture(**kept, **asked))
    return saliency_overlays(pictures, layers, site=site)
