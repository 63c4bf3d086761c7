"""LLaVA-Bench: open questions that a language model judges (Liu et al., arXiv:2304.08485).

One sample of the COCO part: picture 000000441147.jpg, "What is the color of the two suitcases in
the image?", reference "The colors of the two suitcases in the image are black and brown with yellow
details.", category conv. COCO has 90 questions on 30 pictures, in the wild 60 on 24.

Nothing here calls a judge. ``judge_requests`` makes what one is asked, to the letter of LLaVA's
eval_gpt_review_visual.py and eval_gpt_review_bench.py (haotian-liu/LLaVA, commit c121f043), and
``read_judgements`` and ``score_judgements`` take its replies.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from clva_lens.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Benchmark,
    Sample,
    Score,
    choose,
    match,
    require_known,
)
from clva_lens.benchmarks.files import find_images, locate, read_object, read_rows, sha256
from clva_lens.benchmarks.protocols import PROTOCOLS
from clva_lens.errors import BenchmarkError

PARTS = ("coco", "wild")
CATEGORIES = ("conv", "detail", "complex")

_FROM = "github.com/haotian-liu/LLaVA or huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_FILES = {
    "coco": ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl", "caps_boxes_coco2014_val_80.jsonl"),
    "wild": ("questions.jsonl", "answers_gpt4.jsonl", "context.jsonl"),
}
_JUDGE = "You are a helpful and precise assistant for checking the quality of the answer."


@dataclass(frozen=True)
class LlavaBench(Benchmark):
    """One part of LLaVA-Bench; the label of a sample is the reference answer.

    Args:
        part: pictures of COCO, or in the wild.
        data: the folder of the questions, reference answers and contexts. None: $CLVA_LENS_DATA.
        images: the folder of the pictures. None: ``images`` beside the questions.
        protocol: how it is asked, see ``protocols``.
    """

    version: ClassVar[str] = "1"
    part: str
    data: str | Path | None = None
    images: str | Path | None = None
    protocol: str = "chat"

    def __post_init__(self) -> None:
        """Check the names."""
        require_known("part", self.part, PARTS)
        PROTOCOLS.get(self.protocol)

    @property
    def name(self) -> str:
        """``llava-bench/`` and the part."""
        return f"llava-bench/{self.part}"

    @property
    def max_new_tokens(self) -> int:
        """The protocol's."""
        return PROTOCOLS.get(self.protocol).max_new_tokens

    def questions(self) -> list[Sample]:
        """Return all samples without looking for pictures, whose file names they have instead.

        Raises:
            BenchmarkError: if questions or reference answers cannot be found, or do not fit.
        """
        protocol = PROTOCOLS.get(self.protocol)
        questions, references, _ = self._files()
        rows = read_rows(questions, ("question_id", "image", "text", "category"))
        known = {row["question_id"]: row for row in read_rows(references, ("question_id", "text"))}
        missing = [row["question_id"] for row in rows if row["question_id"] not in known]
        if missing:
            raise BenchmarkError(
                f"{len(missing)} of {len(rows)} questions have no reference answer in "
                f"{references}, the first is {missing[0]}. Pass the files of one release."
            )
        return [
            Sample(
                id=str(row["question_id"]),
                image=row["image"],
                question=protocol.ask(row["text"]),
                label=known[row["question_id"]]["text"],
                group=row["image"],
                category=row["category"],
                system=protocol.system,
            )
            for row in rows
        ]

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them from pictures drawn with ``seed``.

        Raises:
            BenchmarkError: if questions or pictures are missing.
        """
        chosen = choose(self.questions(), limit, seed)
        folder = Path(self.images) if self.images else self._files()[0].parent / "images"
        paths = find_images(folder, [sample.image for sample in chosen])
        return [replace(s, image=path) for s, path in zip(chosen, paths, strict=True)]

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return how long the answers are, which needs no judge.

        ``words`` and ``words/{category}`` are mean numbers of words between white space over the
        samples that were answered, ``empty`` the number of answers without a word, and ``failed``
        that of samples without an answer. Quality is for ``score_judgements``.

        Raises:
            BenchmarkError: if samples and answers do not have the same ids.
        """
        rows = [
            {
                "id": sample.id,
                "group": sample.group,
                "category": sample.category,
                "question": sample.question,
                "label": sample.label,
                "answer": answer.text,
                "words": len(answer.text.split()),
                "error": answer.error,
            }
            for sample, answer in match(samples, answers)
        ]
        answered = [row for row in rows if row["error"] is None]
        metrics = {"words": _mean([row["words"] for row in answered])}
        for category in CATEGORIES:
            words = [row["words"] for row in answered if row["category"] == category]
            metrics[f"words/{category}"] = _mean(words)
        metrics["empty"] = float(sum(row["words"] == 0 for row in answered))
        metrics["failed"] = float(len(rows) - len(answered))
        return Score(metrics | {"n": float(len(rows))}, rows)

    def contexts(self) -> dict[str, str]:
        """Return what the judge is told about each picture, by file name.

        COCO: five captions and the boxes of the objects; in the wild: a description.
        """
        rows = read_rows(self._files()[2], ("image",))
        if self.part == "wild":
            return {row["image"]: row["caption"] for row in rows}
        return {
            row["image"]: "\n".join(row["captions"])
            + "\n\n"
            + "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in row["instances"])
            for row in rows
        }

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the questions, references and contexts."""
        return {path.name: sha256(path) for path in self._files()}

    def _files(self) -> tuple[Path, Path, Path]:
        """Return the files of questions, reference answers and contexts."""
        folders = ("", f"{self.part}/", f"llava_bench/{self.part}/")
        questions, references, contexts = (
            locate(
                self.data,
                [f"{folder}{name}" for folder in folders],
                f"the file {name} of {self.name}",
                _FROM,
            )
            for name in _FILES[self.part]
        )
        return questions, references, contexts


for _part in PARTS:
    BENCHMARKS.register(f"llava-bench/{_part}", LlavaBench(_part))


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
    """Return the replies in a file of JSON lines: ``question_id``, and ``content`` or ``text``.

    LLaVA's review files are such files.

    Raises:
        BenchmarkError: if the file is corrupted or a row has neither.
    """
    found = []
    for number, row in enumerate(read_rows(path, ("question_id",)), start=1):
        text = row.get("content", row.get("text"))
        if not isinstance(text, str):
            raise BenchmarkError(
                f"row {number} of {path} has no reply: neither content nor text. Add it."
            )
        scores = parse_judgement(text) or (None, None)
        found.append(Judgement(str(row["question_id"]), *scores, text))
    return found


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
    reference = _mean([row["reference_score"] for row in rows])
    return _mean([row["model_score"] for row in rows]) / reference if reference else math.nan


def _official(rows: Sequence[dict[str, Any]]) -> float:
    means = [
        round(_mean([-1 if row[key] is None else row[key] for row in rows]), 3)
        for key in ("model_score", "reference_score")
    ]
    return round(means[0] / means[1] * 100, 1) if means[1] else math.nan


def _mean(values: Sequence[float | int]) -> float:
    return float(np.mean(values)) if values else math.nan
