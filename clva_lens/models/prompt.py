"""Images and questions become a prompt: model inputs, token spans, and the image's grid."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import ClvaLensError, PromptError
from clva_lens.ground.registry import did_you_mean
from clva_lens.models.family import find_family, transformers_model
from clva_lens.models.pictures import ImageLike
from clva_lens.models.pieces import Given, Piece, Places
from clva_lens.models.visual_tokens import VisualTokens, visual_tokens

Asked = (
    Mapping[str, Any]
    | tuple[ImageLike | Sequence[ImageLike], str | Sequence[str]]
    | tuple[ImageLike | Sequence[ImageLike], str | Sequence[str], str | None]
)
"""What every function takes as a prompt: a ``Prompt`` too is a mapping. See ``as_prompt``."""


@dataclass(frozen=True, eq=False, repr=False)
class Prompt(Mapping[str, Tensor]):
    """What a model is run on. It is a mapping of the model's inputs, so ``**prompt`` unpacks it.

    ``sites`` has the image tokens of each attention site, the family's own first. ``batched`` is
    whether lists were given. ``images``, ``questions`` and ``system`` are what it was made from;
    the first two are empty where a processor's output was made into a prompt (``as_prompt``). What
    is run is ``inputs`` alone.
    """

    inputs: dict[str, Tensor]
    sites: dict[str, VisualTokens]
    batched: bool
    images: tuple[Image.Image, ...]
    questions: tuple[str, ...]
    system: str | None

    def __getitem__(self, name: str) -> Tensor:
        """Return one of the model's inputs."""
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the model's inputs."""
        return iter(self.inputs)

    def __len__(self) -> int:
        """Return the number of model inputs."""
        return len(self.inputs)

    @property
    def reader(self) -> PreTrainedModel | None:
        """The model that has read this prompt's beginning; None where it is to be read whole."""
        return None

    @property
    def spans(self) -> TokenSpans:
        """Which positions of the token sequence are what."""
        return self.spans_at("decoder")

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the image tokens at the family's own site; None if on no grid."""
        grid = next(iter(self.sites.values())).grid
        return None if isinstance(grid, str) else grid

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Where the image tokens at the family's own site lie on the photos, measured when asked.

        One for each photo, or for each of its tiles and its thumbnail; none where that is unknown
        (``pieces_at`` says why). The rows of a batch share them.
        """
        pieces = next(iter(self.sites.values())).pieces
        return () if isinstance(pieces, str) else pieces

    @property
    def photos(self) -> tuple[Image.Image, ...]:
        """The photos that ``Piece.picture`` numbers: those of one row, earlier turns' first."""
        places = next(iter(self.sites.values())).places
        return self.images[:1] if places is None else places.given.photos[0]

    @property
    def answer_start(self) -> int:
        """Where the answer begins in the ids that the model's ``generate`` returns."""
        rows = self.inputs.get("decoder_input_ids", self.inputs["input_ids"])
        return rows.shape[1]

    def spans_at(self, site: str) -> TokenSpans:
        """Return which keys of a site are what.

        Raises:
            PromptError: if there is no such site.
        """
        return self.tokens_at(site).spans

    def grid_at(self, site: str) -> tuple[int, int]:
        """Return (rows, columns) of a site's image tokens.

        Raises:
            PromptError: if there is no such site, or its image tokens lie on no grid.
        """
        return self.tokens_at(site).shape

    def piece_at(self, site: str, part: str = "tiles", picture: int | None = None) -> Piece:
        """Return the piece that ``on_grid`` makes a map over: its tiles, grid and box.

        Raises:
            PromptError: if there is no such site, or it is unknown where its image tokens lie.
            ParameterError: if there is no such part or picture.
        """
        return self.tokens_at(site).piece(part, picture)

    def pieces_at(self, site: str) -> tuple[Piece, ...]:
        """Return where a site's image tokens lie on the photos.

        Raises:
            PromptError: if there is no such site, or it is unknown where they lie.
        """
        pieces = self.tokens_at(site).pieces
        if isinstance(pieces, str):
            raise PromptError(pieces)
        return pieces

    def tokens_at(self, site: str) -> VisualTokens:
        """Return the image tokens of a site.

        Raises:
            PromptError: if there is no such site.
        """
        if site not in self.sites:
            raise PromptError(
                f"this model has no attention site {site!r}; it has {', '.join(self.sites)}. Pass "
                "one of these."
            )
        return self.sites[site]

    def site_of(self, count: int) -> str | None:
        """Return the site that has so many image tokens; None if none has."""
        sites = self.sites.items()
        return next((site for site, one in sites if one.spans.visual_count == count), None)

    def on_grid(
        self, values: Tensor, part: str | None = None, picture: int | None = None
    ) -> Tensor:
        """Return values over the image tokens as a map that can be drawn on the picture.

        The last axis of ``values`` becomes (rows, columns). Where the picture was cut, ``part``
        says of which pieces: "tiles" (the default) as one mosaic, or the "thumbnail"; ``piece_at``
        has the box of the photo that they cover. Of several pictures, ``picture`` says which.

        Raises:
            PromptError: if it is unknown where the image tokens lie, or their number is another.
            ParameterError: if there is no such part or picture.
        """
        count, reasons, grids = values.shape[-1], [], []
        for site, tokens in self.sites.items():
            if isinstance(tokens.grid, str):
                if tokens.spans.visual_count == count:
                    if not isinstance(tokens.pieces, str):
                        return tokens.on_grid(values, part, picture)
                    reasons.append(tokens.reason)
                grids.append(f"there are {tokens.spans.visual_count} tokens at the {site}")
            elif count == tokens.grid[0] * tokens.grid[1]:
                return tokens.on_grid(values, part, picture)
            else:
                grids.append(f"the grid is {tokens.grid[0]} × {tokens.grid[1]} at the {site}")
        if reasons:
            raise PromptError(reasons[0])
        raise PromptError(
            f"the map has {count} values, but {' or '.join(grids)}. Pass a map over this prompt's "
            "image tokens."
        )

    def row(self, index: int) -> "Prompt":
        """Return one prompt of a batch as it is, padding included.

        Raises:
            PromptError: if there is no such row, or an input has another first axis than the batch,
                so that its rows are not known.
        """
        batch = len(self.spans.real)
        if not 0 <= index < batch:
            raise PromptError(f"there is no prompt {index} in a batch of {batch}. Pass 0 or more.")
        if batch == 1:
            return replace(self, batched=False)
        shared = {name: len(one) for name, one in self.inputs.items() if len(one) != batch}
        if shared:
            raise PromptError(
                f"the batch has {batch} prompts, but {_listed(shared)} rows, so it cannot be taken "
                "apart. Pass the prompts one by one: [model.prompt(image, question), ...]."
            )
        one = slice(index, index + 1)
        return replace(
            self,
            inputs={name: rows[one] for name, rows in self.inputs.items()},
            sites={name: found.row(index) for name, found in self.sites.items()},
            batched=False,
            images=self.images[one],
            questions=self.questions[one],
        )

    def __repr__(self) -> str:
        """Return the questions and the sizes of the spans."""
        batch, length = self.spans.image.shape
        several = f"{batch} questions" if self.questions else "a processor's output"
        first = self.questions[0] if len(self.questions) == 1 else several
        grid = self.sites["decoder"].grid
        lie = "no grid" if isinstance(grid, str) else f"{grid[0]} × {grid[1]} grid"
        counts = [
            int(span[0].sum()) for span in (self.spans.system, self.spans.image, self.spans.text)
        ]
        return (
            f"Prompt({first!r}, {length} tokens: {counts[0]} system, {counts[1]} image ({lie}), "
            f"{counts[2]} text)"
        )


