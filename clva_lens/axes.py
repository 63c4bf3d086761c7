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

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clva_lens.errors import SpanError


@dataclass(frozen=True)
class TokenSpans:
    """Which positions are what: four disjoint masks that cover everything but padding.

    ``system``: before the image, and between images (rows that do not see every image token).
    ``image``: image tokens. ``text``: prompt tokens after the last image token, up to and
    including the assistant cue. ``generated``: tokens the model wrote.
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
        last_image = torch.where(image, position, -1).amax(dim=1, keepdim=True)
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
