"""MME: two yes/no questions a picture, one with the answer no (Fu et al., arXiv:2306.13394).

One pair, of the task existence: "Is there a refrigerator in this image? Please answer yes or no."
Yes, and the same with "donut", No. The official score of a task is 100 · accuracy + 100 ·
accuracy-plus, where accuracy-plus is the share of pictures with both questions right: 200 at most,
and exactly 50 for a model that always says the same word.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from clva_lens.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Sample,
    Score,
    choose,
    require_known,
)
from clva_lens.benchmarks.files import DATA, PictureBenchmark, find_images
from clva_lens.benchmarks.metrics import auc
from clva_lens.benchmarks.mme_answers import read_mme_answers
from clva_lens.benchmarks.mme_files import (
    find_questions,
    image_folder,
    read_questions,
    read_results,
)
from clva_lens.benchmarks.parsers import PARSERS, count_failures, judge_rows
from clva_lens.benchmarks.protocols import PROTOCOLS
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
TOTALS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": HALLUCINATION}
SUBSETS = ("all", *TOTALS)


def score_mme(samples: Sequence[Sample], answers: Sequence[Answer], parser: str = "mme") -> Score:
    """Return the MME score of ``answers``, as the official calculation.py counts it.

    ``{task}`` is the official score of a task in [0, 200], and ``{task}/accuracy`` and
    ``{task}/accuracy_plus`` are its parts, fractions in [0, 1]. ``perception`` (of 2,000),
    ``cognition`` (of 800) and ``hallucination`` (existence, count, position and color, of 800) are
    sums, nan where one of their tasks was not asked. ``accuracy``, ``yes_ratio`` and ``auc`` are
    over all questions; ``unparsed`` is what the strict parser cannot read and ``failed`` what was
    not answered: both are wrong.

    The two questions of a picture are paired by ``group``, whatever their order (the official
    script takes consecutive lines for a pair). A picture with one question, from a cut-off sample,
    is no pair: it is left out of accuracy-plus and counted as ``unpaired``.

    Raises:
        BenchmarkError: if samples and answers do not have the same ids, a label is not yes or no, a
            picture has more than two questions, or its questions are of different tasks.
    """
    rows = judge_rows(samples, answers, parser)
    pictures = _pictures(rows)
    tasks = dict.fromkeys([*PERCEPTION, *COGNITION, *sorted({row["category"] for row in rows})])
    scores: dict[str, float] = {}
    for task in tasks:
        right = [row["right"] for row in rows if row["category"] == task]
        if not right:
            continue
        pairs = [
            all(row["right"] for row in pair)
            for pair in pictures.values()
            if len(pair) == 2 and pair[0]["category"] == task
        ]
        accuracy = sum(right) / len(right)
        plus = sum(pairs) / len(pairs) if pairs else math.nan
        scores[task] = 100 * accuracy + 100 * plus
        scores |= {f"{task}/accuracy": accuracy, f"{task}/accuracy_plus": plus}
    totals = {
        name: sum(scores.get(task, math.nan) for task in members)
        for name, members in TOTALS.items()
    }
    margins = [row["margin"] for row in rows if row["margin"] is not None]
    labels = [row["label"] for row in rows]
    overall = {
        "accuracy": sum(row["right"] for row in rows) / len(rows),
        "yes_ratio": sum(row["prediction"] == "yes" for row in rows) / len(rows),
        "auc": auc(margins, labels) if len(margins) == len(rows) else math.nan,
        "unpaired": float(sum(len(pair) == 1 for pair in pictures.values())),
        "n": float(len(rows)),
    }
    return Score(totals | scores | overall | count_failures(rows), rows)


def _pictures(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each picture."""
    pictures: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["label"] not in ("yes", "no"):
            raise BenchmarkError(
                f"the label of '{row['id']}' is '{row['label']}', but must be yes or no. Map it."
            )
        pictures.setdefault(row["group"], []).append(row)
    for group, pair in pictures.items():
        if len(pair) > 2 or len({row["category"] for row in pair}) > 1:
            raise BenchmarkError(
                f"the picture '{group}' has {len(pair)} questions of "
                f"{', '.join(sorted({row['category'] for row in pair}))}, but MME has two of one "
                "task. Give pictures of different tasks groups of their own."
            )
    return pictures