def _listed(rows: Mapping[str, int]) -> str:
    return " and ".join(f"{name} has {count}" for name, count in rows.items())


def read_tokens(model: PreTrainedModel, spans: TokenSpans, prompt: Prompt | None) -> VisualTokens:
    """Return the image tokens that a run's decoder read, and what its prompt knows of them."""
    if prompt is None:
        return visual_tokens(model, "decoder", spans)
    return prompt.tokens_at("decoder")._replace(spans=spans)


def prompt_of(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    given: Given | None = None,
    **made_from: Any,
) -> Prompt:
    """Return a prompt of a model's inputs, on the model's device; floats in the model's dtype.

    ``given`` is what a processor made them of. ``made_from`` are the other fields of ``Prompt``.

    Raises:
        PromptError: if it is longer than the model's positions.
        SpanError: if it has no picture.
    """
    placed = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    check_length(model, placed)
    family = find_family(model)
    sites = {
        site.name: visual_tokens(
            model,
            site.name,
            family.spans(model, site.name, placed),
            placed,
            None if given is None else Places(model, given, site.name),
        )
        for site in family.sites(model)
    }
    return Prompt(placed, sites, **made_from)


def as_prompt(model: Any, asked: Asked, *, continued: bool = False) -> Prompt:
    """Return what a model is asked as a prompt: the gate of every function that runs one.

    ``asked`` is a ``Prompt``, which stays as it is; a processor's output (a mapping with
    ``input_ids``), whose inputs are run as they are; or (image, question), with the system message
    as a third item if there is one. ``model`` is a ``LensModel``; a transformers model or an
    nnsight handle of one makes no prompt of a picture, because it has no processor.
    ``continued``: what continues a prefix (``lens/prefix.py``) will do.

    Raises:
        PromptError: if it is none of these, continues a prefix where it must not, or one of another
            model, is longer than the model's positions, or there is no processor to make it.
        ModelLoadError: if no family knows the model.
    """
    if isinstance(asked, Prompt):
        found = transformers_model(model)
        if asked.reader is not None and not continued:
            raise PromptError(
                "this prompt continues a picture that was read before, but here a whole one is "
                "needed. Pass model.prompt(image, question)."
            )
        if asked.reader not in (None, found):
            raise PromptError(
                "this prompt continues what another model has read. Read the picture with the one "
                "that is asked: cl.read(model, image)."
            )
        check_length(found, asked.inputs)
        return asked
    if isinstance(asked, Mapping):
        found = transformers_model(model)
        inputs = model_inputs(found, asked)
        if not any(one.is_floating_point() for one in inputs.values()):
            raise PromptError(
                f"none of {', '.join(inputs)} is a picture (in floating point), so the model would "
                "read its places as words. Pass pixel_values as the processor made them."
            )
        batched = len(inputs["input_ids"]) > 1
        return prompt_of(found, inputs, batched=batched, images=(), questions=(), system=None)
    if isinstance(asked, tuple) and len(asked) in (2, 3):
        ask = getattr(model, "prompt", None)
        if ask is None:
            raise PromptError(
                f"a picture and a question were passed with a {type(model).__name__}, which has no "
                "processor to make a prompt of them. Pass a processor's output, or the model that "
                "cl.load() returned."
            )
        return ask(asked[0], asked[1], system=asked[2] if len(asked) == 3 else None)
    raise PromptError(
        f"a prompt must be a Prompt, a processor's output or an (image, question) pair, but got "
        f"{type(asked).__name__}. Pass model.prompt(image, question)."
    )


