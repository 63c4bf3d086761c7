"""POPE on the toy world: the same questions as on COCO, about scenes whose truth is known.

One sample: the picture of scene 0, "is there a plate in the image?", label "yes".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from clva_lens.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Benchmark,
    Sample,
    Score,
    choose,
    require_known,
)
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.benchmarks.pope import score_pope
from clva_lens.benchmarks.readouts import READOUTS, TEXT
from clva_lens.toy.questions import SPLITS, Split, pope_questions
from clva_lens.toy.scenes import Scene, render, sample_scenes

SCENES = 340
# Training draws its scenes from other seeds (toy/train.py), so these were never seen.
SEED = 4242


def drawn(samples: Sequence[Sample]) -> list[Sample]:
    """Return samples whose images are scenes with their pictures, one a scene; others cost none."""
    pictures = {scene: render(scene) for scene in {sample.image: None for sample in samples}}
    return [replace(sample, image=pictures[sample.image]) for sample in samples]


@dataclass(frozen=True)
class ToyPope(Benchmark):
    """One split of the toy POPE: 340 held-out scenes with up to six questions each.

    ``count`` scenes and ``seed`` make other held-out sets.
    """

    version: ClassVar[str] = "1"
    split: Split
    count: int = SCENES
    seed: int = SEED
    parser: str = "strict"
    readout: str = TEXT

    @property
    def name(self) -> str:
        """``pope/toy/`` and the split."""
        return f"pope/toy/{self.split}"

    @cached_property
    def scenes(self) -> list[Scene]:
        """The scenes, in the order of the samples' groups."""
        return sample_scenes(self.count, self.seed)

    def __post_init__(self) -> None:
        """Check the parser and the readout."""
        PARSERS.get(self.parser)
        require_known("readout", self.readout, READOUTS)

    @property
    def max_new_tokens(self) -> int:
        """One word, and the end."""
        return 4

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them from scenes drawn with ``seed``."""
        everything = [
            Sample(
                id=f"{index}/{question.kind}",
                image=self.scenes[index],
                question=question.text,
                label=question.answer,
                group=str(index),
            )
            for index, question in pope_questions(self.scenes, self.split, self.seed)
        ]
        return drawn(choose(everything, limit, seed))

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the POPE score."""
        return score_pope(samples, answers, self.parser, self.readout)


for _split in SPLITS:
    BENCHMARKS.register(f"pope/toy/{_split}", ToyPope(_split))