@dataclass(frozen=True)
class Mme(PictureBenchmark):
    """MME, or one of its three parts.

    Args:
        subset: all 14 tasks (2,374 questions), or those of one total.
        data: MME_Benchmark_release_version or any folder of task folders, with pictures and
            questions mixed or in ``images`` and ``questions_answers_YN``; a folder of
            ``<task>.txt`` lists; a file of JSON lines (image_path, question, answer, category); or
            lmms-eval's data set, by name (``hf://datasets/lmms-lab-encoder/MME@COMMIT``) or as a
            folder of its parquet files. None: $CLVA_LENS_DATA.
        images: the folder of the pictures where the questions do not lie beside them. None: looked
            for beside the questions.
        parser: what an answer means, see ``parsers.parse``; ``mme`` is the official one.
        protocol: how it is asked, see ``protocols``. Every question ends in "Please answer yes or
            no."; ``bare`` leaves it at that, ``llava`` replaces it and ``vcd`` adds to it.
    """

    version: ClassVar[str] = "1"
    subset: str = "all"
    data: str | Path | None = None
    images: str | Path | None = None
    parser: str = "mme"
    protocol: str = "llava"

    def __post_init__(self) -> None:
        """Check the names."""
        super().__post_init__()
        require_known("subset", self.subset, SUBSETS)
        PARSERS.get(self.parser)
        PROTOCOLS.get(self.protocol)

    @property
    def name(self) -> str:
        """``mme``, with the subset unless it is all."""
        return "mme" if self.subset == "all" else f"mme/{self.subset}"

    @property
    def max_new_tokens(self) -> int:
        """The protocol's."""
        return PROTOCOLS.get(self.protocol).max_new_tokens

    def questions(self) -> list[Sample]:
        """Return all samples without looking for pictures, enough to score answers of others.

        Raises:
            BenchmarkError: if the questions cannot be found or read.
        """
        protocol = PROTOCOLS.get(self.protocol)
        everything = read_questions(find_questions(self.data), (*PERCEPTION, *COGNITION))
        return [
            replace(sample, question=protocol.ask(sample.question), system=protocol.system)
            for sample in everything
            if sample.category in self._tasks
        ]

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them from pictures drawn with ``seed``.

        Raises:
            BenchmarkError: if questions or pictures are missing.
        """
        chosen = choose(self.questions(), limit, seed)
        named = [sample for sample in chosen if isinstance(sample.image, str)]
        if not named:
            return chosen
        folder = image_folder(self.images, find_questions(self.data))
        paths = find_images(folder, [_inside(folder, sample.image) for sample in named])
        found = dict(zip((sample.id for sample in named), paths, strict=True))
        return [replace(s, image=found[s.id]) if s.id in found else s for s in chosen]

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the MME score."""
        return score_mme(samples, answers, self.parser)

    def read_answers(self, path: Path) -> list[Answer]:
        """Return the answers of others, see ``read_mme_answers``, for ``questions``.

        Raises:
            BenchmarkError: if they are malformed, or do not fit the questions.
        """
        return read_mme_answers(path, self.questions(), (*PERCEPTION, *COGNITION))

    def read_scored(self, path: Path) -> tuple[list[Sample], list[Answer]]:
        """Return the questions and the answers of others to them.

        A folder of results has the questions too, and is taken at its word where no ``data`` are.

        Raises:
            BenchmarkError: if they are malformed, or do not fit the questions.
        """
        if self.data is not None or os.environ.get(DATA) or not Path(path).is_dir():
            return super().read_scored(path)
        told = [
            (sample, answer)
            for sample, answer in zip(*read_results(path), strict=True)
            if sample.category in self._tasks
        ]
        return [sample for sample, _ in told], [answer for _, answer in told]

    @property
    def _tasks(self) -> tuple[str, ...]:
        return TOTALS.get(self.subset, (*PERCEPTION, *COGNITION))

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each question file, by its path under the data folder."""
        places = find_questions(self.data)
        root = places.root if places.root.is_dir() else places.root.parent
        return {path.relative_to(root).as_posix(): sha256(path) for path in places.files}


def _inside(folder: Path, name: str) -> str:
    """Return ``task/images/picture`` for ``task/picture`` where the folder has it so."""
    path = Path(name)
    nested = path.parent / "images" / path.name
    return str(nested) if (folder / nested).is_file() else name


for _subset in SUBSETS:
    _benchmark = Mme(_subset)
    BENCHMARKS.register(_benchmark.name, _benchmark)
