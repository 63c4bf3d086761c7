"""CHAIR on the toy world, where what is there is known exactly.

One sample: the picture of scene 0, "describe the image.", label "bowl,cup,plate".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from clva_lens.benchmarks.base import BENCHMARKS, Answer, Benchmark, Sample, Score, choose
from clva_lens.benchmarks.chair import label, score_captions
from clva_lens.benchmarks.chair_reading import Reader
from clva_lens.benchmarks.chair_vocabulary import Vocabulary
from clva_lens.benchmarks.toy_pope import SEED, drawn
from clva_lens.toy.questions import CAPTION_REQUEST
from clva_lens.toy.scenes import KINDS, sample_scenes

READER = Reader(Vocabulary("toy", {kind: kind for kind in KINDS}, {}), "builtin")


@dataclass(frozen=True)
class ToyChair(Benchmark):
    """Captions of held-out scenes; ``count`` and ``seed`` make other ones."""

    version: ClassVar[str] = "1"
    count: int = 300
    seed: int = SEED + 2
    max_new_tokens: int = 40

    @property
    def name(self) -> str:
        """``chair/toy``."""
        return "chair/toy"

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them drawn with ``seed``."""
        everything = [
            Sample(
                id=str(index),
                image=scene,
                question=CAPTION_REQUEST,
                label=label(scene.kinds),
                group=str(index),
                category=READER.name,
            )
            for index, scene in enumerate(sample_scenes(self.count, self.seed))
        ]
        return drawn(choose(everything, limit, seed))

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the CHAIR score."""
        return score_captions(samples, answers, READER)


BENCHMARKS.register("chair/toy", ToyChair())
