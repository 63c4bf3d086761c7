"""Whether a model is still the one it was: its weights, and which adapters are switched on."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clva_lens.models.tree import tree

_VALUES = 4
# Of a value: what bfloat16 leaves of it, twice over.
_ROUNDING = 2**-6


def weights_state(model: nn.Module) -> int:
    """Return a number that changes as weights are written to or replaced, or adapters switched.

    It reads no weights: torch counts what is written in place (not through ``parameter.data``).
    """
    switches = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    found: list[Any] = []
    for module in tree(model):
        for one in module._parameters.values():
            if one is not None:
                version = 0 if one.is_inference() else one._version
                found.append((id(one), one.data_ptr(), version))
        # A PEFT layer. To ask the module itself would raise an error in every other one.
        if "merged_adapters" in vars(module) or hasattr(type(module), "merged_adapters"):
            found.append(str([getattr(module, switch, None) for switch in switches]))
    return hash(tuple(found))


def weights_sample(model: nn.Module) -> Float[Tensor, "parameter value"]:
    """Return a few values of every parameter, in the order of their names: a model's fingerprint.

    They are spread evenly; NaN where a parameter is packed or not in memory.
    """
    rows = []
    for _, one in sorted(model.named_parameters()):
        row = torch.full((_VALUES,), torch.nan)
        if one.is_floating_point() and not one.is_meta and one.numel():
            places = torch.linspace(0, one.numel() - 1, _VALUES, dtype=torch.float64).long()
            row = one.detach().reshape(-1)[places.to(one.device)].float().cpu()
        rows.append(row)
    return torch.stack(rows)


def is_sample_of(sample: Float[Tensor, "parameter value"], model: nn.Module) -> bool:
    """Whether a sample is of this model's weights, but for the rounding of half precision."""
    own = weights_sample(model)
    if own.shape != sample.shape:
        return False
    known = ~(own.isnan() | sample.isnan())
    return torch.allclose(own[known], sample[known], rtol=_ROUNDING, atol=1e-6)
