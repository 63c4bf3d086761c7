"""The numbers that the paper reports (arXiv:2603.25088v1), to stand beside measured ones.

They are quoted as printed, mistakes included; ``analyses/12_paper_arithmetic.py`` lists those.
Percentages (POPE, CHAIR, accuracy), points (MME), as in the paper.
"""

from collections.abc import Mapping, Sequence
from typing import Any

MODELS = ("LLaVA-1.5", "InstructBLIP", "Qwen-VL")
SPLITS = ("random", "popular", "adversarial")
# The data sets that Table 1 averages over, and what their mean is called.
SOURCES, MEAN = ("coco", "aokvqa", "gqa"), "mean"

# model, method, then F1 and accuracy for each split and for their average.
_TABLE_1 = """
LLaVA-1.5 greedy 87.18 88.26 84.48 85.02 81.24 81.11 84.30 84.79
LLaVA-1.5 beam 87.26 88.35 84.50 85.03 81.21 81.09 84.32 84.82
LLaVA-1.5 MemVR 87.83 88.40 83.20 84.37 80.61 80.53 83.88 84.43
LLaVA-1.5 ClearSight 88.16 88.77 85.13 85.02 81.44 80.39 84.91 84.72
LLaVA-1.5 IMCCD 88.22 88.82 85.45 86.00 82.07 81.66 85.24 85.49
LLaVA-1.5 CLVA 88.70 89.37 85.82 86.39 82.50 82.19 85.67 85.98
InstructBLIP greedy 81.25 80.75 78.17 76.60 76.12 73.71 78.51 77.02
InstructBLIP beam 81.30 80.80 78.17 76.60 76.09 73.69 78.52 77.03
InstructBLIP IMCCD 85.85 86.30 81.79 81.22 78.90 77.29 82.18 81.60
InstructBLIP CLVA 87.58 87.88 82.53 81.79 79.47 77.72 83.19 82.46
Qwen-VL greedy 84.88 86.34 83.45 84.68 81.93 82.86 83.42 84.62
Qwen-VL beam 84.88 86.24 83.40 85.62 81.97 82.89 83.41 84.91
Qwen-VL MemVR 85.75 87.30 85.19 84.73 82.07 82.90 84.33 84.97
Qwen-VL ClearSight 85.94 87.63 84.83 85.78 81.95 82.94 84.24 85.45
Qwen-VL IMCCD 86.66 87.79 85.50 86.05 82.42 82.84 84.86 86.56
Qwen-VL CLVA 86.51 87.75 84.74 86.13 82.21 83.45 84.48 85.77
"""

# method, then three columns a model, under the paper's headers CHAIR_i, CHAIR_s and recall.
_TABLE_2 = """
greedy 53.0 15.2 76.7 57.0 16.7 70.4 6.6 7.0 45.5
beam 55.6 16.0 76.7 56.2 14.7 71.4 6.4 5.7 45.7
MemVR 49.2 12.9 78.4 - - - 4.7 4.0 45.3
ClearSight 50.0 13.6 78.8 - - - 4.2 3.8 44.0
IMCCD 52.2 13.5 76.6 55.3 17.0 73.0 6.6 5.3 41.7
CLVA 48.0 12.7 80.2 50.2 14.0 74.0 3.8 2.7 46.3
"""

# model, method, existence, count, position, color, total.
_TABLE_3 = """
LLaVA-1.5 greedy 170.00 130.00 93.33 121.66 514.99
LLaVA-1.5 beam 170.00 130.00 93.33 121.66 514.99
LLaVA-1.5 MemVR 190.00 155.00 133.33 170.00 648.33
LLaVA-1.5 ClearSight 190.00 160.00 133.33 160.00 643.33
LLaVA-1.5 IMCCD 195.00 138.33 123.33 155.00 611.66
LLaVA-1.5 CLVA 195.00 163.33 133.33 175.00 666.66
InstructBLIP greedy 185.00 60.00 50.00 120.00 415.00
InstructBLIP beam 175.00 68.33 51.66 115.00 409.99
InstructBLIP IMCCD 185.00 55.00 50.00 100.00 390.00
InstructBLIP CLVA 185.00 55.00 50.00 130.00 420.00
Qwen-VL greedy 175.00 140.00 123.33 180.00 618.33
Qwen-VL beam 180.00 141.66 133.33 180.00 634.99
Qwen-VL MemVR 185.00 145.00 123.33 185.00 638.33
Qwen-VL ClearSight 185.00 141.66 148.33 180.00 654.99
Qwen-VL IMCCD 190.00 140.00 138.33 175.00 643.33
Qwen-VL CLVA 180.00 146.66 158.33 185.00 669.99
"""

