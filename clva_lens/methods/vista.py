"""VISTA, visual information steering, early logits (arXiv:2502.03628; LzVv123456/VISTA, dc62252).

**Steering.** v_l is what the picture adds to the last prompt token: the output of layer l with the
picture, less that of the same prompt without its image tokens. What the MLP of each layer puts out,
x, is turned towards it in every row, those of system and image too, and keeps its length:

    x′ = |x|·u/|u|,   u = x/|x| + λ·s·v_l/|v_l|,   s = 1 + max(0, −cos(x, v_l)).

**Early logits.** l ← (1 − a)·l + a·l̄, where l̄ is the mean of the unembedded outputs of layers 25
to 30 of 32, as released without the final norm; of another depth L, 25L/32 to 30L/32, rounded down.

λ = 0.1 as in the release's script for MMHal; it has 0.17 for CHAIR and 0.01 for POPE, and its
author advises 0.1 to 0.15. a = 0.3.

**Departs from the release**, whose "principal component" of the one pair adds 1 to one coordinate
of v: v is the difference. Each sample has its own v (the release has batches of one). In a pass of
its own, v is read without other methods. Two more prefills, and one pass for each token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from clva_lens.engine.session import Session
from clva_lens.engine.stream import Part, Stream, StreamCall, stream_hooks
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, check_layers, register_method
from clva_lens.methods.contrast import text_only, whole_inputs
from clva_lens.methods.steering import turned
from clva_lens.methods.target import Target
from clva_lens.models.context import beside
from clva_lens.models.family import Inputs, find_family, find_site
from clva_lens.models.norms import wide
from clva_lens.models.step import Step
from clva_lens.models.twin import twin

FIRST, LAST, DEPTH = 25, 30, 32

Logits = Float[Tensor, "batch vocabulary"]


@register_method
@dataclass(frozen=True, kw_only=True)
class VISTA(Method):
    """Steering towards what the picture adds, and logits of earlier layers.

    Args:
        strength: λ, how far rows are turned; finite; 0 turns none.
        augment: a, the share of the earlier layers' logits, in [0, 1]; 0 leaves them out.
        layers: where rows are turned, 0-based; None is all.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.VISTA(strength=0.01)).texts
    ['no']
    """

    name: ClassVar[str] = "vista"
    paper: ClassVar[str] = "VISTA, arXiv:2502.03628"
    kernel: ClassVar[Kernel] = "none"
    sites: ClassVar[tuple[str, ...]] = ()
    zero: ClassVar[Mapping[str, Any] | None] = {"strength": 0.0, "augment": 0.0}
    strength: float | int = 0.1
    augment: float | int = 0.3
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not math.isfinite(self.strength):
            raise ParameterError(f"strength is {self.strength}. Pass a finite one, as 0.1.")
        if not 0 <= self.augment <= 1:
            raise ParameterError(
                f"augment must be in [0, 1], but is {self.augment}. Pass augment=0.3."
            )

    def sessions(self, target: Target) -> list[Session]:
        """Return what steers and what adds the earlier logits, each if it does something.

        Raises:
            ModelLoadError: if the language model's layers have no names (T5).
            ParameterError: if the decoder has no such layer.
        """
        shape = target.at("decoder")
        shape = shape._replace(layers=tuple(range(shape.depth)))
        sessions: list[Session] = []
        if self.strength != 0:
            layers = shape.layers if self.layers is None else self.layers
            chosen = check_layers("layers", layers, shape)
            sessions.append(_Turning(target.model, chosen, self.strength))
        if self.augment != 0:
            read = range(FIRST * shape.depth // DEPTH, LAST * shape.depth // DEPTH + 1)
            sessions.append(_Early(target, tuple(read), self.augment))
        return sessions


class _Turning(Session):
    """Turns what MLPs put out towards the picture's share, which a twin of the model reads."""

    site = "decoder"
    layers = ()

    def __init__(
        self, model: PreTrainedModel, layers: tuple[int, ...], strength: float | int
    ) -> None:
        self.model, self.turns, self.strength = model, layers, strength
        self.streams = {("mlp_out", layer) for layer in layers}
        self._seen: Inputs = {}
        self._handles: list[RemovableHandle] = []
        self._prompt: Step | None = None
        self._directions: dict[int, Float[Tensor, "batch width"]] = {}

    def begin(self) -> None:
        """Watch the pictures that come in."""
        self._handles = find_family(self.model).watch(self.model, self._seen)

    def end(self) -> None:
        """Let go of the model and the pictures."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        self._directions.clear()
        self._prompt = None

    def stream(self, call: StreamCall, hidden: Stream) -> Stream:
        """Return every row, turned."""
        if call.step.number == 0 and self._prompt is not call.step:
            self._prompt = call.step
            self._read(call.step)
        if not self._directions:
            raise InterventionError(
                "VISTA joined a run whose prompt had been read already, so what the picture adds "
                "is unknown. Start it before the prompt is read."
            )
        v = self._directions[call.layer] = self._directions[call.layer].to(hidden.device)
        towards = rearrange(v, "b w -> b 1 w")
        apart = -functional.cosine_similarity(wide(hidden), towards.to(wide(hidden)), dim=-1)
        strength = self.strength * (1 + apart.clamp_min(0))
        return turned(hidden, towards, strength[..., None])

    @undisturbed()
    def _read(self, step: Step) -> None:
        """Read the prompt with its picture and without."""
        seen = dict(self._seen)
        self._seen.clear()
        whole = whole_inputs(step, seen)
        other = twin(self.model)
        image = find_family(self.model).image_token_id(self.model)
        with_it = self._outputs(other, other, whole)
        entry = find_site(other, "decoder").passes().entry
        without = self._outputs(other, entry, text_only(image)(whole))
        self._directions = {layer: with_it[layer] - without[layer] for layer in self.turns}

    def _outputs(self, model: PreTrainedModel, entry: Any, inputs: Inputs) -> dict[int, Tensor]:
        """Return what the layers put out at the last position."""
        found: dict[int, Tensor] = {}

        def keep(_: str, layer: int, hidden: Tensor) -> None:
            found[layer] = wide(hidden[:, -1])

        wanted: list[tuple[Part, int]] = [("resid_post", layer) for layer in self.turns]
        handles = [handle for _, handle in stream_hooks(model, self.site, wanted, keep)]
        try:
            beside(entry, **inputs, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return found


class _Early(Session):
    """Adds the unembedded outputs of earlier layers to the logits."""

    site = "decoder"
    layers = ()
    edits_logits = True
    leaves_prefix = True

    def __init__(self, target: Target, read: tuple[int, ...], share: float | int) -> None:
        self.readout, self.share = target.readout(), share
        self.streams = {("resid_post", layer) for layer in read}
        self._last: dict[int, Float[Tensor, "batch width"]] = {}
        self._unembed: Any = None

    def begin(self) -> None:
        """Take the unembedding a second time, without what hangs on it."""
        self._unembed = twin(self.readout.unembed)

    def end(self) -> None:
        """Forget what was read."""
        self._last.clear()
        self._unembed = None

    def stream(self, call: StreamCall, hidden: Stream) -> None:
        """Keep the last position of a layer."""
        self._last[call.layer] = hidden[:, -1]

    def logits(self, step: Step, logits: Logits) -> Logits:
        """Return (1 − a)·l + a·l̄."""
        early = torch.stack([wide(self._unembed(one)).to(logits.device) for one in self._rows()])
        return (1 - self.share) * wide(logits) + self.share * early.mean(dim=0)

    def _rows(self) -> list[Tensor]:
        return [self._last[layer] for layer in sorted(self._last)]
