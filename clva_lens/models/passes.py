"""Which rows and keys of a forward pass are what: watched on the model's inputs during a run.

Attention functions see queries and keys only. What they stand for (system, image, text, generated;
prompt or decoding step) is worked out here, before each pass, by a hook that a run puts on the
module where the pass begins and takes away when it ends.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import InterventionError
from clva_lens.models.belonging import hook_before
from clva_lens.models.context import drafting
from clva_lens.models.kv_cache import cache_of
from clva_lens.models.step import Step

NO_IMAGE = (
    "the prompt has no image tokens, so there is no visual attention to read or edit. Pass an "
    "image: model.prompt(image, question)."
)


class Passes(ABC):
    """Watches one site of one model during a run; ``step`` is the pass that is running."""

    def __init__(
        self, entry: nn.Module, image_token_id: int, embedding: nn.Module | None = None
    ) -> None:
        """Name the module whose call begins a pass, and one that token ids go through."""
        self.entry = entry
        self.image_token_id, self.embedding = image_token_id, embedding
        self.step: Step | None = None

    def hooks(self) -> list[RemovableHandle]:
        """Start watching; the handles stop it."""
        handles = [hook_before(self.entry, self._before, first=True)]
        if self.embedding is not None:
            handles.append(hook_before(self.embedding, self._embed, first=True))
        return handles

    def _embed(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = next(iter((*args, *kwargs.values())), None)
        # Transformers also embeds the image token alone, to compare embeddings with it.
        if isinstance(ids, Tensor) and ids.ndim == 2 and not isinstance(ids, FakeTensor):
            self.embed(ids)

    def end(self) -> None:
        """Forget the pass: the run is over."""
        self.step = None

    @abstractmethod
    def embed(self, ids: Int[Tensor, "batch sequence"]) -> None:
        """Take note of token ids that are embedded."""

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # nnsight's scan() leaves the inputs real, but whatever is computed from them is fake.
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor):
                if isinstance(given[:0], FakeTensor):
                    self.step = None
                    return
                break
        self.watch(args, kwargs)

    @abstractmethod
    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Work out ``step`` from the arguments of the entry module.

        Raises:
            InterventionError: if it cannot be known from them.
        """


