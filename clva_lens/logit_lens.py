"""The logit lens: what each layer's residual stream would answer, at any span of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clva_lens.errors import ParameterError
from clva_lens.figures import Drawing, patch_maps
from clva_lens.figures import logit_lens as draw_lens
from clva_lens.figures.base import evenly
from clva_lens.figures.patch_maps import MOST_MAPS
from clva_lens.generate import answer_tokens
from clva_lens.intervene import refuse_in_trace, transformers_model
from clva_lens.methods.base import Method, shape_of
from clva_lens.models.family import find_family
from clva_lens.models.lens import LensModel
from clva_lens.models.prompt import Prompt
from clva_lens.readout import CacheModel, read_out
from clva_lens.trace import chosen_layers

# Logits are formed for at most this many entries at once (64 MiB of float32).
LOGITS_AT_ONCE = 2**24
MARGIN = "logit(yes) − logit(no)"
_MOST_POSITIONS = 24


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
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
    prompt: Prompt
    tokenizer: Any

    def on_grid(
        self, values: Float[Tensor, "*axes visual"] | None = None
    ) -> Float[Tensor, "*axes row column"]:
        """Return values over the image tokens (None: the margin) on the patch grid.

        Raises:
            ParameterError: if the span is not the image, or there is no margin.
            PromptError: if the image tokens lie on no grid.
        """
        if self.span != "image":
            raise ParameterError(
                f"the span is '{self.span}', but only image tokens lie on a grid. Call "
                "logit_lens(model, prompt, span='image')."
            )
        grid = self.prompt.grid_at("decoder")
        values = self.margin if values is None else values
        if values is None:
            raise ParameterError(
                "the tokenizer has no single token for yes or no, so there is no margin. Pass "
                "tokens= to logit_lens, and on_grid(lens.logits[..., 0])."
            )
        return values.unflatten(-1, grid)

    def words(self, rank: int = 0) -> list[list[str]]:
        """Return the text of the likeliest tokens of a single prompt, by layer and position."""
        self._single()
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
        if self.span == "image" and not isinstance(self.prompt.sites["decoder"].grid, str):
            chosen = evenly(len(self.layers), MOST_MAPS)
            maps = self.on_grid(values[chosen]).cpu().numpy()
            numbered = [self.layers[row] for row in chosen]
            return patch_maps(maps, layers=numbered, label=label, sums=False)
        last = slice(-_MOST_POSITIONS, None)
        places = self.positions[last]
        ids = self.prompt["input_ids"][0][places].tolist()
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
        inputs = {name: value[item : item + 1] for name, value in self.prompt.inputs.items()}
        prompt = replace(self.prompt, inputs=inputs, batched=False)
        return replace(self, **one, batched=False, prompt=prompt)

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows; a batch has none."""
        return None if self.batched else self.draw()._repr_png_()

    def __repr__(self) -> str:
        """Return the sizes, and the last layer's answer at the last position."""
        samples = f"{len(self.top)} samples × " if self.batched else ""
        size = f"{samples}{len(self.layers)} layers × {self.positions.shape[-1]} positions"
        one = self[0] if self.batched else self
        word = self.tokenizer.decode([int(one.top[-1, -1, 0])])
        return (
            f"LogitLens({size} of the span '{self.span}'; layer {self.layers[-1]} ends with "
            f"{word!r}, p = {float(one.probabilities[-1, -1, 0]):.2f})"
        )


def lens_logits(
    model: Any, residual: Float[Tensor, "*places d_model"]
) -> Float[Tensor, "*places vocabulary"]:
    """Return the logits of a residual stream through the model's own final norm and unembedding.

    For use on saved activations, or inside ``with model.trace(prompt)`` on a layer's output.
    ``model`` is a transformers model or an nnsight handle of one.

    Raises:
        ModelLoadError: if nobody wrote down where the model's norm and unembedding are.
    """
    found = transformers_model(model)
    return read_out(find_family(found).activations(found).readout, residual)


@torch.no_grad()
def logit_lens(
    model: LensModel,
    prompt: Prompt,
    span: str | Bool[Tensor, "*batch sequence"] | Sequence[int] = "last",
    layers: Sequence[int] | str = "all",
    method: Method | None = None,
    *,
    tokens: str | int | Sequence[str | int] | None = None,
    k: int = 5,
) -> LogitLens:
    """Return what the stream after each decoder layer says at a span, from one forward pass.

    ``span`` is "last" (the prompt's last position), "image", "text" (after the image), "system",
    "all", a mask, or positions. ``tokens`` are texts that are one token, or ids, whose logits are
    kept; beside them the ``k`` likeliest tokens and the yes−no margin are. Logits are formed layer
    by layer. Interventions that are open hold, and ``method`` beside them.

    Raises:
        ParameterError: if the span, a layer, a token or ``k`` does not fit.
        ModelLoadError: if nobody wrote the names of this model down.
        InterventionError: inside a trace, whose layers' outputs ``lens_logits`` reads in the block.
    """
    refuse_in_trace("logit_lens", ", or logit_lens.lens_logits(model, layer.output) in it")
    found = model.hf_model
    numbers = chosen_layers(layers, shape_of(found, "decoder"))
    positions = prompt.spans.places(span)
    name = span if isinstance(span, str) else "chosen positions"
    if torch.equal(positions.flatten(), prompt.spans.image.nonzero()[:, 1]):
        name = "image"
    readout = find_family(found).activations(found).readout
    standing = CacheModel(readout, model.words, found.config.get_text_config(), model.name)
    size = standing.cfg.d_vocab
    if not 1 <= k <= size:
        raise ParameterError(f"k must be in 1 to {size} (the vocabulary), but is {k}. Pass k=5.")
    wanted = [] if tokens is None else [tokens] if isinstance(tokens, str | int) else list(tokens)
    ids = [standing.to_single_token(one) if isinstance(one, str) else one for one in wanted]
    if any(not 0 <= one < size for one in ids):
        raise ParameterError(f"tokens are {ids}, but ids are 0 to {size - 1}. Pass ids like that.")
    names = [f"blocks.{layer}.hook_resid_post" for layer in numbers]
    _, cache = model.run_with_cache(prompt, names, method=method)
    yes, no = answer_tokens(model.words)
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    read = [_read(readout, cache[one][rows, positions], k, ids, yes, no) for one in names]
    top, probabilities, logits, margin = (
        torch.stack(one, dim=1) for one in zip(*read, strict=True)
    )
    if not prompt.batched:
        top, probabilities, logits, margin = top[0], probabilities[0], logits[0], margin[0]
        positions = positions[0]
    return LogitLens(
        top,
        probabilities,
        margin if yes and no else None,
        logits if ids else None,
        tuple(one if isinstance(one, str) else model.words.decode([one]) for one in wanted),
        positions,
        numbers,
        name,
        prompt.batched,
        prompt,
        model.words,
    )


def _read(
    readout: Any,
    residual: Float[Tensor, "batch position d_model"],
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
            margin = logits[:, yes].amax(dim=1) - logits[:, no].amax(dim=1)
        pieces.append((top, probabilities, logits[:, ids], margin))
    whole = [torch.cat(part) for part in zip(*pieces, strict=True)]
    top, probabilities, chosen, margin = (
        part.unflatten(0, tuple(residual.shape[:2])) for part in whole
    )
    return top, probabilities, chosen, margin
