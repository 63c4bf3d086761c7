"""What is measured on the toy world beyond answers: where a map points.

The *pointing game*: does a saliency map have its maximum on the object in question? Scenes come
with masks, so a map that merely looks like grounding is found out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.errors import BenchmarkError
from clva_lens.intervene import trace_attention
from clva_lens.methods.base import Method
from clva_lens.models.lens import LensModel
from clva_lens.toy.questions import Question
from clva_lens.toy.scenes import Scene, render
from clva_lens.trace import AttentionTrace


def trace_questions(
    model: LensModel,
    scenes: Sequence[Scene],
    asked: Sequence[tuple[int, Question]],
    method: Method | None = None,
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


def pointing(
    maps: Float[Tensor, "sample *axes visual"], patches: Bool[Tensor, "sample visual"]
) -> Bool[Tensor, "sample *axes"]:
    """Return whether each map has its maximum on the object's patches.

    Raises:
        BenchmarkError: if an object covers no patch, so that no map can point at it.
    """
    if not patches.any(dim=1).all():
        raise BenchmarkError(
            f"{int((~patches.any(dim=1)).sum())} questions are about objects that cover no patch. "
            "Ask about objects that are there."
        )
    best = maps.argmax(dim=-1)
    shape = (len(patches), *[1] * (best.ndim - 1), patches.shape[1])
    on = patches.reshape(shape).expand(*best.shape, -1).to(best.device)
    return on.gather(-1, best[..., None])[..., 0]