class TokenPasses(Passes):
    """Passes of a language model, which reads a prompt and then what it generates.

    Image tokens are known from token ids. Where a model hands embeddings to its language model,
    ``embedding`` is the module that made them, and the ids are those that it saw last.
    """

    def __init__(
        self, entry: nn.Module, image_token_id: int, embedding: nn.Module | None = None
    ) -> None:
        """Name the module that reads, its image token, and what embeds the ids if others do."""
        super().__init__(entry, image_token_id, embedding)
        self._embedded: Tensor | None = None
        self._prompt: Int[Tensor, "batch prompt_row"] | None = None

    def embed(self, ids: Int[Tensor, "batch sequence"]) -> None:
        """Remember the ids that are embedded."""
        self._embedded = ids

    def embedded_ids(self, batch: int, length: int | None) -> Tensor:
        """Return the token ids behind the embeddings of a prompt, one row a beam."""
        ids, self._embedded = self._embedded, None
        fits = ids is not None and batch % len(ids) == 0 and length in (None, ids.shape[1])
        if not fits:
            raise InterventionError(
                "the model was called with inputs_embeds only, so the image tokens cannot be "
                "found. Pass input_ids (and pixel_values) instead."
            )
        assert ids is not None
        return ids.repeat_interleave(batch // len(ids), dim=0)

    def is_rerun(self, rows: Tensor, offset: int, kwargs: dict[str, Any]) -> bool:
        """Whether an uncached pass reads the known prompt again, and more."""
        known = self._prompt
        return (
            offset == 0
            and kwargs.get("use_cache") is False
            and known is not None
            and known.shape[1] < rows.shape[1]
            and known.shape[0] == rows.shape[0]
            and torch.equal(known, rows[:, : known.shape[1]])
        )

    def begin(
        self, rows: Tensor, ids: Tensor, mask: Tensor | None, length: int | None = None
    ) -> TokenSpans:
        """Take a new prompt; return the spans of its tokens, on the CPU.

        The ids are fetched once, so that what is asked of them does not wait for a GPU each time.
        From ``length`` on they are generated.
        """
        padding = padding_of(mask, ids)
        padding = None if padding is None else padding.cpu()
        spans = TokenSpans.from_ids(ids.cpu(), self.image_token_id, padding, length)
        if not spans.image.any():
            raise InterventionError(NO_IMAGE)
        self._prompt = rows[:, :length]
        return spans

    def follow(self, rows: Int[Tensor, "batch row"]) -> None:
        """Take another turn's rows: an uncached pass does not begin with the first prompt."""
        self._prompt = None

    def next(self, rows: Tensor, offset: int) -> Step:
        """Return the step before this pass, which reads generated tokens."""
        known = self.step
        if known is None or known.spans.image.shape[0] != rows.shape[0]:
            raise InterventionError(
                "the first pass under this run already had a filled key-value cache (or another "
                "batch), so its image tokens are unknown. Start the run before the prompt is read."
            )
        return known


class EncoderDecoderPasses(TokenPasses):
    """Cross-attention of a decoder to an encoder's sequence, which holds the image tokens.

    The rows are the decoder's: its start token is the prompt's only row.
    """

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin with an encoded prompt, or go on to the next rows of the decoder."""
        rows = kwargs.get("decoder_input_ids")
        if rows is None:
            raise InterventionError(
                "the encoder-decoder model was called without decoder_input_ids, so the decoder's "
                "rows are unknown. Pass them: model.prompt(image, question) has them."
            )
        offset = cached_length(kwargs)
        if drafting() is not None:
            raise InterventionError(
                "assisted decoding has several tokens of an encoder-decoder's answer checked in "
                "one pass, which is not followed. Generate without assistant_model and "
                "prompt_lookup_num_tokens."
            )
        if offset == 0 and not self.is_rerun(rows, offset, kwargs):
            spans = self.begin(
                rows, self.embedded_ids(len(rows), None), kwargs.get("attention_mask")
            )
            text = torch.ones_like(rows, dtype=torch.bool)
            visual = spans.visual_index()
            step = Step(
                number=0,
                offset=0,
                text_rows=text,
                spans=spans,
                visual=visual,
                causal=False,
                ordered=True,
                ids=rows,
            )
            self.step = step.to(rows.device)
            return
        known = self.next(rows, offset)
        self.step = known.after(offset, known.spans, rows)


class QueryPasses(Passes):
    """Cross-attention of learned queries to a picture: every call reads a new prompt.

    The first ``lead`` keys lie on no patch (the CLS token); they are ``system``. ``patches`` is the
    number of the others.
    """

    def __init__(
        self,
        entry: nn.Module,
        image_token_id: int,
        embedding: nn.Module,
        *,
        lead: int,
        patches: int,
    ) -> None:
        """Name the Q-Former and the embedding of the language model's prompt, which follows it."""
        super().__init__(entry, image_token_id, embedding)
        self.lead, self.patches = lead, patches
        self._unplaced = False

    def embed(self, ids: Int[Tensor, "batch sequence"]) -> None:
        """Check that the prompt has a place for what the Q-Former made of the picture."""
        unplaced, self._unplaced = self._unplaced, False
        if unplaced and not (ids == self.image_token_id).any():
            raise InterventionError(NO_IMAGE)

    def watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin with the pictures of this call."""
        queries, pictures = kwargs.get("query_embeds"), kwargs.get("encoder_hidden_states")
        if queries is None or pictures is None:
            raise InterventionError(
                "the Q-Former was called without queries or without a picture, so there is no "
                "visual attention to read or edit. Pass pixel_values."
            )
        batch, keys = pictures.shape[:2]
        if keys != self.lead + self.patches:
            raise InterventionError(
                f"the picture came as {keys - self.lead} patches, but the vision tower's grid has "
                f"{self.patches}. Pass pixel_values of the size that the image processor makes."
            )
        self._unplaced = True
        spans = picture_spans(batch, keys, self.lead, pictures.device)
        rows = torch.ones(batch, queries.shape[1], dtype=torch.bool, device=pictures.device)
        self.step = Step(
            number=0,
            offset=0,
            text_rows=rows,
            spans=spans,
            visual=spans.visual_index(),
            causal=False,
            ordered=False,
            block=(self.lead, keys),
        )


def picture_spans(
    batch: int, keys: int, lead: int, device: torch.device | str = "cpu"
) -> TokenSpans:
    """Return the spans of a vision tower's output: ``lead`` tokens on no patch, then patches."""
    none = torch.zeros(batch, keys, dtype=torch.bool, device=device)
    image = none.clone()
    image[:, lead:] = True
    return TokenSpans(system=~image, image=image, text=none, generated=none)


def cached_length(kwargs: dict[str, Any]) -> int:
    """Return the number of positions in the key-value cache."""
    cache = cache_of(kwargs)
    return 0 if cache is None else int(cache.get_seq_length())


def padding_of(mask: Any, ids: Tensor) -> Tensor | None:
    """Return the prompt's padding mask, from the 4-D masks of a static cache too."""
    if isinstance(mask, dict):  # one for each kind of layer
        mask = next((one for one in mask.values() if isinstance(one, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.ndim == 2:
        return mask if isinstance(mask, Tensor) else None
    last = mask[:, 0, -1, : ids.shape[1]]
    return (last if last.dtype == torch.bool else last == 0).long()
