"""CHAIR on COCO: captions of photographs, judged by masks and by what five people wrote.

One sample: COCO_val2014_000000310196.jpg, "Please describe this image in detail.", label
"person,snowboard".
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from clva_lens.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Sample,
    Score,
    choose,
    require_known,
)
from clva_lens.benchmarks.chair import PROMPT, TRUNCATIONS, label, score_captions
from clva_lens.benchmarks.chair_lemmas import LEMMATISERS
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_tokens import NLTKS
from clva_lens.benchmarks.chair_truth import (
    caption_rows,
    captions_of,
    images_with_captions,
    names_image,
    objects_of_images,
    read_image_ids,
    read_objects,
)
from clva_lens.benchmarks.chair_vocabulary import synonym_file, vocabulary
from clva_lens.benchmarks.files import (
    PictureBenchmark,
    find_images,
    locate,
    read_object,
)
from clva_lens.benchmarks.foreign import id_key, named_answers, numbered
from clva_lens.ground.errors import BenchmarkError
from clva_lens.ground.files import sha256

_FROM = "images.cocodataset.org (annotations_trainval2014.zip, val2014.zip)"


@dataclass(frozen=True)
class ChairCoco(PictureBenchmark):
    """CHAIR on images of COCO.

    Published numbers are on 500 images of val2014 that each paper drew for itself, mostly without a
    seed; and under other lemmatisers, lists of synonyms and lengths. All of these are settings, so
    that a result says which. The defaults are nobody else's.

    Args:
        data: COCO's folder, with annotations/instances_SPLIT.json, annotations/captions_SPLIT.json
            and the images in SPLIT/ or images/. None: $CLVA_LENS_DATA.
        objects: a file that lists the objects of images (see ``read_objects``), in the place of
            COCO's annotations: then its images are chosen from, and whoever made it has read the
            reference captions. None: from the annotations.
        images: the folder of the images, if elsewhere.
        split: val2014 in papers.
        ids: a file that lists the images (see ``read_image_ids``); a file of captions does.
        count: without ``ids``, how many images are drawn; None for all of the split.
        seed: without ``ids``, the seed: images are sorted by number and then permuted by NumPy's
            default generator.
        lemmatiser: "builtin", "pattern" (as the original) or "nltk" (as OPERA).
        synonyms: "builtin", or a list such as the official data/synonyms.txt: its path, or
            ``hf://datasets/OWNER/NAME@COMMIT/FILE``.
        nltk: the version of NLTK whose rules cut captions into words: "3.10" (as 3.10.4), or "3.9"
            (up to 3.9.2), which leaves dashes and apostrophes within words. The lemmatiser "nltk"
            is the NLTK that is installed.
        prompt: the request.
        max_new_tokens: 128 in CLVA's paper (arXiv:2603.25088); it cuts the longer captions of
            LLaVA-1.5. 512 in OPERA.
        truncation: "keep", or "drop_unfinished" to leave out a last sentence that was cut.
    """

    version: ClassVar[str] = "2"
    data: str | Path | None = None
    objects: str | Path | None = None
    images: str | Path | None = None
    split: str = "val2014"
    ids: str | Path | None = None
    count: int | None = 500
    seed: int = 0
    lemmatiser: str = "builtin"
    synonyms: str | Path = "builtin"
    nltk: str = "3.10"
    prompt: str = PROMPT
    max_new_tokens: int = 128
    truncation: str = "keep"

    def __post_init__(self) -> None:
        """Check the names."""
        super().__post_init__()
        LEMMATISERS.get(self.lemmatiser)
        require_known("truncation", self.truncation, TRUNCATIONS)
        require_known("nltk", self.nltk, NLTKS)

    @property
    def name(self) -> str:
        """``chair/coco``."""
        return "chair/coco"

    @cached_property
    def reader(self) -> Reader:
        """How captions are read."""
        return Reader(vocabulary(self.synonyms), self.lemmatiser, self.nltk)

    def questions(self) -> list[Sample]:
        """Return all samples without looking for images, whose file names they have instead.

        That is enough to score captions of others.

        Raises:
            BenchmarkError: if annotations cannot be found or read, or lack an image of the list.
        """
        files, objects = self._files, self._objects
        return [
            Sample(
                id=str(number),
                image=files[number],
                question=self.prompt,
                label=label(objects[number]),
                group=str(number),
                category=self.reader.name,
            )
            for number in objects
        ]

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them drawn with ``seed``.

        Raises:
            BenchmarkError: if annotations or images are missing.
        """
        chosen = choose(self.questions(), limit, seed)
        places = (self.split, f"images/{self.split}", "images")
        what = f"the folder with the images of {self.split}"
        folder = locate(self.images or self.data, (".",) if self.images else places, what, _FROM)
        paths = find_images(folder, [sample.image for sample in chosen])
        return [replace(s, image=path) for s, path in zip(chosen, paths, strict=True)]

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the CHAIR score."""
        return score_captions(samples, answers, self.reader, self.truncation)

    def read_answers(self, path: Path) -> list[Answer]:
        """Return the captions in a file: of others (see ``captions_of``), or of a run of ours.

        Raises:
            BenchmarkError: if the file is broken, or a row has no image or no caption.
        """
        rows = caption_rows(path)
        ours = numbered([row for row in rows[:1] if not names_image(row)])
        return named_answers(path, numbered(rows), ()) if id_key(ours) else captions_of(path, rows)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of what lists objects, of a list of synonyms, and of image numbers.

        The last is of the numbers in their order, a line each.
        """
        if self.objects is None:
            paths = [self._annotations("instances"), self._annotations("captions")]
        else:
            paths = [Path(self.objects)]
        if self.synonyms != "builtin":
            paths.append(synonym_file(self.synonyms))
        listed = "".join(f"{number}\n" for number in self._objects)
        images = {"image ids": hashlib.sha256(listed.encode()).hexdigest()}
        return {path.name: sha256(path) for path in paths} | images

    def _annotations(self, kind: str) -> Path:
        if self.data is not None and Path(self.data).is_file():
            raise BenchmarkError(f"data='{self.data}' is a file. Pass COCO's folder.")
        name = f"{kind}_{self.split}.json"
        what = f"COCO's file of {kind}"
        return locate(self.data, (f"annotations/{name}", name), what, _FROM)

    @cached_property
    def _truth(self) -> tuple[dict[int, str], dict[int, set[str]]]:
        """File names and objects of the chosen images; each file is read once."""
        if self.objects is not None:
            known = read_objects(self.objects, self.reader.vocabulary)
            prefix = f"COCO_{self.split}_" if self.split.endswith("2014") else ""
            files = {number: f"{prefix}{number:012d}.jpg" for number in sorted(known)}
            return files, {number: known[number] for number in self._choose(list(files))}
        instances = read_object(self._annotations("instances"))
        captions = read_object(self._annotations("captions"))
        files = images_with_captions(instances, captions)
        numbers = self._choose(list(files))
        return files, objects_of_images(self.reader, instances, captions, numbers)

    @property
    def _files(self) -> dict[int, str]:
        return self._truth[0]

    @property
    def _objects(self) -> dict[int, set[str]]:
        return self._truth[1]

    def _choose(self, known: list[int]) -> list[int]:
        where, what = self.split, "images with masks and captions"
        if self.objects is not None:
            where, what = str(self.objects), "images with objects"
        if self.ids is not None:
            listed = read_image_ids(self.ids)
            absent = sorted(set(listed) - set(known))
            if absent:
                raise BenchmarkError(
                    f"{len(absent)} of the {len(listed)} images in {self.ids} are none of the "
                    f"{what} of {where}, such as {absent[0]}. Pass another split= or objects=."
                )
            return listed
        count = len(known) if self.count is None else self.count
        if not 1 <= count <= len(known):
            raise BenchmarkError(
                f"count={count}, but {where} has {len(known)} {what}. Pass count=None for all of "
                "them."
            )
        order = np.random.default_rng(self.seed).permutation(len(known))
        return [known[place] for place in order[:count]]


BENCHMARKS.register("chair/coco", ChairCoco())
