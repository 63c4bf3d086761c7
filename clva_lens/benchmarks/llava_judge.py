"""LLaVA-Bench's judge: what it is asked, and what its replies are worth. Nothing here calls one.

``judge_requests`` follows LLaVA's eval_gpt_review_visual.py and eval_gpt_review_bench.py to the
letter (haotian-liu/LLaVA, commit c121f043).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clva_lens.benchmarks.base import (
    Answer,
    Sample,
    Score,
    match,
)
from clva_lens.benchmarks.files import read_object, read_rows
from clva_lens.benchmarks.llava_bench import CATEGORIES, LlavaBench, mean
from clva_lens.ground.errors import BenchmarkError

_JUDGE = "You are a helpful and precise assistant for checking the quality of the answer."


def judge_requests(
    benchmark: LlavaBench,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    rules: str | Path,
) -> list[dict[str, Any]]:
    """Return one request to a judge for each answer: reference first, then the model's answer.

    ``rules`` is LLaVA's rule.json (llava/eval/table/rule.json), which has the prompts. A request
    has the messages and the official settings of the call (temperature 0.2, 1,024 tokens; the
    published numbers are gpt-4-0314's). Samples that failed get none, and are missing then. The
    question is the benchmark's own, without what a protocol adds. ``files.write_lines`` writes
    them.

    Raises:
        BenchmarkError: if ids differ, there is no rule for a category, or no context for a picture.
    """
    book, contexts = read_object(rules), benchmark.contexts()
    asked = {
        sample.id: sample.question for sample in replace(benchmark, protocol="bare").questions()
    }
    prefix = "" if benchmark.part == "coco" else "llava_bench_"
    requests = []
    for sample, answer in match(samples, answers):
        if answer.error is not None:
            continue
        rule = book.get(f"{prefix}{sample.category}")
        if rule is None or sample.group not in contexts or sample.id not in asked:
            raise BenchmarkError(
                f"'{sample.id}' ({sample.group}, {prefix}{sample.category}) has no rule in {rules} "
                "or no context or question in the benchmark. Pass its own samples and LLaVA's "
                "rule.json."
            )
        role = rule["role"]
        said = [
            f"[{role} {place}]\n{text}\n\n[End of {role} {place}]\n\n"
            for place, text in ((1, sample.label), (2, answer.text))
        ]
        content = (
            f"[Context]\n{contexts[sample.group]}\n\n[Question]\n{asked[sample.id]}\n\n"
            f"{said[0]}{said[1]}[System]\n{rule['prompt']}\n\n"
        )
        requests.append(
            {
                "question_id": sample.id,
                "category": sample.category,
                "messages": [
                    {"role": "system", "content": _JUDGE},
                    {"role": "user", "content": content},
                ],
                "temperature": 0.2,
                "max_tokens": 1024,
            }
        )
    return requests


class Judgement(NamedTuple):
    """A judge's reply to the answer of sample ``id``: its two scores, None if it gave none."""

    id: str
    reference: float | None
    model: float | None
    text: str


def read_judgements(path: str | Path) -> list[Judgement]:
    """Return the replies in a file: ``question_id`` with a reply, its scores, or both.

    The reply is ``content`` or ``text``, the scores are ``tuple`` or ``score``, as in LLaVA's
    reviews; its scripts count the latter, where −1 twice is a reply that could not be read.

    Raises:
        BenchmarkError: if the file is corrupted, a row has neither, or they say different scores.
    """
    found = []
    for number, row in enumerate(read_rows(path, ("question_id",)), start=1):
        where = f"row {number} of {path}"
        text, told = row.get("content", row.get("text")), row.get("tuple", row.get("score"))
        if not isinstance(text, str) and told is None:
            raise BenchmarkError(
                f"{where} has no reply: neither content nor text, tuple nor score. Add it."
            )
        text = text if isinstance(text, str) else ""
        read = parse_judgement(text)
        scores = read if told is None else _told_scores(told, where)
        if read is not None and scores != read:
            raise BenchmarkError(
                f"{where} has the scores {told}, but its reply begins with {read[0]:g} "
                f"{read[1]:g}. Leave the right ones in the file."
            )
        found.append(Judgement(str(row["question_id"]), *(scores or (None, None)), text))
    return found


def _told_scores(told: Any, where: str) -> tuple[float, float] | None:
    """Return the two scores that a review has beside its text; None for twice −1."""
    numbers = told if isinstance(told, list) else []
    if len(numbers) != 2 or not all(isinstance(one, int | float) for one in numbers):
        raise BenchmarkError(f"{where} has the scores {told!r}, but they are two. Mend them.")
    return None if numbers == [-1, -1] else (float(numbers[0]), float(numbers[1]))


def parse_judgement(text: str) -> tuple[float, float] | None:
    """Return the two numbers of a reply's first line, or None.

    LLaVA's rule: commas become spaces, and the line must be two numbers with one space between.

    >>> parse_judgement("8 9.5" + chr(10) + "Both are good."), parse_judgement("Scores: 8 9")
    ((8.0, 9.5), None)
    """
    parts = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        scores = [float(part) for part in parts]
    except ValueError:
        return None
    return (scores[0], scores[1]) if len(scores) == 2 and np.isfinite(scores).all() else None


def score_judgements(samples: Sequence[Sample], judgements: Sequence[Judgement]) -> Score:
    """Return the relative score of the judged answers, by category and over ``all``.

    ``{part}`` is 100 · mean(model) / mean(reference) over the replies that could be read.
    ``{part}/official`` is what LLaVA's summarize_gpt_review.py prints (one decimal): there a reply
    that cannot be read counts as −1 for both. ``failed`` is the number of such replies and
    ``missing`` that of samples without a reply, which are in neither.

    Raises:
        BenchmarkError: if there are no samples, or a reply is to no sample or one of several to it.
    """
    by_id = {judgement.id: judgement for judgement in judgements}
    known = {sample.id for sample in samples}
    strange = [one.id for one in judgements if one.id not in known]
    twice = [name for name, times in Counter(j.id for j in judgements).items() if times > 1]
    if strange or twice or not samples:
        raise BenchmarkError(
            f"there are {len(samples)} samples and {len(judgements)} replies, of which "
            f"{len(strange)} are to no sample {strange[:3]} and {len(twice)} samples have several "
            f"{twice[:3]}. Pass one reply a sample."
        )
    rows = []
    for sample in samples:
        reply = by_id.get(sample.id)
        rows.append(
            {
                "id": sample.id,
                "group": sample.group,
                "category": sample.category,
                "reference_score": reply.reference if reply else None,
                "model_score": reply.model if reply else None,
                "reply": reply.text if reply else None,
            }
        )
    replied = [row for row in rows if row["reply"] is not None]
    failed = [row for row in replied if row["model_score"] is None]
    metrics: dict[str, float] = {}
    for part in ("all", *CATEGORIES):
        inside = [row for row in replied if part in ("all", row["category"])]
        metrics[part] = 100 * _relative([row for row in inside if row not in failed])
        metrics[f"{part}/official"] = _official(inside)
    metrics |= {
        "failed": float(len(failed)),
        "missing": float(len(rows) - len(replied)),
        "n": float(len(rows)),
    }
    return Score(metrics, rows)


def _relative(rows: Sequence[dict[str, Any]]) -> float:
    reference = mean([row["reference_score"] for row in rows])
    return mean([row["model_score"] for row in rows]) / reference if reference else math.nan


def _official(rows: Sequence[dict[str, Any]]) -> float:
    means = [
        round(mean([-1 if row[key] is None else row[key] for row in rows]), 3)
        for key in ("model_score", "reference_score")
    ]
    return round(means[0] / means[1] * 100, 1) if means[1] else math.nan
