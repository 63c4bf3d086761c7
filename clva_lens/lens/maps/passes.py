"""What the maps keep of a pass: what enters the decoder, and what each layer's pattern is made of.

No pattern is kept. A row that is carried through the layers needs one layer's pattern at a time, a
few rows of it at once; queries, keys and values of all layers stay, as autograd keeps them anyway.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Part, Stream, StreamCall
from clva_lens.methods.target import Shape
from clva_lens.models.step import Step

Change = Callable[[Stream, Int[Tensor, "batch visual"]], Stream]


class Entry(Session):
    """Has the decoder begin at what enters its first layer, so that gradients end there.

    ``change`` makes what is read in its place, given that and where the image tokens are.
    """

    site = "decoder"
    streams: tuple[tuple[Part, int], ...] = (("resid_pre", 0),)
    step: Step
    entered: Stream

    def __init__(self, change: Change | None = None) -> None:
        """Keep how what enters is changed; None leaves it."""
        self.change = change

    def stream(self, call: StreamCall, hidden: Stream) -> Stream:
        """Keep what enters, as a leaf."""
        self.step = call.step.to(hidden.device)
        found = hidden.detach()
        found = found if self.change is None else self.change(found, self.step.visual)
        self.entered = found.requires_grad_(torch.is_grad_enabled())
        return self.entered

    def of_image(self, stream: Stream) -> Float[Tensor, "batch visual *copy width"]:
        """Return the image tokens of a stream like the one that entered, in float32."""
        places = self.step.visual
        return stream[torch.arange(len(places), device=places.device)[:, None], places].float()


def slopes(wanted: Float[Tensor, " batch"], of: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return each sample's gradient with respect to tensors of its pass; None where there is none.

    Samples do not reach each other, so one backward is enough for all.
    """
    return torch.autograd.grad(wanted, of, torch.ones_like(wanted), allow_unused=True)


class Patterns(Session):
    """Keeps of each layer what its pattern can be formed from again, as the model had it."""

    edits_output = True

    def __init__(self, shape: Shape) -> None:
        """Keep all layers of a site."""
        self.site, self.layers = shape.site, shape.layers
        self.calls: dict[int, AttentionCall] = {}

    def output(
        self, call: AttentionCall, out: Float[Tensor, "batch query head width"]
    ) -> Float[Tensor, "batch query head width"] | None:
        """Keep the layer's call, which has the bias of all methods by now."""
        self.calls[call.layer] = call

    def from_the_top(self) -> Iterator[AttentionCall]:
        """Iterate over the calls from the last layer to the first."""
        return (self.calls[layer] for layer in reversed(self.layers))

    def last_row(self) -> Float[Tensor, "batch row"]:
        """Return 1 at each sample's last text row, 0 elsewhere."""
        step = self.calls[self.layers[0]].step
        row = torch.zeros(step.text_rows.shape, dtype=torch.float32, device=step.text_rows.device)
        return row.scatter(1, step.last_text[:, None], 1.0)

    def on_image(self, row: Float[Tensor, "batch row"]) -> Float[Tensor, "batch visual"]:
        """Return what a row over the positions has at the image tokens."""
        return self.calls[self.layers[0]].step.on_image(row)


def carried(
    call: AttentionCall,
    row: Float[Tensor, "batch row"],
    weigh: Callable[[Float[Tensor, "batch head piece key"], int, int], Tensor],
) -> Float[Tensor, "batch row"]:
    """Return row · M for a matrix M made of one layer's pattern, which is never there as a whole.

    ``weigh(rows, start, stop)`` makes M's rows [batch, piece, key] of the pattern's.
    """
    total = torch.zeros_like(row)
    for start, stop in call.row_pieces(0, row.shape[1]):
        part = row[:, None, start:stop]
        if bool((part != 0).any()):  # above the last row's first layer most rows have no part
            made = weigh(call.rows(start, stop)[..., : row.shape[1]], start, stop)
            total += (part @ made)[:, 0]
    return total
