"""Which printed numbers contradict others of the paper: by arithmetic on its tables alone.

``analyses/12_paper_arithmetic.py`` tells the same story in words; here each printed cell that is
part of a contradiction gets the reason, to stand in the place of a verdict.
"""

from functools import cache

from clva_lens.experiments.paper import MODELS, SPLITS, paper_rows

QUESTIONS = 3000
Place = tuple[int, str, str, str, str]
"""Table, model, split, method, metric."""


def contradiction(
    table: int, model: str | None, split: str, method: str, metric: str
) -> str | None:
    """Return why a printed cell cannot be right beside the others, None if nothing is known."""
    return _all().get((table, model or "", split, method, metric))


def printed(table: int, model: str | None, split: str, method: str, metric: str) -> float | None:
    """Return a printed number, None if there is none."""
    return _table(table).get((model or "", split, method, metric))


@cache
def _table(number: int) -> dict[tuple[str, str, str, str], float]:
    return {
        (row["model"], row["split"], row["method"], row["metric"]): row["value"]
        for row in paper_rows(number)
    }


@cache
def _all() -> dict[Place, str]:
    return _averages() | _headers() | _sums() | _negative_counts() | _repeated()


def _averages() -> dict[Place, str]:
    """Table 1: an average that is not the mean of its three splits."""
    found = {}
    for (model, split, method, metric), value in _table(1).items():
        if split != "average":
            continue
        mean = sum(_table(1)[model, one, method, metric] for one in SPLITS) / len(SPLITS)
        if abs(mean - value) > 0.02:
            found[1, model, split, method, metric] = (
                f"the mean of the three printed splits is {mean:.2f}"
            )
    return found


def _headers() -> dict[Place, str]:
    """Table 2: where the text's reductions are those of the other header."""
    found: dict[Place, str] = {}
    told = {MODELS[0]: (5.0, 2.5), MODELS[1]: (6.8, 2.7)}  # CHAIR_s, CHAIR_i, in the text
    for model, (captions, mentions) in told.items():
        gains = {
            metric: _table(2)[model, "", "greedy", metric] - _table(2)[model, "", "CLVA", metric]
            for metric in ("chair_s", "chair_i")
        }
        fits = abs(gains["chair_s"] - captions) + abs(gains["chair_i"] - mentions)
        swapped = abs(gains["chair_i"] - captions) + abs(gains["chair_s"] - mentions)
        if swapped < fits:
            reason = (
                f"the text's reductions ({captions:g} in CHAIR_s, {mentions:g} in CHAIR_i) are "
                "those of the other header: the headers are swapped"
            )
            found |= {
                (2, *place): reason
                for place in _table(2)
                if place[0] == model and place[3] in gains
            }
    return found


def _sums() -> dict[Place, str]:
    """Table 3: a total that is not the sum of its tasks."""
    found: dict[Place, str] = {}
    tasks = ("existence", "count", "position", "color")
    for (model, split, method, metric), value in _table(3).items():
        if metric == "hallucination":
            total = sum(_table(3)[model, split, method, task] for task in tasks)
            if abs(total - value) > 0.05:
                found[3, model, split, method, metric] = f"the sum of its tasks is {total:.2f}"
    return found


def _negative_counts() -> dict[Place, str]:
    """Table 4: F1 and accuracy of a balanced set that imply fewer than no false positives."""
    found: dict[Place, str] = {}
    for (model, split, method, metric), value in _table(4).items():
        if metric != "f1":
            continue
        f1, accuracy = value / 100, _table(4)[model, split, method, "accuracy"] / 100
        hits = f1 * QUESTIONS * (1 - accuracy) / (2 * (1 - f1))
        wrong = QUESTIONS / 2 - (accuracy * QUESTIONS - hits)
        if wrong < 0:
            reason = f"F1 and accuracy imply {wrong:.0f} false positives of {QUESTIONS} questions"
            found |= {(4, model, split, method, one): reason for one in ("f1", "accuracy")}
    return found


def _repeated() -> dict[Place, str]:
    """Table 5: accuracies that Table 1 prints otherwise, or that Table 1's own splits refute."""
    found: dict[Place, str] = {}
    for (model, _, method, metric), value in _table(5).items():
        if metric != "accuracy":
            continue
        other = _table(1)[model, "average", method, "accuracy"]
        mean = sum(_table(1)[model, one, method, "accuracy"] for one in SPLITS) / len(SPLITS)
        if abs(other - value) > 0.005:
            found[5, model, "", method, metric] = f"Table 1 prints {other:.2f}"
            found[1, model, "average", method, metric] = f"Table 5 prints {value:.2f}"
        elif abs(mean - value) > 0.02:
            found[5, model, "", method, metric] = f"Table 1's splits have the mean {mean:.2f}"
    return found
