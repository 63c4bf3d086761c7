"""What a norm computes: its scale, and what it multiplies by. Learned from what it does.

LayerNorms and RMS norms go by many names; whether one takes the mean away, and whether it
multiplies by its weight w or by 1 + w as Gemma's do, is seen in what it makes of one vector.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clva_lens.ground.errors import ModelLoadError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Both of a rounding of bfloat16 and of the weight that is nearest to another reading's.
CLOSE = 2**-6


class NormForm(NamedTuple):
    """y = gain · (x − mean(x) if ``centred``) / scale + bias, with scale² = mean of squares + eps.

    ``gain`` and ``bias`` are float64; ``bias`` is None where there is none.
    """

    centred: bool
    eps: float
    gain: Float[Tensor, " width"]
    bias: Float[Tensor, " width"] | None

    def scale(self, value: Float[Tensor, "*places width"]) -> Float[Tensor, "*places 1"]:
        """Return what the norm divides by, in float32 or better."""
        return self._parted(wide(value))[1]

    def normalised(self, value: Float[Tensor, "*places width"]) -> Float[Tensor, "*places width"]:
        """Return what the norm makes of a value before its gain, in float32 or better."""
        value, scale = self._parted(wide(value))
        return value / scale

    def back(self, directions: Float[Tensor, "*places width"]) -> Float[Tensor, "*places width"]:
        """Return the directions whose products with x, over its scale, are these with y − bias."""
        directions = directions * self.gain.to(directions)
        if self.centred:
            directions = directions - directions.mean(dim=-1, keepdim=True)
        return directions

    def _parted(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.centred:
            value = value - value.mean(dim=-1, keepdim=True)
        return value, (value.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return a tensor in float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def norm_form(norm: Any) -> NormForm:
    """Return what a LayerNorm or an RMS norm computes.

    Raises:
        ModelLoadError: if it is neither, or its weight cannot be read.
    """
    weight = plain_weight(norm).detach()
    bias = getattr(norm, "bias", None)
    bias = None if bias is None else bias.detach().double()
    if isinstance(norm, nn.LayerNorm):
        return NormForm(True, norm.eps, weight.double(), bias)
    named = [getattr(norm, one, None) for one in ("variance_epsilon", "eps")]
    eps = next((one for one in named if one is not None), torch.finfo(weight.dtype).eps)
    sign = torch.ones_like(weight)
    sign[1::2] = -1
    given = 1 + 0.5 * sign  # its mean is not 0, nor its mean square 1
    made = called(norm, given).double()
    for centred in (False, True):
        for gain in (weight.double(), 1 + weight.double()):
            form = NormForm(centred, float(eps), gain, bias)
            wanted = form.normalised(given.double()) * gain
            wanted = wanted if bias is None else wanted + bias
            if (made - wanted).abs().max() <= CLOSE * wanted.abs().max():
                return form
    raise ModelLoadError(
        f"a {type(norm).__name__} is neither an RMS norm nor a LayerNorm, so what it adds to a "
        "logit cannot be divided. Read activations inside model.trace(prompt)."
    )


def called(module: nn.Module, *given: Tensor) -> Any:
    """Return what a module's own ``forward`` makes, past hooks and what nnsight put around it."""
    forward: Any = type(module).forward
    return forward(module, *given)


def plain_weight(module: Any) -> Tensor:
    """Return a module's weight, if it is all that the module multiplies by.

    Raises:
        ModelLoadError: if it is quantised, offloaded, or has an adapter beside it.
    """
    weight, what = module.weight, f"the weight of a {type(module).__name__}"
    if hasattr(module, "base_layer"):
        raise ModelLoadError(
            f"{what} cannot be read for this, because an adapter adds to it. Merge it first: "
            "cl.load((peft_model.merge_and_unload(), processor))."
        )
    if weight.is_meta:
        raise ModelLoadError(
            f"{what} cannot be read for this, because it is offloaded (on the device 'meta'). Load "
            "the model with a device_map that keeps the language model on a device."
        )
    if weight.dtype not in FLOATS:
        raise ModelLoadError(
            f"{what} cannot be read for this, because it is quantised ({weight.dtype}). Load the "
            "model without quantization_config."
        )
    return weight
