"""Whether a model is still the one it was: its weights, and which adapters are switched on."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

_VALUES = 4
# Of a value: what bfloat16 leaves of it, twice over.
_ROUNDING = 2**-6


def weights_state(model: nn.Module) -> int:
    """Return a number that changes as weights are written to or replaced, or adapters switched.

    It reads no weights: torch counts what is written in place (not through ``parameter.data``).
    """
    weights = tuple(
        (id(one), one.data_ptr(), 0 if one.is_inference() else one._version)
        for one in model.parameters()
    )
    switches = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    adapters = tuple(
        str([getattr(one, switch, None) for switch in switches])
        for one in model.modules()
        if hasattr(one, "merged_adapters")  # a PEFT layer
    )
    return hash((weights, adapters))


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
