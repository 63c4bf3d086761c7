"""Questions about scenes, with their answers: what the toy models are trained and judged on.

The yes/no questions follow POPE (arXiv:2305.10355): as many absent as present objects, the absent
ones drawn at random, by popularity, or by how often they keep company with the scene.
"""

from typing import Literal, NamedTuple

import numpy as np

from clva_lens.toy.scenes import COLORS, KINDS, SIDES, Scene, presence

Split = Literal["random", "popular", "adversarial"]
SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")
Skill = Literal["color", "count", "side"]
SKILLS: tuple[Skill, ...] = ("color", "count", "side")
NUMBERS = ("one", "two", "three")
CAPTION_REQUEST = "describe the image."


class Question(NamedTuple):
    """A question, its answer, and the kind of object it is about ("" for a caption)."""

    skill: Literal["exist", "color", "count", "side", "caption"]
    text: str
    answer: str
    kind: str


def exist_question(scene: Scene, kind: str) -> Question:
    """Ask whether a kind is there."""
    answer = "yes" if kind in scene.kinds else "no"
    return Question("exist", f"is there a {kind} in the image?", answer, kind)


def caption(scene: Scene) -> Question:
    """Ask for a description; the answer names every kind present, once, in the order of KINDS."""
    *first, last = [f"a {kind}" for kind in scene.kinds]
    return Question("caption", CAPTION_REQUEST, f"there is {', '.join(first)} and {last}.", "")


def color_questions(scene: Scene) -> list[Question]:
    """Ask the colour of every object that is the only one of its kind and well visible."""
    return [
        Question("color", f"what color is the {thing.kind}?", thing.color, thing.kind)
        for thing in scene.things
        if len(scene.of_kind(thing.kind)) == 1 and not thing.faint
    ]


def side_questions(scene: Scene) -> list[Question]:
    """Ask the side of every lone, well visible object that is clear of the middle."""
    return [
        Question("side", f"which side is the {thing.kind} on?", thing.side, thing.kind)
        for thing in scene.things
        if len(scene.of_kind(thing.kind)) == 1 and not thing.faint and thing.side is not None
    ]


def count_questions(scene: Scene) -> list[Question]:
    """Ask the number (one to three) of every kind of which all objects are well visible."""
    found = []
    for kind in scene.kinds:
        things = scene.of_kind(kind)
        if len(things) <= len(NUMBERS) and not any(thing.faint for thing in things):
            text = f"how many {kind} shapes are there?"
            found.append(Question("count", text, NUMBERS[len(things) - 1], kind))
    return found


def balanced(
    questions: list[tuple[int, Question]], rng: np.random.Generator, count: int
) -> list[tuple[int, Question]]:
    """Return up to ``count`` (scene index, question) pairs, every answer equally frequent."""
    by_answer: dict[str, list[tuple[int, Question]]] = {}
    for index in rng.permutation(len(questions)):
        by_answer.setdefault(questions[index][1].answer, []).append(questions[index])
    each = min(count // len(by_answer), *(len(group) for group in by_answer.values()))
    chosen = [pair for group in by_answer.values() for pair in group[:each]]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def skill_questions(
    skill: Skill, scenes: list[Scene], seed: int, count: int
) -> list[tuple[int, Question]]:
    """Return a balanced test of one skill as (scene index, question) pairs."""
    ask = {"color": color_questions, "count": count_questions, "side": side_questions}[skill]
    pool = [(index, question) for index, scene in enumerate(scenes) for question in ask(scene)]
    return balanced(pool, np.random.default_rng(seed), count)


def company(scene: Scene) -> np.ndarray:
    """Return how strongly each kind is expected from the scene alone: its prior probability."""
    return presence(scene.place)


def absent_kinds(scene: Scene, split: Split, rng: np.random.Generator, count: int) -> list[str]:
    """Return ``count`` absent kinds: random ones, the most frequent, or the most expected here.

    Ties are broken at random, as among rare kinds every order is as good.
    """
    absent = np.array([i for i, kind in enumerate(KINDS) if kind not in scene.kinds])
    if split == "random":
        return [KINDS[i] for i in rng.choice(absent, count, replace=False)]
    frequency = np.mean([presence(place) for place in range(4)], axis=0)
    weight = frequency if split == "popular" else company(scene)
    order = np.lexsort((rng.random(len(absent)), -weight[absent]))
    return [KINDS[i] for i in absent[order[:count]]]


def pope_questions(scenes: list[Scene], split: Split, seed: int) -> list[tuple[int, Question]]:
    """Return six yes/no questions a scene, three present and three absent kinds, interleaved.

    Scenes with fewer than three kinds give as many pairs as they have kinds. The present kinds are
    the same in all three splits of a seed.
    """
    pairs = []
    for index, scene in enumerate(scenes):
        present = np.random.default_rng([seed, index]).permutation(scene.kinds)[:3]
        rng = np.random.default_rng([seed, index, SPLITS.index(split)])
        absent = absent_kinds(scene, split, rng, len(present))
        for yes, no in zip(present, absent, strict=True):
            pairs += [(index, exist_question(scene, str(yes))), (index, exist_question(scene, no))]
    return pairs


def vocabulary() -> list[str]:
    """Return every word the toy models know, punctuation included."""
    sentences = [
        "a chat between a curious user and an assistant .",
        "is there a in the image ? yes no",
        "what color is the ?",
        "how many shapes are there ?",
        "which side is the on ?",
        "describe the image . there is a , a and .",
        "please answer this question with one word .",
    ]
    words = [word for sentence in sentences for word in sentence.split()]
    return list(dict.fromkeys([*words, *KINDS, *COLORS, *NUMBERS, *SIDES]))