def model_inputs(model: PreTrainedModel, asked: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a processor's output; labels, which decide no answer, are left out.

    Raises:
        PromptError: if the token ids are no tensor [batch, sequence], another input is no tensor
            or none that the model takes, one that it needs is missing, the mask is another than 0
            and 1, or a pixel not finite.
    """
    ids, mask = asked.get("input_ids"), asked.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        found = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise PromptError(
            f"a processor's output must have input_ids as a tensor [batch, sequence], but they are "
            f"{found}. Call the processor with return_tensors='pt'."
        )
    taken = inspect.signature(type(model).forward).parameters
    for name, one in list(taken.items())[1:]:  # without self
        named = one.kind is one.POSITIONAL_OR_KEYWORD
        if named and one.default is one.empty and asked.get(name) is None:
            raise PromptError(
                f"the processor's output has no '{name}', which the model needs. Pass what the "
                "model's own processor made."
            )
    for name, value in asked.items():
        if value is not None and name not in taken:
            raise PromptError(
                f"the model takes no input '{name}'.{did_you_mean(name, taken)} Take it out of the "
                "processor's output."
            )
        if not isinstance(value, Tensor | None):
            raise PromptError(
                f"'{name}' is a {type(value).__name__}, but the model's inputs must be tensors. "
                "Call the processor with return_tensors='pt', for one prompt at a time if its "
                "pictures differ in size."
            )
        if value is not None and value.is_floating_point() and not value.isfinite().all():
            raise PromptError(f"'{name}' has values that are NaN or infinite. Replace them.")
    if mask is not None and (mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all()):
        raise PromptError(
            f"the attention_mask must be {list(ids.shape)}, as input_ids, of 0 and 1, but is "
            f"{list(mask.shape)} or has other values. Pass the processor's own."
        )
    return {name: one for name, one in asked.items() if one is not None and name != "labels"}


@contextmanager
def readable(prompt: Prompt) -> Iterator[None]:
    """Raise what a model says of inputs that were made elsewhere as a PromptError."""
    try:
        yield
    except (ClvaLensError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if prompt.questions or "DefaultCPUAllocator" in str(error):  # out of memory
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise PromptError(
            f"the model cannot run this processor's output: {said[:300]} Pass what the model's own "
            "processor made, with as many pictures as its text has places for."
        ) from error


def check_length(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Raise PromptError if a prompt, without its padding, has more tokens than the model positions.

    Models without a limit, such as T5, take any.
    """
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    length = ids.shape[1] if mask is None else int(mask.sum(dim=-1).max())
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise PromptError(
            f"the prompt has {length} tokens, but the model has {longest} positions. Shorten it."
        )
