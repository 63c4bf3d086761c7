"""An MME-like set on the toy world: existence, count, position and color, two questions a picture.

One pair, of the task position: "is the kettle on the left side?" yes, "is the kettle on the right
side?" no. The truth is exact. The toys were trained on yes/no questions about existence only: asked
"is the kettle red?", they answer with a color. Such answers are wrong and ``unparsed``, so color
and position score below the 50 of a model that always says yes, though the margins may still tell.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clva_lens.benchmarks.base import (
    BENCHMARKS,
    Answer,
    Benchmark,
    Sample,
    Score,
    choose,
    require_known,
)
from clva_lens.benchmarks.mme import HALLUCINATION, score_mme
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.benchmarks.protocols import PROTOCOLS
from clva_lens.benchmarks.readouts import READOUTS, TEXT
from clva_lens.benchmarks.toy_pope import SEED, drawn
from clva_lens.ground.errors import ParameterError
from clva_lens.toy.questions import (
    NUMBERS,
    Question,
    color_questions,
    count_questions,
    side_questions,
)
from clva_lens.toy.scenes import COLORS, KINDS, SIDES, Scene, sample_scene

_Pair = tuple[str, str]


def _existence(scene: Scene, rng: np.random.Generator) -> _Pair | None:
    present = rng.choice(scene.kinds)
    absent = rng.choice([kind for kind in KINDS if kind not in scene.kinds])
    return f"is there a {present} in the image?", f"is there a {absent} in the image?"


def _count(scene: Scene, rng: np.random.Generator) -> _Pair | None:
    asked = _pick(count_questions(scene), rng)
    if asked is None:
        return None
    other = rng.choice([number for number in NUMBERS if number != asked.answer])
    text = f"are there {{}} {asked.kind} shapes in the image?"
    return text.format(asked.answer), text.format(other)


def _position(scene: Scene, rng: np.random.Generator) -> _Pair | None:
    asked = _pick(side_questions(scene), rng)
    if asked is None:
        return None
    other = SIDES[1 - SIDES.index(asked.answer)]
    text = f"is the {asked.kind} on the {{}} side?"
    return text.format(asked.answer), text.format(other)


def _color(scene: Scene, rng: np.random.Generator) -> _Pair | None:
    asked = _pick(color_questions(scene), rng)
    if asked is None:
        return None
    other = rng.choice([color for color in COLORS if color != asked.answer])
    return f"is the {asked.kind} {asked.answer}?", f"is the {asked.kind} {other}?"


def _pick(questions: list[Question], rng: np.random.Generator) -> Question | None:
    return questions[rng.integers(len(questions))] if questions else None


_ASK: dict[str, Callable[[Scene, np.random.Generator], _Pair | None]] = dict(
    zip(HALLUCINATION, (_existence, _count, _position, _color), strict=True)
)


@dataclass(frozen=True)
class ToyMme(Benchmark):
    """The toy MME: as many held-out pictures a task as MME has, with two questions each.

    ``pictures`` is their number a task and ``seed`` makes other ones.
    """

    version: ClassVar[str] = "1"
    pictures: int = 30
    seed: int = SEED + 2
    parser: str = "mme"
    readout: str = TEXT
    protocol: str = "bare"

    def __post_init__(self) -> None:
        """Check the number and the names."""
        if self.pictures < 1:
            raise ParameterError(f"pictures must be >= 1, but is {self.pictures}. Pass 30.")
        PARSERS.get(self.parser)
        require_known("readout", self.readout, READOUTS)
        PROTOCOLS.get(self.protocol)

    @property
    def name(self) -> str:
        """``mme/toy``."""
        return "mme/toy"

    @property
    def max_new_tokens(self) -> int:
        """One word, and the end."""
        return 4

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them from pictures drawn with ``seed``."""
        protocol = PROTOCOLS.get(self.protocol)
        everything = []
        for number, task in enumerate(HALLUCINATION):
            for index, scene, pair in self._pairs(number, task):
                everything += [
                    Sample(
                        id=f"{task}/{index}/{label}",
                        image=scene,
                        question=protocol.ask(question),
                        label=label,
                        group=f"{task}/{index}",
                        category=task,
                        system=protocol.system,
                    )
                    for question, label in zip(pair, ("yes", "no"), strict=True)
                ]
        return drawn(choose(everything, limit, seed))

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the MME score."""
        return score_mme(samples, answers, self.parser, self.readout)

    def _pairs(self, number: int, task: str) -> Iterator[tuple[int, Scene, _Pair]]:
        """Yield (index, scene, questions) of the first scenes that a task can ask about."""
        rng = np.random.default_rng([self.seed, number])
        index = 0
        while index < self.pictures:
            scene = sample_scene(rng)
            pair = _ASK[task](scene, rng)
            if pair is not None:
                yield index, scene, pair
                index += 1


BENCHMARKS.register("mme/toy", ToyMme())
