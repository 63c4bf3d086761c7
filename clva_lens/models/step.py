"""One forward pass of a run, as sessions see it: which rows and keys are what.

Kept for them: what is worked out once for all passes of a prompt, or for all layers of a pass.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clva_lens.ground.axes import TokenSpans, last_true
from clva_lens.models.beginning import ReadBefore


@dataclass(eq=False, slots=True)
class OfPrompt:
    """What was worked out once for all passes of a prompt, on one device; None until it is asked.

    ``last_text`` is ``Step.last_text``. ``means`` are what ``read_prompt_rows`` weighs rows with,
    and the spans it sums keys over. ``single_row`` marks a pass's only row as edited.
    """

    last_text: Int[Tensor, " batch"] | None = None
    means: tuple[Float[Tensor, "batch 1 2 row"], Float[Tensor, "batch key 3"]] | None = None
    single_row: Bool[Tensor, "batch 1"] | None = None


@dataclass(eq=False, slots=True)
class OfPass:
    """What was worked out once for all layers of a pass on one device; None until it is asked.

    ``future`` is the additive mask of the rows and keys in ``future_place``: (start, stop, keys).
    """

    future_place: tuple[int, int, int] | None = None
    future: Float[Tensor, "row key"] | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass of a run: step 0 reads a prompt's text, later ones the generated tokens.

    Step −1 reads what is before the text, if that is read by itself.

    ``spans`` cover the keys up to the last one of this pass, ``visual`` are the positions of the
    image tokens among them. ``offset`` is the position of the pass's first query row;
    ``text_rows`` marks the rows of the prompt that are text. ``causal``: keys are the positions of
    the rows, which do not see later ones. ``ordered``: the rows have a last one, which makes the
    maps of Eq. 4; otherwise all of them do, averaged. ``ids`` are the token ids of this
    pass's rows, None where rows are no tokens. ``image_start`` is the position of the first image
    token in any sample, ``first_text`` the first row that is text in any. ``block`` is where the
    image tokens lie if that is one piece, the same in all samples; else None. ``read_before`` is
    what the prompt's text is read onto; None where that is nothing, or nobody knows. ``of_prompt``
    keeps, by device, what is worked out once for all passes of a prompt, ``of_pass`` what is once
    for all layers of this pass.
    """

    number: int
    offset: int
    text_rows: Bool[Tensor, "batch prompt_row"]
    spans: TokenSpans
    visual: Int[Tensor, "batch visual"]
    causal: bool
    ordered: bool
    ids: Int[Tensor, "batch row"] | None = None
    image_start: int = 0
    first_text: int = 0
    block: tuple[int, int] | None = None
    read_before: ReadBefore | None = None
    of_prompt: defaultdict[torch.device, OfPrompt] = field(
        default_factory=lambda: defaultdict(OfPrompt), repr=False
    )
    of_pass: OfPass = field(default_factory=OfPass, repr=False, init=False)

    def after(self, offset: int, spans: TokenSpans, ids: Int[Tensor, "batch row"]) -> "Step":
        """Return the next pass of the same prompt."""
        return Step(
            self.number + 1,
            offset,
            self.text_rows,
            spans,
            self.visual,
            self.causal,
            self.ordered,
            ids,
            self.image_start,
            self.first_text,
            self.block,
            self.read_before,
            self.of_prompt,
        )

    @property
    def prompt_rows(self) -> int:
        """The number of the prompt's rows."""
        return self.text_rows.shape[1]

    def to(self, device: torch.device) -> "Step":
        """Return the pass with all that it knows on a device; itself if it is there."""
        if self.text_rows.device == device:
            return self
        return replace(
            self,
            text_rows=self.text_rows.to(device),
            spans=self.spans.to(device),
            visual=self.visual.to(device),
            ids=None if self.ids is None else self.ids.to(device),
        )

    def old_rows(self, count: int) -> int:
        """Return how many of this pass's ``count`` rows, at its beginning, are the prompt's."""
        return max(0, min(count, self.prompt_rows - self.offset))

    @property
    def drafts(self) -> bool:
        """Whether this pass reads several tokens that were not in the prompt, and none again."""
        if self.ids is None or (self.offset == 0 and self.number > 0):  # a pass without a cache
            return False
        return self.ids.shape[1] > 1 + self.old_rows(self.ids.shape[1])

    @property
    def keys(self) -> int:
        """The number of keys that ``spans`` cover."""
        return self.spans.image.shape[1]

    @property
    def last_text(self) -> Int[Tensor, " batch"]:
        """The position of each sample's last prompt row: the "last query row" of Eq. 4."""
        known = self.of_prompt[self.text_rows.device]
        if known.last_text is None:
            known.last_text = last_true(self.text_rows)
        return known.last_text

    def on_image(
        self, values: Float[Tensor, "batch *axes key"]
    ) -> Float[Tensor, "batch *axes visual"]:
        """Return what stands at the image keys, in their order; a view where they are a block."""
        if self.block is not None:
            return values[..., slice(*self.block)]
        visual = self.visual[(slice(None), *[None] * (values.ndim - 2))]
        return torch.take_along_dim(values, visual, dim=-1)
