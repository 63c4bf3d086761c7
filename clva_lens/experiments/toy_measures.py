"""What is measured on the toy world beyond answers: masks to point at."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from clva_lens.benchmarks.base import Sample
from clva_lens.experiments.measuring import trace_samples
from clva_lens.lens.attention_trace import AttentionTrace
from clva_lens.lens.load import LensModel
from clva_lens.methods.base import MethodLike
from clva_lens.toy.questions import Question
from clva_lens.toy.scenes import Scene, render


def trace_questions(
    model: LensModel,
    scenes: Sequence[Scene],
    asked: Sequence[tuple[int, Question]],
    method: MethodLike | None = None,
    batch_size: int = 50,
) -> AttentionTrace:
    """Return the attention for (scene index, question) pairs, with a batch axis."""
    samples = question_samples(scenes, asked)
    return trace_samples(model, samples, method, batch_size=batch_size, progress=False)


def question_samples(
    scenes: Sequence[Scene], asked: Sequence[tuple[int, Question]]
) -> list[Sample]:
    """Return (scene index, question) pairs as samples, whose groups are the scenes."""
    return [
        Sample(str(number), render(scenes[index]), question.text, question.answer, str(index))
        for number, (index, question) in enumerate(asked)
    ]


def object_patches(
    scenes: Sequence[Scene], asked: Sequence[tuple[int, Question]]
) -> Bool[Tensor, "sample visual"]:
    """Return, for each question, the image tokens that its object covers."""
    masks = [scenes[index].patches(question.kind).ravel() for index, question in asked]
    return torch.from_numpy(np.stack(masks))
