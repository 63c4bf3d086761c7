"""The logit lens: what each layer's residual stream would answer, at any span of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.row_reading import stack_layers
from clva_lens.engine.run import running
from clva_lens.engine.session import Session
from clva_lens.figures import Drawing, patch_maps
from clva_lens.figures import logit_lens as draw_lens
from clva_lens.figures.base import evenly
from clva_lens.figures.patch_maps import MOST_MAPS
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.lens.intervene import intervening, join_trace, refuse_in_trace
from clva_lens.lens.layer_reading import LayerReading, Span
from clva_lens.lens.margins import MARGIN
from clva_lens.methods.base import MethodLike
from clva_lens.models.family import find_family, transformers_model
from clva_lens.models.prompt import (
    Asked,
    Prompt,
    VisualTokens,
    as_prompt,
    read_tokens,
    readable,
)
from clva_lens.models.readout import read_out

_MOST_POSITIONS = 24


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(SelfDrawn):
    """What the residual stream after each layer says at a span, through the model's final norm.

    ``top`` are the ids of the likeliest tokens and ``probabilities`` theirs, in [0, 1], the
    likeliest first. ``margin`` is logit(yes) − logit(no), the larger of each word's spellings;
    None where the tokenizer has no yes or no. ``logits`` are those of ``tokens``, in their order,
    if some were asked for. ``positions`` are the span's places in the prompt, 0-based and padding
    included. ``layers`` are 0-based. There is a batch axis first if the prompt is a batch.
    """

    top: Int[Tensor, "*batch layer position rank"]
    probabilities: Float[Tensor, "*batch layer position rank"]
    margin: Float[Tensor, "*batch layer position"] | None
    logits: Float[Tensor, "*batch layer position token"] | None
    tokens: tuple[str, ...]
    positions: Int[Tensor, "*batch position"]
    layers: tuple[int, ...]
    span: str
    batched: bool
    ids: Int[Tensor, "batch sequence"]
    visual: VisualTokens
    tokenizer: Any

    def on_grid(
        self,
        values: Float[Tensor, "*axes visual"] | None = None,
        part: str | None = None,
        picture: int | None = None,
    ) -> Float[Tensor, "*axes row column"]:
        """Return values over the image tokens (None: the margin) as maps (``Prompt.on_grid``).

        Raises:
            ParameterError: if the span is not the image, or there is no margin.
            PromptError: if the image tokens lie on no grid.
        """
        if self.span != "image":
            raise ParameterError(
                f"the span is '{self.span}', but only image tokens lie on a grid. Call "
                "logit_lens(model, prompt, span='image')."
            )
        values = self.margin if values is None else values
        if values is None:
            raise ParameterError(
                "the tokenizer has no single token for yes or no, so there is no margin. Pass "
                "tokens= to logit_lens, and on_grid(lens.logits[..., 0])."
            )
        return self.visual.on_grid(values, part, picture)

    def words(self, rank: int = 0) -> list[list[str]]:
        """Return the text of the likeliest tokens of a single prompt, by layer and position.

        Raises:
            ParameterError: if this is a batch, or of a bare nnsight handle.
        """
        self._single()
        if self.tokenizer is None:
            raise ParameterError(
                "the traced handle has no tokenizer, so tokens have no text; their ids are top. "
                "Trace the model that cl.load() returned."
            )
        decode = self.tokenizer.decode
        return [[decode([token]) for token in row] for row in self.top[..., rank].tolist()]

    def draw(self) -> Drawing:
        """Return the margin (else the first token's logit, else the top probability), drawn.

        Image tokens are drawn on the patch grid, one panel a layer; other spans as a heat map of
        layers and positions with the likeliest token written into each cell. At most the last 24
        positions and 12 evenly spaced layers are drawn.

        Raises:
            ParameterError: if this is a batch.
        """
        self._single()
        values, label = self._shown()
        if self.span == "image" and self.visual.drawable:
            chosen = evenly(len(self.layers), MOST_MAPS)
            maps = self.on_grid(values[chosen]).cpu().numpy()
            numbered = [self.layers[row] for row in chosen]
            return patch_maps(maps, layers=numbered, label=label, sums=False)
        last = slice(-_MOST_POSITIONS, None)
        places = self.positions[last]
        ids = self.ids[0][places].tolist()
        words = [row[last] for row in self.words()]
        names = [f"{p}: {self.tokenizer.decode([i])}" for p, i in zip(places, ids, strict=True)]
        values = values[:, last].cpu().numpy()
        return draw_lens(values, words, positions=names, layers=self.layers, label=label)

    def _shown(self) -> tuple[Float[Tensor, "layer position"], str]:
        if self.logits is not None:
            return self.logits[..., 0], f"logit of {self.tokens[0]!r}"
        if self.margin is not None:
            return self.margin, MARGIN
        return self.probabilities[..., 0], "probability of the likeliest token"

    def _single(self) -> None:
        if self.batched:
            raise ParameterError("this logit lens is of a batch. Select a sample: lens[0].")

    def __getitem__(self, item: int) -> "LogitLens":
        """Return the lens of one sample of a batch."""
        if not self.batched:
            raise ParameterError("this logit lens is of a single prompt. Use it as it is.")
        fields = ("top", "probabilities", "margin", "logits", "positions")
        one = {name: getattr(self, name) for name in fields}
        one = {name: None if value is None else value[item] for name, value in one.items()}
        return replace(self, **one, batched=False, ids=self.ids[item : item + 1])

    @property
    def drawable(self) -> bool:
        """Whether this is of a single prompt."""
        return not self.batched

    def __repr__(self) -> str:
        """Return the sizes, and the last layer's answer at the last position."""
        samples = f"{len(self.top)} samples × " if self.batched else ""
        size = f"{samples}{len(self.layers)} layers × {self.positions.shape[-1]} positions"
        one = self[0] if self.batched else self
        best = int(one.top[-1, -1, 0])
        word = f"token {best}" if self.tokenizer is None else self.tokenizer.decode([best])
        return (
            f"LogitLens({size} of the span '{self.span}'; layer {self.layers[-1]} ends with "
            f"{word!r}, p = {float(one.probabilities[-1, -1, 0]):.2f})"
        )


def lens_logits(
    model: Any, residual: Float[Tensor, "*stream d_model"]
) -> Float[Tensor, "*places vocabulary"]:
    """Return the logits of a residual stream through the model's own final norm and unembedding.

    For use on saved activations, or inside ``with model.trace(prompt)`` on a layer's output.
    ``model`` is a transformers model or an nnsight handle of one.

    Raises:
        ModelLoadError: if nobody wrote down where the model's norm and unembedding are.
    """
    found = transformers_model(model)
    return read_out(find_family(found).activations(found).readout, residual)


class Lensing:
    """The logit lens of a run that is traced; ``lens`` is there once the prompt was read."""

    def __init__(self, reading: LayerReading) -> None:
        """Keep what the run is read by."""
        self._reading = reading

    @property
    def lens(self) -> LogitLens:
        """What each layer says, with a batch axis if the run was a batch.

        Raises:
            InterventionError: if no prompt was read yet.
        """
        return _lens_of(self._reading)


@overload
def logit_lens(
    model: Any,
    prompt: Asked,
    span: Span = ...,
    layers: Sequence[int] | str = ...,
    method: MethodLike | None = ...,
    *,
    tokens: str | int | Sequence[str | int] | None = ...,
    k: int = ...,
) -> LogitLens: ...


@overload
def logit_lens(
    *,
    span: Span = ...,
    layers: Sequence[int] | str = ...,
    tokens: str | int | Sequence[str | int] | None = ...,
    k: int = ...,
) -> Lensing: ...


def logit_lens(
    model: Any = None,
    prompt: Asked | None = None,
    span: Span = "last",
    layers: Sequence[int] | str = "all",
    method: MethodLike | None = None,
    *,
    tokens: str | int | Sequence[str | int] | None = None,
    k: int = 5,
) -> LogitLens | Lensing:
    """Return what the stream after each decoder layer says at a span, from one forward pass.

    ``span`` is "last" (the prompt's last position), "image", "text" (after the image), "system",
    "all", a mask, or positions. ``tokens`` are texts that are one token, or ids, whose logits are
    kept; beside them the ``k`` likeliest tokens and the yes−no margin are. Logits are formed layer
    by layer, for ``layers`` (0-based, or "all"). Interventions that are open hold, and ``method``
    beside them.

    In an nnsight trace, leave ``model`` and ``prompt`` out: the trace's own run is read, under the
    methods opened before, and what is returned has the lens as ``lens`` after the block. Of a
    ``model.generate`` the prompt's pass is read. A bare nnsight handle has no tokenizer, so
    ``tokens`` are ids there.

    Raises:
        ParameterError: if the span, a layer, a token or ``k`` does not fit.
        ModelLoadError: if it is not known how the model makes logits of its residual stream.
        InterventionError: if the arguments are those of the other form: none of ``model``,
            ``prompt`` and ``method`` in a trace, the first two outside.

    >>> cl.logit_lens(model, prompt).margin.shape
    torch.Size([12, 1])
    """
    if model is None and prompt is None and method is None:

        def make(root: Any, found: PreTrainedModel) -> tuple[list[Session], Lensing]:
            reading = LayerReading(found, getattr(root, "words", None), span, layers, tokens, k)
            return [reading], Lensing(reading)

        return join_trace("logit_lens", "cl.logit_lens(model, prompt)", make)
    refuse_in_trace(
        "logit_lens(model, prompt)", ", or logit_lens() in it, after cl.intervene(method)"
    )
    if model is None or prompt is None:
        raise InterventionError(
            "logit_lens was called outside a trace without a model and a prompt. Pass both."
        )
    found, prompt = transformers_model(model), as_prompt(model, prompt)
    prompt.spans.places(span)  # a span that is not there is said before the model runs
    with undisturbed(), intervening(model, method):
        reading = LayerReading(found, getattr(model, "words", None), span, layers, tokens, k)
        with running(found, [reading]), readable(prompt):
            reading.check(found(**prompt.inputs, logits_to_keep=1, use_cache=False).logits)
        return _lens_of(reading, prompt)


def _lens_of(reading: LayerReading, prompt: Prompt | None = None) -> LogitLens:
    """Return what was read.

    Raises:
        InterventionError: if no prompt was read yet.
    """
    step = reading.step
    if step is None or reading.found.keys() != set(reading.numbers):
        raise InterventionError(
            "what the layers say is not known yet: the model has not read a prompt. Read it "
            "after the block that runs the model."
        )
    assert step.ids is not None
    positions = step.spans.places(reading.span)
    name = reading.span if isinstance(reading.span, str) else "chosen positions"
    if torch.equal(positions.flatten(), step.spans.image.nonzero()[:, 1]):
        name = "image"
    parts = zip(*(reading.found[layer] for layer in reading.numbers), strict=True)
    top, probabilities, logits, margin = (stack_layers(list(one), dim=1) for one in parts)
    batched = len(top) > 1 if prompt is None else prompt.batched
    if not batched:
        top, probabilities, logits, margin = top[0], probabilities[0], logits[0], margin[0]
        positions = positions[0]
    return LogitLens(
        top=top,
        probabilities=probabilities,
        margin=margin if all(reading.answers) else None,
        logits=logits if reading.ids else None,
        tokens=reading.names,
        positions=positions,
        layers=reading.numbers,
        span=name,
        batched=batched,
        ids=step.ids,
        visual=read_tokens(reading.model, step.spans, prompt),
        tokenizer=reading.words,
    )
