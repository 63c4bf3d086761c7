"""VCD, Visual Contrastive Decoding (arXiv:2311.16922; DAMO-NLP-SG/VCD at d6568ff).

The second input has the same text and a picture drowned in noise. What the model says about it
anyway comes from its language prior, and is taken away: (1 + α)·l − α·l′, for tokens with
l ≥ max l + ln β. The noise is the forward process of a diffusion model on the normalised pixels x:

    β_t = sigmoid(linspace(−6, 6, 1000))_t · (0.005 − 1e-5) + 1e-5,   ᾱ_t = Π_{s≤t} (1 − β_s),
    x_t = √ᾱ_t · x + √(1 − ᾱ_t) · ε.

**Departs from the release**, which has ancestral sampling only and draws new noise from the global
generator: greedy decoding and beams work too, and ε is drawn once for ``seed``, the same for every
picture of its size, so that a prompt gets the same answer alone and in any batch. α = 0 edits
nothing at all: the cut-off goes with the contrast. Exact under fused kernels; twice the rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.engine.session import Session
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Kernel, Method, Variant, check_variant, register_method
from clva_lens.methods.contrast import ContrastRule, ContrastSession
from clva_lens.methods.target import Target
from clva_lens.models.family import Inputs, find_family

STEPS = 1000
# (α, β, t): of the released scripts by family, and of the paper.
RELEASED = {"instructblip": (0.5, 0.2, 500)}
RELEASED_ELSE = (1.0, 0.2, 500)
PAPER = (1.0, 0.1, 999)


@register_method
@dataclass(frozen=True, kw_only=True)
class VCD(Method):
    """Visual Contrastive Decoding. None takes the variant's default for the model's family.

    Args:
        alpha: α, the strength of the contrast, >= 0; 0 edits nothing. Released: 1, and 0.5 for
            InstructBLIP, whose script leaves it at the function's own default. Paper: 1.
        beta: β of the cut-off, in [0, 1]. Released: 0.2. Paper: 0.1.
        noise_step: t, how much noise: 0 (next to none) to 999. Released: 500. Paper: 999 (POPE).
        seed: of the noise.
        variant: whose defaults.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.VCD(seed=0)).texts
    ['no']
    """

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "Visual Contrastive Decoding, arXiv:2311.16922"
    kernel: ClassVar[Kernel] = "none"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("greedy", "beam")
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0}
    alpha: float | int | None = None
    beta: float | int | None = None
    noise_step: int | None = None
    seed: int = 0
    variant: Variant = "released"

    def __post_init__(self) -> None:
        """Check everything that was given."""
        check_variant(self.variant)
        noise_weights(0 if self.noise_step is None else self.noise_step)
        self._rule(PAPER)

    def _rule(self, defaults: tuple[float, float, int]) -> ContrastRule:
        alpha = defaults[0] if self.alpha is None else self.alpha
        beta = defaults[1] if self.beta is None else self.beta
        return ContrastRule(strength=alpha, beta=beta)

    def sessions(self, target: Target) -> list[Session]:
        """Return the contrast with the noisy picture; nothing for α = 0."""
        defaults = PAPER
        if self.variant == "released":
            defaults = RELEASED.get(find_family(target.model).name, RELEASED_ELSE)
        rule = self._rule(defaults)
        if rule.is_identity:
            return []
        step = defaults[2] if self.noise_step is None else self.noise_step
        return [ContrastSession(target.model, _Noisy(step, self.seed), rule)]


@dataclass(frozen=True)
class _Noisy:
    step: int
    seed: int

    def __call__(self, inputs: Inputs) -> Inputs:
        return inputs | {"pixel_values": add_noise(inputs["pixel_values"], self.step, self.seed)}


@cache
def noise_weights(step: int) -> tuple[float, float]:
    """Return √ᾱ_t and √(1 − ᾱ_t) of the module's docstring.

    Raises:
        ParameterError: if there is no such step.
    """
    if not 0 <= step < STEPS:
        raise ParameterError(
            f"noise_step must be in 0 to {STEPS - 1}, but is {step}. Pass noise_step=500."
        )
    # No tensors, which would be fake ones in a method that is made in nnsight's scan().
    places = (-6 + 12 * i / (STEPS - 1) for i in range(step + 1))
    kept = math.prod(1 - ((0.005 - 1e-5) / (1 + math.exp(-x)) + 1e-5) for x in places)
    return math.sqrt(kept), math.sqrt(1 - kept)


def add_noise(
    pixels: Float[Tensor, "batch channel height width"], step: int, seed: int
) -> Float[Tensor, "batch channel height width"]:
    """Return x_t of normalised pixels; the same noise, standard normal, for every picture."""
    signal, noise = noise_weights(step)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(pixels.shape[1:], generator=generator, dtype=torch.float32)
    return signal * pixels + noise * drawn.to(pixels)