# anchors used (LLaVA-1.5), MME hallucination subset, MME overall, POPE random COCO F1, accuracy.
_TABLE_4 = """
none 514.99 1558.76 84.60 86.76
positive 654.66 1843.92 85.39 87.00
negative 643.66 1819.95 85.50 87.06
both 666.66 1851.23 86.99 88.26
swapped 505.00 1531.26 83.73 86.20
"""

# model, method, accuracy, seconds in all, GiB, seconds an example.
_TABLE_5 = """
LLaVA-1.5 greedy 84.79 468 15.7 0.155
LLaVA-1.5 IMCCD 85.49 998 18.7 0.353
LLaVA-1.5 CLVA 85.98 474 15.8 0.157
InstructBLIP greedy 77.02 307 16.6 0.102
InstructBLIP IMCCD 81.60 630 16.7 0.207
InstructBLIP CLVA 82.46 322 16.6 0.105
Qwen-VL greedy 84.62 874 20.4 0.296
Qwen-VL IMCCD 86.56 2122 24.9 0.709
Qwen-VL CLVA 86.77 945 20.4 0.321
"""

# split, method, then F1 and accuracy for each model.
_TABLE_6 = """
random sampling 81.94 83.76 81.12 81.50 83.72 85.73
random CLVA 82.97 84.33 84.06 84.43 84.87 86.56
popular sampling 80.86 82.56 78.74 78.50 83.03 84.96
popular CLVA 83.52 84.96 82.54 81.55 83.54 85.86
adversarial sampling 78.43 79.73 77.91 77.43 81.43 83.13
adversarial CLVA 79.83 80.76 80.78 80.30 83.04 84.53
"""


def paper_rows(table: int) -> list[dict[str, Any]]:
    """Return the cells of a table, 1 to 6, as rows ``model, split, method, metric, value``.

    ``split`` is that of POPE ("average" where the paper averages), or "" where there is none. Cells
    that the paper leaves empty are left out.
    """
    return [
        dict(zip(("model", "split", "method", "metric", "value"), cell, strict=True))
        for cell in _CELLS[table]()
        if cell[-1] is not None
    ]


def _lines(text: str, labels: int) -> list[tuple[list[str], list[float | None]]]:
    rows = [line.split() for line in text.strip().splitlines()]
    return [(row[:labels], [None if x == "-" else float(x) for x in row[labels:]]) for row in rows]


def _pope() -> list[tuple]:
    places = [(split, m) for split in (*SPLITS, "average") for m in ("f1", "accuracy")]
    return [
        (model, split, method, metric, value)
        for (model, method), values in _lines(_TABLE_1, 2)
        for (split, metric), value in zip(places, values, strict=True)
    ]


def _chair() -> list[tuple]:
    places = [(model, m) for model in MODELS for m in ("chair_i", "chair_s", "recall")]
    return [
        (model, "", method, metric, value)
        for (method,), values in _lines(_TABLE_2, 1)
        for (model, metric), value in zip(places, values, strict=True)
    ]


def _columns(text: str, names: tuple[str, ...]) -> list[tuple]:
    return [
        (model, "", method, metric, value)
        for (model, method), values in _lines(text, 2)
        for metric, value in zip(names, values, strict=True)
    ]


