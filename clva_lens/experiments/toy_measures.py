"""What is measured on the toy world beyond answers: masks to point at."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from clva_lens.lens.intervene import trace_attention
from clva_lens.lens.load import LensModel
from clva_lens.lens.observers import AttentionTrace
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
    traces = []
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        images = [render(scenes[index]) for index, _ in part]
        prompt = model.prompt(images, [question.text for _, question in part])
        traces.append(trace_attention(model, prompt, method))
    return AttentionTrace.concatenate(traces)


def object_patches(
    scenes: Sequence[Scene], asked: Sequence[tuple[int, Question]]
) -> Bool[Tensor, "sample visual"]:
    """Return, for each question, the image tokens that its object covers."""
    masks = [scenes[index].patches(question.kind).ravel() for index, question in asked]
    return torch.from_numpy(np.stack(masks))
