"""Where each token of a prompt stands, as the model itself would work it out from the whole."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def positions_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the ``position_ids`` of a whole prompt, [..., batch, position]: no padding counts.

    Models of the Qwen2-VL kind have three for each token (time, row and column), which depend on
    the picture's grid. None for a model that takes no positions.
    """
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return None
    rope = _rope(model)
    if rope is not None:
        taken = inspect.signature(rope).parameters
        return rope(**{name: one for name, one in inputs.items() if name in taken})[0]
    real = inputs["attention_mask"].long()
    return (real.cumsum(dim=1) - 1).clamp_min(0)


def counts_positions(model: PreTrainedModel) -> bool:
    """Whether a model takes positions, one for each token."""
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    return takes and _rope(model) is None


def _rope(model: PreTrainedModel) -> Any:
    inner: Any = getattr(model, "model", model)
    return getattr(inner, "get_rope_index", None)
