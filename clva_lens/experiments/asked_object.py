"""Where on the picture the object lies that a question asks for, where that is known."""

import numpy as np
import torch
from jaxtyping import Bool

from clva_lens.benchmarks.base import Benchmark, Sample
from clva_lens.benchmarks.coco_instances import Instances
from clva_lens.benchmarks.pope_sets import Pope
from clva_lens.benchmarks.toy_pope import ToyPope
from clva_lens.lens.load import LensModel
from clva_lens.lens.patch_masks import coco_mask, patch_mask
from clva_lens.models.prompt import Prompt


def asked_object(
    model: LensModel,
    benchmark: Benchmark,
    sample: Sample,
    prompt: Prompt,
    instances: Instances | None = None,
) -> Bool[np.ndarray, "row column"] | None:
    """Return the patches of which the asked object covers a quarter or more.

    In the toy world every object is known; on COCO's pictures (of POPE's sets COCO and A-OKVQA) by
    ``instances``, all instances of the object together, crowds too. None where it is not known,
    the object is not there, or it covers a quarter of no patch.
    """
    if isinstance(benchmark, ToyPope):
        kind = sample.id.split("/")[1]
        patches = benchmark.scenes[int(sample.group)].patches(kind)
        return patches if patches.any() else None
    if instances is None or not isinstance(benchmark, Pope) or benchmark.source == "gqa":
        return None
    found = instances.asked(sample)
    if found is None:
        return None
    size, annotations = found
    pixels = np.logical_or.reduce([coco_mask(one, size) for one in annotations])
    covered = patch_mask(model, pixels, prompt=prompt)
    return prompt.on_grid(covered.to(torch.uint8)).cpu().numpy() > 0 if covered.any() else None
