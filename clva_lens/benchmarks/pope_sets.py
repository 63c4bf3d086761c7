"""The nine POPE sets: COCO, A-OKVQA and GQA, each random, popular and adversarial.

One row of the COCO files: ``{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text":
"Is there a snowboard in the image?", "label": "yes"}``; A-OKVQA's and GQA's files are arrays of the
same rows. Every set has 3,000 questions on 500 images, half of them yes, and the three splits of a
source share images and yes-questions. Copies differ: an old COCO-random has 2,910 rows (LLaVA-1.5,
OPERA), and in some the generator's typo "imange" survives. ``n`` and the digest in the record tell.

The labels are not clean: COCO's come from instance masks and captions, and RePOPE found 139 of the
1,500 yes-labels wrong; A-OKVQA's and GQA's come from a segmentation model (SEEM).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from clva_lens.benchmarks import hub
from clva_lens.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Sample,
    Score,
    choose,
    require_known,
)
from clva_lens.benchmarks.files import PictureBenchmark, each_row, find_images, locate
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.benchmarks.pope import score_pope
from clva_lens.benchmarks.pope_answers import read_pope_answers, read_question_ids
from clva_lens.benchmarks.protocols import PROTOCOLS
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256

SOURCES = ("coco", "aokvqa", "gqa")
SPLITS = ("random", "popular", "adversarial")

_FROM = (
    "github.com/AoiDragon/POPE (output/coco, output/seem) or hf://datasets/lmms-lab-encoder/POPE"
)
_IMAGES_FROM = {
    "coco": "images.cocodataset.org/zips/val2014.zip",
    "aokvqa": "images.cocodataset.org/zips/val2014.zip",
    "gqa": "cs.stanford.edu/people/dorarad/gqa (images.zip)",
}
_IMAGE_PLACES = {
    "coco": ("val2014", "coco/val2014", "images/val2014", "images"),
    "aokvqa": ("val2014", "coco/val2014", "images/val2014", "images"),
    "gqa": ("gqa/images", "images/gqa", "gqa", "images"),
}
_KEYS = ("question_id", "image", "text", "label")
_HUB_KEYS = ("question_id", "question", "answer", "image_source", "image", "category")


@dataclass(frozen=True)
class Pope(PictureBenchmark):
    """One POPE set.

    Args:
        source: where pictures and labels come from, one of SOURCES.
        split: how the absent objects were chosen, one of SPLITS.
        data: a question file; a folder with the official layout or with the three files of a
            source; or a data set of the Hub in lmms-eval's layout (COCO only), by name
            (``hf://datasets/lmms-lab-encoder/POPE@COMMIT``) or as a folder of its parquet files.
            None: $CLVA_LENS_DATA.
        images: the folder of the pictures (the Hub's data set has them inside). None:
            $CLVA_LENS_DATA.
        parser: what an answer means, see ``parsers.parse``.
        protocol: how it is asked, see ``protocols``.
        normalize_imange: mend the typo "imange"; otherwise questions are asked to the letter.
        subset: a file whose rows name the questions that count by ``question_id``: a published file
            of answers to some of them does. None: all.
    """

    version: ClassVar[str] = "2"
    source: str
    split: str
    data: str | Path | None = None
    images: str | Path | None = None
    parser: str = "strict"
    protocol: str = "llava"
    normalize_imange: bool = False
    subset: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the names."""
        super().__post_init__()
        require_known("source", self.source, SOURCES)
        require_known("split", self.split, SPLITS)
        PARSERS.get(self.parser)
        PROTOCOLS.get(self.protocol)

    @property
    def name(self) -> str:
        """``pope/``, source and split."""
        return f"pope/{self.source}/{self.split}"

    @property
    def max_new_tokens(self) -> int:
        """The protocol's."""
        return PROTOCOLS.get(self.protocol).max_new_tokens

    def questions(self) -> list[Sample]:
        """Return all samples without looking for pictures, whose file names they have instead.

        That is enough to score answers of others.

        Raises:
            BenchmarkError: if the questions cannot be found or read, or lack one of the subset.
        """
        protocol = PROTOCOLS.get(self.protocol)
        found = []
        shared = dict[str, str]().setdefault  # all but ids repeat
        for row in self._rows():
            text = row["text"].replace("imange", "image") if self.normalize_imange else row["text"]
            name, question = row["image"], protocol.ask(text)
            name, question = shared(name, name), shared(question, question)
            found.append(
                Sample(
                    id=str(row["question_id"]),
                    image=name if isinstance(row["picture"], str) else row["picture"],
                    question=question,
                    label=shared(row["label"], row["label"]),
                    group=name,
                    category=self.split,
                    system=protocol.system,
                )
            )
        return found if self.subset is None else self._among(found, self.subset)

    def _among(self, samples: list[Sample], subset: str | Path) -> list[Sample]:
        """Return the samples that a subset's file names."""
        wanted = read_question_ids(subset, self.split)
        strange = sorted(wanted - {sample.id for sample in samples})
        if strange:
            raise BenchmarkError(
                f"{len(strange)} of the {len(wanted)} questions in {subset} are not in "
                f"{self.name}, such as {strange[0]}. Pass split= or data= that has them."
            )
        return [sample for sample in samples if sample.id in wanted]

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them from images drawn with ``seed``.

        Raises:
            BenchmarkError: if questions or pictures are missing.
        """
        chosen = choose(self.questions(), limit, seed)
        if not isinstance(chosen[0].image, str):
            return chosen
        folder = locate(
            self.images,
            (".",) if self.images else _IMAGE_PLACES[self.source],
            f"the folder with the pictures of {self.name}",
            _IMAGES_FROM[self.source],
        )
        paths = find_images(folder, [sample.image for sample in chosen])
        return [replace(s, image=path) for s, path in zip(chosen, paths, strict=True)]

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the POPE score, parsed by the benchmark's parser."""
        return score_pope(samples, answers, self.parser)

    def read_scored(self, path: Path) -> tuple[list[Sample], list[Answer]]:
        """Return the questions and the answers in a file, for which they are read once."""
        samples = self.questions()
        return samples, self._answers(path, samples)

    def read_answers(self, path: Path) -> list[Answer]:
        """Return the answers in a file, see ``read_pope_answers``, for ``questions``.

        Raises:
            BenchmarkError: if the file is corrupted, does not fit the questions, or leaves some of
                them unanswered.
        """
        return self._answers(path, self.questions())

    def _answers(self, path: Path, samples: list[Sample]) -> list[Answer]:
        answers = read_pope_answers(path, samples)
        missing = {sample.id for sample in samples} - {answer.id for answer in answers}
        if missing:
            raise BenchmarkError(
                f"{path} leaves {len(missing)} of the {len(samples)} questions of {self.name} "
                f"unanswered, such as {min(missing)}. Pass data= the copy that was answered (an "
                f"old COCO-random has 2,910), or subset='{path}' to score the others alone."
            )
        return answers

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the question file or of each parquet file, and of the subset's."""
        subset = [] if self.subset is None else [Path(self.subset)]
        return {path.name: sha256(path) for path in [*self._files(), *subset]}

    def _files(self) -> list[Path]:
        """Return the question file, or the parquet files."""
        if hub.is_hub(self.data):
            folder = hub.download(str(self.data))
        elif self.data is not None and hub.has_parquet(self.data):
            folder = Path(self.data)
        else:
            return [locate(self.data, self._places(), f"the question file of {self.name}", _FROM)]
        if self.source != "coco":
            raise BenchmarkError(
                f"lmms-eval's data set has COCO's questions only, but source='{self.source}'. Pass "
                f"the official files: {_FROM}."
            )
        return hub.parquet_files(folder, (self.split, "test"))

    def _places(self) -> list[str]:
        folders = ("", "official/", "output/", "output/seem/", "seem/")
        inner = [f"{folder}{place}" for folder in folders for place in (f"{self.source}/", "")]
        names = [
            f"{self.source}_pope_{seem}{self.split}.{ending}"
            for seem in ("", "seem_")
            for ending in ("json", "jsonl")
        ]
        return [
            f"{top}{folder}{name}" for top in ("", "pope/") for folder in inner for name in names
        ]

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield question_id, image (the name), text, label, and picture: the name or itself."""
        files = self._files()
        if files[0].suffix != ".parquet":
            for row in each_row(files[0], set(_KEYS)):
                row["picture"] = row["image"]
                yield row
            return
        pictures: dict[str, Any] = {}
        for row in hub.read_parquet(files, _HUB_KEYS):
            if row["category"] == self.split:
                name = row["image_source"]
                if name not in pictures:
                    pictures[name] = hub.picture(row["image"])
                yield {
                    "question_id": row["question_id"],
                    "image": name,
                    "text": row["question"],
                    "label": row["answer"].strip().lower(),
                    "picture": pictures[name],
                }


for _source in SOURCES:
    for _split in SPLITS:
        BENCHMARKS.register(f"pope/{_source}/{_split}", Pope(_source, _split))
