"""POPE: yes/no questions about objects (Li et al. 2023, arXiv:2305.10355).

One row of the COCO files: ``{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text":
"Is there a snowboard in the image?", "label": "yes"}``. "yes" is the positive class throughout.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clva_lens.benchmarks.base import Answer, Benchmark, Sample, Score, choose, match
from clva_lens.benchmarks.metrics import auc
from clva_lens.errors import BenchmarkError
from clva_lens.registry import Registry

Parser = Callable[[str], str]
PARSERS = Registry[Parser]("parser")

# The first word, after anything that is neither a letter nor a digit. An apostrophe or a hyphen
# belongs to its word, so that "no-one" is not "no".
_FIRST_WORD = re.compile(r"[\W_]*([\w'’-]+)")


def parse(text: str, parser: str = "strict") -> str:
    """Return "yes", "no" or "other" for a raw answer, without seeing the label.

    ``strict``: the first word is yes or no, in any case and after any punctuation; else "other".
    ``official``: POPE's own rule (github.com/RUCAIBox/POPE, evaluate.py, commit 08d957b9), which
    never says "other".

    >>> parse("Yes, it is."), parse("nope"), parse("NO", parser="official")
    ('yes', 'other', 'yes')

    Raises:
        UnknownName: if there is no such parser.
    """
    return PARSERS.get(parser)(text)


def _strict(text: str) -> str:
    found = _FIRST_WORD.match(text)
    word = found.group(1).strip("_'’-").lower() if found else ""
    return word if word in ("yes", "no") else "other"


def _official(text: str) -> str:
    # Every quirk is theirs: case-sensitive, only the part before the first full stop, split at
    # single spaces (so "No\n" is not "No"), and "yes" for whatever is not a "no".
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


PARSERS.register("strict", _strict)
PARSERS.register("official", _official)


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
    pairs = list(zip(labels, predictions, strict=True))
    n = len(pairs)
    true_yes = pairs.count(("yes", "yes"))
    false_yes = pairs.count(("no", "yes"))
    predicted_yes = true_yes + false_yes
    label_yes = list(labels).count("yes")
    precision = _ratio(true_yes, predicted_yes)
    recall = _ratio(true_yes, label_yes)
    defined = not (math.isnan(precision) or math.isnan(recall))
    known = [] if margins is None else [margin for margin in margins if margin is not None]
    return {
        "accuracy": _ratio(true_yes + pairs.count(("no", "no")), n),
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
        strange = sorted({value for value in values if value not in words})
        if strange:
            raise BenchmarkError(
                f"a {kind} must be one of {', '.join(words)}, but '{strange[0]}' was found. "
                "Turn raw answers into predictions with parse(text)."
            )


def score_pope(samples: Sequence[Sample], answers: Sequence[Answer], parser: str) -> Score:
    """Return the POPE score of ``answers``, each row with its raw text and parsed prediction.

    ``unparsed`` counts the answers that the strict parser calls "other", whichever parser scores:
    the official one calls them "yes", and that should be seen.

    Raises:
        BenchmarkError: if samples and answers do not have the same ids, or a label is not yes/no.
    """
    rows: list[dict[str, Any]] = [
        {
            "id": sample.id,
            "group": sample.group,
            "question": sample.question,
            "label": sample.label,
            "answer": answer.text,
            "prediction": "other" if answer.error else parse(answer.text, parser),
            "strict": parse(answer.text, "strict"),
            "margin": answer.margin,
            "parser": parser,
        }
        for sample, answer in match(samples, answers)
    ]
    metrics = pope_metrics(
        [row["label"] for row in rows],
        [row["prediction"] for row in rows],
        [row["margin"] for row in rows],
        unparsed=sum(row["strict"] == "other" for row in rows),
    )
    return Score(metrics=metrics, rows=rows)


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a POPE file, JSON lines (COCO) or one JSON array (A-OKVQA, GQA).

    Raises:
        BenchmarkError: if the file is missing, is neither, or a row lacks a key.
    """
    file = Path(path)
    if not file.is_file():
        raise BenchmarkError(f"there is no POPE file {file}. Check the path.")
    text = file.read_text(encoding="utf-8").strip()
    try:
        lines = text.split("\n")
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"{file} is neither JSON lines nor a JSON array ({error}). Pass one of POPE's question "
            "files."
        ) from error
    for number, row in enumerate(rows, start=1):
        absent = {"question_id", "image", "text", "label"} - set(row)
        if absent:
            raise BenchmarkError(
                f"row {number} of {file} has no {', '.join(sorted(absent))}. Pass a question file, "
                "not an answer file."
            )
    return rows


@dataclass(frozen=True)
class PopeFile(Benchmark):
    """One POPE question file, with the images in a folder.

    Args:
        path: JSON lines or one JSON array.
        images: the folder of its images.
        parser: what an answer means, see ``parse``.
        suffix: text added to each question; papers differ in it, so it belongs to the result.
    """

    version: ClassVar[str] = "1"
    max_new_tokens: ClassVar[int] = 4
    path: str | Path
    images: str | Path
    parser: str = "official"
    suffix: str = ""

    def __post_init__(self) -> None:
        """Check the parser."""
        PARSERS.get(self.parser)

    @property
    def name(self) -> str:
        """``pope/`` and the stem of the file."""
        return f"pope/{Path(self.path).stem}"

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them from images drawn with ``seed``."""
        everything = [
            Sample(
                id=str(row["question_id"]),
                image=Path(self.images) / row["image"],
                question=row["text"] + self.suffix,
                label=row["label"],
                group=row["image"],
            )
            for row in read_questions(self.path)
        ]
        return choose(everything, limit, seed)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the POPE score, parsed by the benchmark's parser."""
        return score_pope(samples, answers, self.parser)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the question file."""
        file = Path(self.path)
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
