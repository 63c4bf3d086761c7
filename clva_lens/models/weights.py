"""Whether a model is still the one it was: its weights, and which adapters are switched on."""

from torch import nn


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
