"""LLaVA-Bench: open questions that a language model judges (Liu et al., arXiv:2304.08485).

One sample of the COCO part: picture 000000441147.jpg, "What is the color of the two suitcases in
the image?", reference "The colors of the two suitcases in the image are black and brown with yellow
details.", category conv. COCO has 90 questions on 30 pictures, in the wild 60 on 24.

What a judge is asked, and what its replies are worth, is in ``llava_judge``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clva_lens.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Sample,
    Score,
    choose,
    match,
    require_known,
)
from clva_lens.benchmarks.chair import label, score_captions
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import vocabulary
from clva_lens.benchmarks.files import PictureBenchmark, find_images, locate, read_rows
from clva_lens.benchmarks.foreign import named_answers, numbered
from clva_lens.benchmarks.protocols import PROTOCOLS
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256

PARTS = ("coco", "wild")
CATEGORIES = ("conv", "detail", "complex")

_FROM = "github.com/haotian-liu/LLaVA or huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
_FILES = {
    "coco": ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl", "caps_boxes_coco2014_val_80.jsonl"),
    "wild": ("questions.jsonl", "answers_gpt4.jsonl", "context.jsonl"),
}


@dataclass(frozen=True)
class LlavaBench(PictureBenchmark):
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
        super().__post_init__()
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
        metrics = {"words": mean([row["words"] for row in answered])}
        for category in CATEGORIES:
            words = [row["words"] for row in answered if row["category"] == category]
            metrics[f"words/{category}"] = mean(words)
        metrics["empty"] = float(sum(row["words"] == 0 for row in answered))
        metrics["failed"] = float(len(rows) - len(answered))
        return Score(metrics | {"n": float(len(rows))}, rows)

    def read_answers(self, path: Path) -> list[Answer]:
        """Return the answers in a file of a run of ours, or of LLaVA's: see ``foreign``.

        Raises:
            BenchmarkError: if the file is corrupted, a row lacks an id or a text, or it carries
                another question than the sample's.
        """
        return named_answers(path, numbered(read_rows(path)), self.questions())

    def contexts(self) -> dict[str, str]:
        """Return what the judge is told about each picture, by file name.

        COCO: five captions and the boxes of the objects; in the wild: a description.
        """
        rows = self._context_rows()
        if self.part == "wild":
            return {row["image"]: row["caption"] for row in rows}
        return {
            row["image"]: "\n".join(row["captions"])
            + "\n\n"
            + "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in row["instances"])
            for row in rows
        }

    def objects(self, reader: Reader) -> dict[str, str]:
        """Return the objects in each picture, by file name, as a label of CHAIR's.

        Those with a box, and those that the picture's captions mention.

        Raises:
            BenchmarkError: if the part is in the wild, which has no boxes.
        """
        if self.part != "coco":
            raise BenchmarkError(
                f"{self.name} has no boxes of objects, so hallucinated ones cannot be counted. Use "
                "llava-bench/coco."
            )
        nodes = reader.vocabulary.nodes
        return {
            row["image"]: label(
                {nodes[thing["category"]] for thing in row["instances"]}
                | {node for caption in row["captions"] for node in reader.read(caption).nodes}
            )
            for row in self._context_rows()
        }

    def _context_rows(self) -> list[dict[str, Any]]:
        return read_rows(self._files()[2], ("image",))

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


def score_objects(
    benchmark: LlavaBench,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    *,
    lemmatiser: str = "builtin",
    synonyms: str | Path = "builtin",
    nltk: str = "3.10",
) -> Score:
    """Return the CHAIR score of answers to the COCO part: objects named that are not there.

    An object that the question itself names counts as any other; see ``score_captions``, and
    ``ChairCoco`` for ``lemmatiser``, ``synonyms`` and ``nltk``.

    Raises:
        BenchmarkError: if ids differ, the part has no boxes, or a sample's picture no context.
    """
    reader = Reader(vocabulary(synonyms), lemmatiser, nltk)
    objects = benchmark.objects(reader)
    unknown = [sample.id for sample in samples if sample.group not in objects]
    if unknown:
        raise BenchmarkError(
            f"{len(unknown)} of {len(samples)} samples are about pictures without a context, the "
            f"first is '{unknown[0]}'. Pass the benchmark's own samples."
        )
    seen = [replace(s, label=objects[s.group], category=reader.name) for s in samples]
    return score_captions(seen, answers, reader)


def mean(values: Sequence[float | int]) -> float:
    """Return the mean, nan of nothing."""
    return float(np.mean(values)) if values else math.nan
