"""What the residual stream after each layer says, read while the pass runs: the logit lens' part.

Of each layer the likeliest tokens and the logits that were asked for are kept, formed in pieces.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.run import open_sessions
from clva_lens.engine.session import Session
from clva_lens.engine.stream import Stream, StreamCall
from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.lens.margins import margins
from clva_lens.lens.observers import chosen_layers
from clva_lens.methods.target import shape_of
from clva_lens.models.answer_tokens import answer_tokens
from clva_lens.models.family import find_family
from clva_lens.models.readout import read_out, token_ids
from clva_lens.models.step import Step

# Logits are formed for at most this many entries at once (64 MiB of float32).
LOGITS_AT_ONCE = 2**24
# Of the largest logit: a few roundings of bfloat16.
ROUNDING = 2**-5

Span = str | Bool[Tensor, "*batch sequence"] | Sequence[int]


class LayerReading(Session):
    """Edits nothing; reads the stream after the chosen layers of the prompt's pass."""

    site = "decoder"

    def __init__(
        self,
        model: PreTrainedModel,
        words: Any,
        span: Span,
        layers: Sequence[int] | str,
        tokens: str | int | Sequence[str | int] | None,
        k: int,
    ) -> None:
        """Resolve layers and tokens; ``words`` is the tokenizer, None for a bare handle.

        Raises:
            ParameterError: if a layer, a token or ``k`` does not fit.
            ModelLoadError: if it is not known how the model makes logits of its residual stream.
        """
        self.model, self.words, self.span, self.k = model, words, span, k
        shape = shape_of(model, "decoder")
        every = tuple(range(shape.depth))  # also the layers that have no attention
        self.numbers = chosen_layers(layers, shape._replace(layers=every))
        self.final = shape.depth - 1
        self.streams = {("resid_post", layer) for layer in (*self.numbers, self.final)}
        self.readout = find_family(model).activations(model).readout
        unembed: Any = self.readout.unembed
        size = unembed.weight.shape[0]
        if not 1 <= k <= size:
            raise ParameterError(
                f"k must be in 1 to {size} (the vocabulary), but is {k}. Pass k=5."
            )
        wanted = [] if tokens is None else [tokens] if isinstance(tokens, str | int) else tokens
        self.ids = token_ids(size, words, wanted)
        self.names = tuple(
            one if isinstance(one, str) else str(one) if words is None else words.decode([one])
            for one in wanted
        )
        self.answers = ([], []) if words is None else answer_tokens(words)
        self.step: Step | None = None
        self.found: dict[int, tuple[Tensor, ...]] = {}
        self._leaving: Tensor | None = None

    @torch.no_grad()
    def stream(self, call: StreamCall, hidden: Stream) -> None:
        """Read the span's positions of one layer."""
        if call.step.number:
            return
        self.step = call.step
        if call.layer == self.final:
            self._leaving = hidden[:, -1]
        if call.layer not in self.numbers:
            return
        places = call.step.spans.places(self.span).to(hidden.device)
        rows = torch.arange(len(places), device=hidden.device)[:, None]
        self.found[call.layer] = read_layer(
            self.readout, hidden[rows, places], self.k, self.ids, *self.answers
        )

    @torch.no_grad()
    def check(self, logits: Float[Tensor, "batch row vocabulary"]) -> None:
        """Compare what the last layer says with the model's own logits, where no method edits them.

        Raises:
            ModelLoadError: if they differ by more than rounding.
        """
        if any(session.edits_logits for session in open_sessions(self.model)):
            return
        assert self._leaving is not None, "the last layer ran"
        own = logits[:, -1].float()
        mine = read_out(self.readout, self._leaving).float().to(own.device)
        apart, size = float((mine - own).abs().max()), float(own.abs().max())
        if not apart <= ROUNDING * size:
            raise ModelLoadError(
                f"what the last layer of this {type(self.model).__name__} says through its final "
                f"norm and unembedding differs by {apart:.3g} from its logits (up to {size:.3g}), "
                "so something else stands between them. Write the readout of this family "
                "(ModelFamily.activations)."
            )


def read_layer(
    readout: Any,
    residual: Float[Tensor, "batch position *copy d_model"],
    k: int,
    ids: list[int],
    yes: list[int],
    no: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return top tokens, their probabilities, chosen logits and the margin of one layer."""
    flat = residual.flatten(0, 1)
    each = max(1, LOGITS_AT_ONCE // readout.unembed.weight.shape[0])
    pieces = []
    for piece in flat.split(each):
        logits = read_out(readout, piece).float()
        probabilities, top = logits.softmax(dim=-1).topk(k, dim=-1)
        margin = logits.new_zeros(len(logits))
        if yes and no:
            margin = margins(logits, yes, no)
        pieces.append((top, probabilities, logits[:, ids], margin))
    whole = [torch.cat(part) for part in zip(*pieces, strict=True)]
    top, probabilities, chosen, margin = (
        part.unflatten(0, tuple(residual.shape[:2])) for part in whole
    )
    return top, probabilities, chosen, margin
