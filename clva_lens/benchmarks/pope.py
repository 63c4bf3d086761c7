"""POPE: yes/no questions about objects (Li et al. 2023, arXiv:2305.10355), scored.

"yes" is the positive class throughout. ``pope_sets`` has the questions.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from clva_lens.benchmarks.base import Answer, Sample, Score
from clva_lens.benchmarks.metrics import auc
from clva_lens.benchmarks.parsers import count_failures, judge_rows
from clva_lens.ground.errors import BenchmarkError


def pope_metrics(
    labels: Sequence[str],
    predictions: Sequence[str],
    margins: Sequence[float | None] | None = None,
    *,
    unparsed: int | None = None,
) -> dict[str, float]:
    """Return POPE's metrics with what is needed to read them honestly.

    Fractions in [0, 1]: ``accuracy``, ``precision``, ``recall``, ``f1``, ``yes_ratio`` (predicted
    yes / all samples), ``false_positive_rate`` (predicted yes / label no) and ``auc`` (probability
    that a yes-sample has the larger margin than a no-sample, ties count one half). Counts: ``n``
    and ``unparsed`` (predictions "other" unless given).

    A prediction "other" is wrong for accuracy and recall, and neither a yes nor a no for the
    yes-ratio. A metric with a zero denominator is nan: without a predicted yes there is no
    precision and so no F1, although the official script would crash there; with predicted yeses
    that are all wrong, F1 is 0. ``auc`` is nan if any margin is missing.

    Raises:
        BenchmarkError: if there are no samples, the lengths differ, a label is not yes or no, or a
            prediction is not yes, no or other.
    """
    _check(labels, predictions, margins)
    pairs = Counter(zip(labels, predictions, strict=True))
    n = len(labels)
    true_yes, false_yes = pairs["yes", "yes"], pairs["no", "yes"]
    predicted_yes = true_yes + false_yes
    label_yes = list(labels).count("yes")
    precision = _ratio(true_yes, predicted_yes)
    recall = _ratio(true_yes, label_yes)
    defined = not (math.isnan(precision) or math.isnan(recall))
    known = [] if margins is None else [margin for margin in margins if margin is not None]
    return {
        "accuracy": _ratio(true_yes + pairs["no", "no"], n),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * true_yes, predicted_yes + label_yes) if defined else math.nan,
        "yes_ratio": _ratio(predicted_yes, n),
        "false_positive_rate": _ratio(false_yes, n - label_yes),
        "auc": auc(known, labels) if len(known) == n else math.nan,
        "unparsed": float(list(predictions).count("other") if unparsed is None else unparsed),
        "n": float(n),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _check(
    labels: Sequence[str], predictions: Sequence[str], margins: Sequence[float | None] | None
) -> None:
    if not labels:
        raise BenchmarkError("there are 0 samples to score. Pass at least one label.")
    for name, values in (("predictions", predictions), ("margins", margins)):
        if values is not None and len(values) != len(labels):
            raise BenchmarkError(
                f"there are {len(labels)} labels but {len(values)} {name}. Pass one for each "
                "sample, in the same order."
            )
    allowed = {"label": ("yes", "no"), "prediction": ("yes", "no", "other")}
    for (kind, words), values in zip(allowed.items(), (labels, predictions), strict=True):
        strange = sorted(set(values) - set(words))
        if strange:
            raise BenchmarkError(
                f"a {kind} must be one of {', '.join(words)}, but '{strange[0]}' was found. "
                "Turn raw answers into predictions with parse(text)."
            )


def score_pope(samples: Sequence[Sample], answers: Sequence[Answer], parser: str) -> Score:
    """Return the POPE score of ``answers``, each row with its raw text and parsed prediction.

    The metrics are those of ``pope_metrics`` and ``failed``, the number of samples without an
    answer, which are wrong. ``unparsed`` counts the answers that the strict parser calls "other",
    whichever parser scores: the official one calls them "yes", and that should be seen. With the
    parser ``lmms`` there are ``lmms_…`` metrics besides, see ``lmms_metrics``.

    Raises:
        BenchmarkError: if samples and answers do not have the same ids, or a label is not yes/no.
    """
    rows = judge_rows(samples, answers, parser)
    counts = count_failures(rows)
    metrics = pope_metrics(
        [row["label"] for row in rows],
        [row["prediction"] for row in rows],
        [row["margin"] for row in rows],
        unparsed=int(counts["unparsed"]),
    )
    if parser == "lmms":
        metrics |= lmms_metrics(rows)
    return Score(metrics=metrics | {"failed": counts["failed"]}, rows=rows)


def lmms_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return recall, F1 and "yes ratio" as lmms-eval prints them (75571cfe, tasks/pope/utils.py).

    An answer that is neither yes nor no is left out of the recall, which so rises with junk; what
    is called yes ratio is the share of yes-*labels*, 0.5 whatever the model says. A zero
    denominator gives 0. Accuracy and precision are the ordinary ones.
    """
    pairs = [(row["label"], row["prediction"]) for row in rows]
    true_yes = pairs.count(("yes", "yes"))
    said = true_yes + pairs.count(("no", "yes"))
    asked = true_yes + pairs.count(("yes", "no"))
    precision = true_yes / said if said else 0.0
    recall = true_yes / asked if asked else 0.0
    both = precision + recall
    return {
        "lmms_recall": recall,
        "lmms_f1": 2 * precision * recall / both if both else 0.0,
        "lmms_yes_ratio": sum(label == "yes" for label, _ in pairs) / len(pairs),
    }
