"""The axes that shapes are written in, and the spans of a prompt's tokens.

===========  ==============================================================================
axis         meaning
===========  ==============================================================================
layer        decoder layer (or cross-attention layer of a Q-Former), 0-based
batch        sample of the batch (times beams, while beams are alive)
head         attention (query) head, 0-based
query        row of a pattern: the position that looks
key          column of a pattern: the position that is looked at
text         those query rows that are text after the image
visual       those keys that are image tokens, in the order of the sequence
sequence     position in the prompt, padding included
vocabulary   entry of the output logits
===========  ==============================================================================

Patterns are ``[layer, batch, head, query, key]``; an axis that is not there is left out, the order
of the others stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

from clva_lens.ground.errors import ParameterError, SpanError


@dataclass(frozen=True)
class TokenSpans:
    """Which positions are what: four disjoint masks that cover everything but padding.

    ``system``: before the image, and between images (rows that do not see every image token).
    ``image``: image tokens. ``text``: prompt tokens after the last image token, up to and
    including the assistant cue. ``generated``: tokens the model wrote.

    >>> ids = torch.tensor([[1, 9, 9, 5, 6]])
    >>> cl.TokenSpans.from_ids(ids, image_token_id=9, attention_mask=torch.ones_like(ids)).image
    tensor([[False,  True,  True, False, False]])
    """

    system: Bool[Tensor, "batch sequence"]
    image: Bool[Tensor, "batch sequence"]
    text: Bool[Tensor, "batch sequence"]
    generated: Bool[Tensor, "batch sequence"]

    @classmethod
    def from_ids(
        cls,
        ids: Int[Tensor, "batch sequence"],
        image_token_id: int,
        attention_mask: Int[Tensor, "batch sequence"] | None = None,
        prompt_length: int | None = None,
    ) -> "TokenSpans":
        """Return the spans of token ``ids``; positions from ``prompt_length`` on are generated.

        Padding (where ``attention_mask`` is 0) belongs to no span. A sequence without image tokens
        is all ``system`` (and ``generated``): it has no text *after the image*.
        """
        real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != ids.shape:
                raise SpanError(
                    f"attention_mask is {tuple(attention_mask.shape)} but ids are "
                    f"{tuple(ids.shape)}. Pass the mask that the processor returned."
                )
            real = attention_mask.bool()
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        length = ids.shape[1] if prompt_length is None else prompt_length
        in_prompt = position < length
        image = (ids == image_token_id) & real & in_prompt
        last_image = last_true(image)[:, None]
        text = real & ~image & in_prompt & (position > last_image) & (last_image >= 0)
        system = real & in_prompt & ~image & ~text
        return cls(system=system, image=image, text=text, generated=real & ~in_prompt)

    @property
    def real(self) -> Bool[Tensor, "batch sequence"]:
        """Positions that are not padding."""
        return self.system | self.image | self.text | self.generated

    @property
    def visual_count(self) -> int:
        """Number of image tokens of each sample.

        Raises:
            SpanError: if a sample has none, or the samples differ.
        """
        counts = self.image.sum(dim=1).tolist()
        for item, count in enumerate(counts):
            if count == 0:
                raise SpanError(
                    f"item {item} of the batch has 0 image tokens, but at least 1 is needed. "
                    "Pass the image to model.prompt(image, question), or drop the item."
                )
        if len(set(counts)) > 1:
            raise SpanError(
                f"the samples of the batch have different numbers of image tokens ({counts}), so "
                "their maps cannot be stacked. Run them one at a time (batch_size=1)."
            )
        return counts[0]

    def visual_index(self) -> Int[Tensor, "batch visual"]:
        """Return the positions of each sample's image tokens, in the order of the sequence."""
        count = self.visual_count
        return self.image.nonzero()[:, 1].reshape(-1, count)

    def places(
        self, span: str | Bool[Tensor, "*batch sequence"] | Sequence[int]
    ) -> Int[Tensor, "batch position"]:
        """Return the positions of a span in each sample, in the order of the sequence.

        ``span`` is "last" (the last one that is no padding), "system", "image", "text", "all" (but
        padding), a mask, or positions, 0-based and padding included.

        Raises:
            ParameterError: if there is no such span, it is empty, or its size differs.
        """
        real = self.real
        if isinstance(span, str):
            if span == "last":
                return last_true(real)[:, None]
            if span not in ("system", "image", "text", "all"):
                raise ParameterError(
                    f"span must be 'last', 'system', 'image', 'text', 'all', a mask or positions, "
                    f"but is {span!r}. Pass one of these."
                )
            mask = real if span == "all" else getattr(self, span)
        elif isinstance(span, Tensor) and span.dtype == torch.bool:
            if span.shape[-1:] != real.shape[-1:] or span.ndim > 2:
                raise ParameterError(
                    f"the span is a mask of shape {tuple(span.shape)}, but the prompt has "
                    f"{tuple(real.shape)} positions. Pass a bool mask like that."
                )
            mask = span.to(real.device).expand_as(real) & real
        else:
            chosen = torch.as_tensor(span, device=real.device)
            if chosen.ndim != 1 or chosen.is_floating_point() or not len(chosen):
                raise ParameterError(
                    f"the span is {span!r}, but positions are a list of integers, or a bool mask. "
                    "Pass one of these."
                )
            if int(chosen.min()) < 0 or int(chosen.max()) >= real.shape[1]:
                raise ParameterError(
                    f"the span names positions {int(chosen.min())} to {int(chosen.max())}, but the "
                    f"prompt has 0 to {real.shape[1] - 1}. Pass positions like that."
                )
            return chosen.long().expand(len(real), -1)
        counts = set(mask.sum(dim=1).tolist())
        if len(counts) != 1 or counts == {0}:
            raise ParameterError(
                f"the span has {sorted(counts)} positions in the samples, but equally many, at "
                "least 1, are needed. Run the prompts one at a time, or pass another span."
            )
        return mask.nonzero()[:, 1].reshape(len(mask), -1)

    def to(self, device: torch.device | str) -> "TokenSpans":
        """Return the spans on another device, moved as one piece."""
        spans = (self.system, self.image, self.text, self.generated)
        return TokenSpans(*torch.stack(spans).to(device).unbind())

    def each(self, change: Callable[[Tensor], Tensor]) -> "TokenSpans":
        """Return the spans with every mask changed."""
        parts = (self.system, self.image, self.text, self.generated)
        return TokenSpans(*(change(part) for part in parts))

    def first(self, length: int) -> "TokenSpans":
        """Return the spans of the first ``length`` positions."""
        return TokenSpans(
            self.system[:, :length],
            self.image[:, :length],
            self.text[:, :length],
            self.generated[:, :length],
        )

    def with_room(self, more: int) -> "TokenSpans":
        """Return spans with this many more positions, all of them generated."""
        return self.each(lambda span: functional.pad(span, (0, more), value=span is self.generated))

    def row(self, index: int) -> "TokenSpans":
        """Return the spans of one sample, as a batch of one."""
        spans = (self.system, self.image, self.text, self.generated)
        return TokenSpans(*(span[index : index + 1] for span in spans))


def last_true(mask: Bool[Tensor, "batch sequence"]) -> Int[Tensor, " batch"]:
    """Return the index of each sample's last True, −1 if there is none."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(dim=1)
