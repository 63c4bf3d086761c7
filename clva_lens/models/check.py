"""The check at the door: is attention where the family says, and does editing it move the model?"""

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from clva_lens.attention import running
from clva_lens.errors import InterventionError, ModelCheckError
from clva_lens.methods.base import shape_of
from clva_lens.methods.knockout import KnockOut
from clva_lens.models.family import find_family
from clva_lens.models.prompt import Prompt
from clva_lens.trace import Observer


@torch.inference_mode()
def check_family(model: PreTrainedModel, prompt: Callable[[np.ndarray, str], Prompt]) -> float:
    """Return how far the logits move when text may not see the image; it must be more than 0.

    Runs a short prompt about a small noise picture twice. Checks that the number of image tokens
    fits the grid, that the rows of every layer sum to 1 (within 1e-3), and that removing the
    attention from text to image in all layers changes the logits.

    Raises:
        ModelCheckError: naming what does not fit.
    """
    name = model.name_or_path or type(model).__name__
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    asked = prompt(noise, "What is in the image?")
    family, shape = find_family(model), shape_of(model)
    rows, columns = family.grid(model)
    if asked.spans.visual_count != rows * columns:
        raise ModelCheckError(
            f"{name}: the prompt has {asked.spans.visual_count} image tokens, but the vision tower "
            f"has a grid of {rows} × {columns}. Check the processor's patch_size, "
            "vision_feature_select_strategy and num_additional_image_tokens."
        )
    observer = Observer("all", shape)
    with running(model, [observer]):
        before = model(**asked.inputs).logits[:, -1].float()
    try:
        seen = observer.trace(batched=True)
    except InterventionError:
        raise ModelCheckError(
            f"{name}: no attention was seen in some layers. The modules or the configuration named "
            f"in the family '{family.name}' are probably not on the path."
        ) from None
    total = seen.intensity + seen.system + seen.text
    worst = float((total - 1).abs().max())
    if not worst <= 1e-3:
        raise ModelCheckError(
            f"{name}: rows of the attention pattern sum to {1 - worst:.4f} instead of 1. The "
            f"modules named in the family '{family.name}' are probably not this "
            "model's attention."
        )
    with running(model, KnockOut(layers=range(shape.layers)).sessions(shape)):
        after = model(**asked.inputs).logits[:, -1].float()
    moved = float((after - before).abs().max())
    if not moved > 0:
        raise ModelCheckError(
            f"{name}: removing the attention from text to image left the logits unchanged. The "
            f"modules named in the family '{family.name}' are probably not on the path."
        )
    return moved
