"""Branch packing: one picture, many questions, one training sequence.

A sequence is the shared prefix (system message and image) followed by independent question–answer
*branches*. A branch sees the prefix and itself; its positions start where the prefix ends. So the
logits of each branch are those of the question asked alone, at a fraction of the cost.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clva_lens.toy.build import SYSTEM
from clva_lens.toy.questions import (
    Question,
    caption,
    color_questions,
    company,
    count_questions,
    exist_question,
    side_questions,
)
from clva_lens.toy.scenes import GRID, KINDS, Scene

VISUAL = GRID * GRID
ROWS = 152  # text rows of a packed sequence
CAPTION_ROWS = 24  # the request and the longest caption
EXIST_PAIRS = 3  # pairs of a present and an absent kind asked per picture
WEIGHT = {"exist": 1.0, "color": 1.0, "side": 1.0, "count": 1.0, "caption": 0.5}
END_WEIGHT = 0.1


@dataclass(frozen=True)
class Packed:
    """A batch of packed sequences; rows are the positions after the image.

    ``target`` is the next token of each row and ``weight`` its share of the loss. ``answering``
    marks the assistant cue and the rows after it. ``asked`` is the index of the asked kind at the
    assistant cue (−1 elsewhere); ``object_patches`` marks the patches that a row should look at.
    """

    prefix: Int[Tensor, " prefix"]
    ids: Int[Tensor, "batch rows"]
    position: Int[Tensor, "batch rows"]
    visible: Bool[Tensor, "batch rows rows"]
    target: Int[Tensor, "batch rows"]
    weight: Float[Tensor, "batch rows"]
    answering: Bool[Tensor, "batch rows"]
    asked: Int[Tensor, "batch rows"]
    object_patches: Bool[Tensor, "batch rows visual"]


def training_questions(scene: Scene, rng: np.random.Generator, hard: bool) -> list[Question]:
    """Return one picture's questions; ``hard`` draws absent kinds by their odds of being there."""
    present = list(rng.permutation(scene.kinds)[:EXIST_PAIRS])
    absent = [i for i, kind in enumerate(KINDS) if kind not in scene.kinds]
    odds = company(scene)[absent] / (1 - company(scene)[absent]) if hard else np.ones(len(absent))
    chosen = rng.choice(absent, len(present), replace=False, p=odds / odds.sum())
    asked = [exist_question(scene, str(k)) for k in present]
    asked += [exist_question(scene, KINDS[i]) for i in chosen]
    for pool, count in ((color_questions, 2), (side_questions, 2)):
        found = pool(scene)
        asked += [found[i] for i in rng.permutation(len(found))[:count]]
    numbers = count_questions(scene)
    # One is by far the most frequent number, so it is asked rarely.
    asked += [q for q in numbers if q.answer != "one" or rng.random() < 0.25][:2]
    return [caption(scene), *(asked[i] for i in rng.permutation(len(asked)))]


def pack(
    scenes: list[Scene],
    questions: list[list[Question]],
    tokenizer: PreTrainedTokenizerBase,
    rows: int = ROWS,
) -> Packed:
    """Pack each scene's questions into ``rows`` text rows; those that do not fit are dropped."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    prefix = encode(f"<s> {SYSTEM} USER:")
    cue, end = encode("ASSISTANT:")[0], tokenizer.eos_token_id
    start = len(prefix) + VISUAL
    kind_of_token = {encode(kind)[0]: kind for kind in KINDS}
    shape = (len(scenes), rows)
    ids, target = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    position, branch = np.full(shape, start), np.full(shape, -1)
    weight, answering = np.zeros(shape, np.float32), np.zeros(shape, bool)
    asked, patches = np.full(shape, -1), np.zeros((*shape, VISUAL), bool)
    for item, (scene, asks) in enumerate(zip(scenes, questions, strict=True)):
        row = 0
        for number, ask in enumerate(asks):
            question, answer = encode(f"\n{ask.text} ASSISTANT:"), [*encode(ask.answer), end]
            tokens = question + answer
            length = len(tokens) - 1
            if row + length > rows:
                continue
            here = slice(row, row + length)
            ids[item, here], target[item, here] = tokens[:-1], tokens[1:]
            position[item, here] = start + np.arange(length)
            branch[item, here] = number
            cue_row = row + len(question) - 1
            answering[item, cue_row : row + length] = True
            weight[item, cue_row : row + length] = WEIGHT[ask.skill]
            weight[item, row + length - 1] = END_WEIGHT
            assert ids[item, cue_row] == cue
            if ask.kind:
                asked[item, cue_row] = KINDS.index(ask.kind)
                patches[item, cue_row] = scene.patches(ask.kind).ravel()
            else:
                for at in range(cue_row, row + length):
                    if kind := kind_of_token.get(int(target[item, at])):
                        patches[item, at] = scene.patches(kind).ravel()
            row += length
    causal = np.tri(rows, dtype=bool)
    visible = (branch[:, :, None] == branch[:, None, :]) & causal & (branch >= 0)[:, None, :]
    arrays = (ids, position, visible, target, weight, answering, asked, patches)
    return Packed(torch.tensor(prefix), *(torch.as_tensor(a) for a in arrays))
