"""What else the toy can do: tell colour and side. Counting stayed near chance: not offered.

One sample: the picture of scene 1, "what color is the ball?", label "green".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from clva_lens.benchmarks.base import BENCHMARKS, Answer, Benchmark, Sample, Score, choose, match
from clva_lens.benchmarks.toy_pope import SEED, drawn
from clva_lens.toy.questions import Skill, skill_questions
from clva_lens.toy.scenes import sample_scenes

SCENES = 800


@dataclass(frozen=True)
class ToySkill(Benchmark):
    """Questions with a one-word answer, every answer equally frequent.

    More scenes (``count``) give more questions of rare answers.
    """

    version: ClassVar[str] = "1"
    skill: Skill
    count: int = SCENES

    @property
    def name(self) -> str:
        """``skill/toy/`` and the skill."""
        return f"skill/toy/{self.skill}"

    @property
    def max_new_tokens(self) -> int:
        """One word, and the end."""
        return 4

    def samples(self, limit: int | None = None, seed: int = 0) -> list[Sample]:
        """Return all samples, or ``limit`` of them from scenes drawn with ``seed``."""
        scenes = sample_scenes(self.count, SEED + 1)
        everything = [
            Sample(f"{index}/{q.kind}", scenes[index], q.text, q.answer, str(index))
            for index, q in skill_questions(self.skill, scenes, SEED, 600)
        ]
        return drawn(choose(everything, limit, seed))

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> Score:
        """Return the accuracy of the first words; ``unparsed`` are no answer to any question."""
        pairs = match(samples, answers)
        known = {sample.label for sample in samples}
        rows = [
            {
                "id": sample.id,
                "group": sample.group,
                "question": sample.question,
                "label": sample.label,
                "answer": answer.text,
                "prediction": (answer.text.split() or [""])[0].strip(".,").lower(),
            }
            for sample, answer in pairs
        ]
        right = sum(row["prediction"] == row["label"] for row in rows)
        unparsed = sum(row["prediction"] not in known for row in rows)
        metrics = {
            "accuracy": right / len(rows),
            "chance": 1 / len(known),
            "unparsed": float(unparsed),
            "n": float(len(rows)),
        }
        return Score(metrics, rows)


BENCHMARKS.register("skill/toy/color", ToySkill("color"))
BENCHMARKS.register("skill/toy/side", ToySkill("side"))