def _anchors() -> list[tuple]:
    names = ("hallucination", "overall", "f1", "accuracy")
    return [
        ("LLaVA-1.5", "random" if metric in ("f1", "accuracy") else "", method, metric, value)
        for (method,), values in _lines(_TABLE_4, 1)
        for metric, value in zip(names, values, strict=True)
    ]


def _sampling() -> list[tuple]:
    places = [(model, m) for model in MODELS for m in ("f1", "accuracy")]
    return [
        (model, split, method, metric, value)
        for (split, method), values in _lines(_TABLE_6, 2)
        for (model, metric), value in zip(places, values, strict=True)
    ]


_CELLS = {
    1: _pope,
    2: _chair,
    3: lambda: _columns(_TABLE_3, ("existence", "count", "position", "color", "hallucination")),
    4: _anchors,
    5: lambda: _columns(_TABLE_5, ("accuracy", "seconds", "gib", "seconds_each")),
    6: _sampling,
}


def paper_model(name: str) -> str | None:
    """Return the paper's name of a checkpoint, or None if the paper did not measure it."""
    plain = name.lower()
    known = {"llava-1.5-7b": MODELS[0], "instructblip-vicuna-7b": MODELS[1], "qwen-vl": MODELS[2]}
    other = ("qwen2", "qwen3", "qwen-vl-chat")
    found = [paper for part, paper in known.items() if part in plain]
    return found[0] if found and not any(one in plain for one in other) else None


def beside_paper(rows: list[dict[str, Any]], table: int, model: str) -> list[dict[str, Any]]:
    """Return rows of ``measure_methods`` with the paper's number as ``paper`` where there is one.

    In percent as printed; None where the paper has no such cell, or did not measure the model. A
    number stands only beside what it is of: those of Table 1 are means over COCO, A-OKVQA and GQA
    (``pope_means``), those of the other tables' POPE are of COCO.
    """
    named = paper_model(model)
    printed = {
        (cell["split"], cell["method"], cell["metric"]): cell["value"]
        for cell in paper_rows(table)
        if cell["model"] == named
    }

    def cell(row: dict[str, Any]) -> float | None:
        kind, *of = row["benchmark"].split("/")
        if kind != "pope":
            return printed.get(("", row["method"], row["metric"]))
        source, split = of
        measured = MEAN if table == 1 else "coco"
        return printed.get((split, row["method"], row["metric"])) if source == measured else None

    return [{**row, "paper": cell(row)} for row in rows]


def pope_means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that Table 1 prints: means over the three data sets, and over the splits.

    ``rows`` are of ``measure_methods``. ``pope/mean/SPLIT`` is the mean over COCO, A-OKVQA and GQA,
    and there is one only if all three were measured; ``pope/SOURCE/average`` is that over the three
    splits of a source, the mean among them. Values and changes only: means have no intervals here.
    """
    table = {(row["benchmark"], row["method"], row["metric"]): row for row in rows}
    sources = list(
        dict.fromkeys(
            row["benchmark"].split("/")[1] for row in rows if row["benchmark"].startswith("pope/")
        )
    )
    asked = list(dict.fromkeys((row["method"], row["metric"]) for row in rows))
    made: list[dict[str, Any]] = []

    def add(name: str, parts: Sequence[str]) -> None:
        for method, metric in asked:
            found = [table.get((part, method, metric)) for part in parts]
            if metric == "seconds" or None in found:
                continue
            row: dict[str, Any] = {"benchmark": name, "method": method, "metric": metric}
            for key in ("value", "change"):
                values = [one[key] for one in found if one is not None and one[key] is not None]
                row[key] = sum(values) / len(values) if len(values) == len(parts) else None
            row |= {"low": None, "high": None, "n": sum(one["n"] for one in found if one)}
            table[name, method, metric] = row
            made.append(row)

    if set(SOURCES) <= set(sources):
        for split in SPLITS:
            add(f"pope/{MEAN}/{split}", [f"pope/{source}/{split}" for source in SOURCES])
        sources.append(MEAN)
    for source in sources:
        add(f"pope/{source}/average", [f"pope/{source}/{split}" for split in SPLITS])
    return made
