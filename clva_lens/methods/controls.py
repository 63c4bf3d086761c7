"""Controls for methods that act on attention: the same edit on other image tokens.

A method that marks image tokens must lose its effect when as many others are marked instead. The
opposite control needs no code of its own: ``CLVA(alpha=-0.9, beta=-14)`` swaps the two anchors,
``PAI(alpha=-0.2)`` and ``ClearSight(enhance=0.85, suppress=1.05)`` turn theirs around.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.bias import Bias, dense
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.base import Method
from clva_lens.methods.target import Target


@dataclass(frozen=True)
class Shuffled(Method):
    """Another method whose biases are dealt out to the image tokens in a random order.

    Each image token gets, in every row, head and layer, the bias of one other (or the same) image
    token: under CLVA, random masks of the same sizes and overlap. What is read is read as before;
    keys that are no image tokens keep their bias. The order depends on ``seed`` and the number of
    image tokens only, so it is the same for all prompts and steps; take several seeds. Where all
    image tokens have the same bias, as under a ``KnockOut``, this is no control: a warning says so.

    Args:
        method: what is shuffled; a method that only puts biases on attention.
        seed: of the order.

    >>> cl.generate(model, prompt, cl.Shuffled(cl.CLVA(), seed=0)).texts
    ['no']
    """

    name: ClassVar[str] = "shuffled"
    method: Method
    seed: int = 0

    def sessions(self, target: Target) -> list[Session]:
        """Return the method's sessions, each in a shuffling one.

        Raises:
            ParameterError: if the method acts on anything but attention.
        """
        inner = self.method.sessions(target)
        if not inner or any(s.edits_output or s.edits_logits or s.streams for s in inner):
            raise ParameterError(
                f"the method '{self.method.name}' does not act by biases on attention alone, so "
                "they cannot be shuffled. Pass a method such as CLVA(), PAI() or VisFlow()."
            )
        return [_ShuffledSession(session, self.seed) for session in inner]


class _ShuffledSession(Session):
    def __init__(self, inner: Session, seed: int) -> None:
        self.inner, self.seed = inner, seed
        self.site, self.layers = inner.site, inner.layers
        self.leaves_prefix, self.rereads = inner.leaves_prefix, inner.rereads
        self._last: tuple[Bias, Tensor] | None = None
        self._compared = False

    def attention(self, call: AttentionCall) -> Float[Tensor, "batch _ query key"] | None:
        """Return the inner session's bias with its image columns in another order."""
        bias = self.inner.attention(call)
        if bias is None:
            return None
        if self._last is None or self._last[0] is not bias:  # CLVA's is the same for all layers
            visual, old = call.step.visual, dense(bias)
            size = (-1, *old.shape[1:3], -1)
            to = rearrange(visual, "b v -> b 1 1 v").expand(size)
            source = rearrange(visual[:, self.order(visual.shape[1])], "b v -> b 1 1 v")
            moved = old.gather(3, source.expand(size))
            self._last = (bias, old.scatter(3, to, moved))
            if call.step.number == 0 and not self._compared:
                self._warn_if_even(moved, old.gather(3, to))
        return self._last[1]

    def _warn_if_even(self, moved: Tensor, own: Tensor) -> None:
        """Warn, once a run, if a bias is no other in another order."""
        self._compared = True
        if bool(own.any()) and torch.equal(moved, own):
            warnings.warn(
                "Shuffled(…) changes nothing here: the method puts the same bias on all image "
                "tokens, so an order of them is no control. Shuffle one that marks some of them, "
                "such as CLVA().",
                UserWarning,
                stacklevel=2,
            )

    def order(self, visual: int) -> Int[Tensor, " visual"]:
        """Return which image token each one's bias is taken from."""
        return torch.randperm(visual, generator=torch.Generator().manual_seed(self.seed))
