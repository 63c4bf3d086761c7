"""Second models: what of a text is in a picture (similarity), and where (relevance).

A ``Matcher`` is given pictures as pixels in [0, 1] and texts. ``"toy"`` compares the glyphs of the
toy world, and is for its pictures only. ``BlipMatcher`` is the model that AGLA was released with,
``ClipMatcher`` any CLIP or SigLIP, as for DLC. Both are read from safetensors when first asked.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.ground.parameters import Parameters
from clva_lens.models.family import Inputs
from clva_lens.toy.matching import Pictures, kind_maps, named_kinds

PATCHES = 24  # a side of BLIP's grid of 384 pixels


class Matcher(Parameters, ABC):
    """Knows what of a text is in a picture: a frozen dataclass, so that it can be recorded."""

    @abstractmethod
    def similarity(self, pictures: Pictures, texts: Sequence[str]) -> Float[Tensor, "batch text"]:
        """Return how well each text fits each picture, a cosine in [−1, 1]."""

    def relevance(
        self, pictures: Pictures, texts: Sequence[str]
    ) -> Float[Tensor, "batch height width"]:
        """Return how much each pixel matters to the text of its picture, >= 0.

        Raises:
            ParameterError: if the matcher knows no places.
        """
        raise ParameterError(
            f"{type(self).__name__} says what is in a picture, and not where. Pass "
            "matcher=BlipMatcher('Salesforce/blip-itm-large-coco'), for example."
        )


@dataclass(frozen=True, kw_only=True)
class ToyMatcher(Matcher):
    """The glyphs of the toy world."""

    def similarity(self, pictures: Pictures, texts: Sequence[str]) -> Float[Tensor, "batch text"]:
        """Return the mean, over the kinds that a text names, of how well their glyphs fit."""
        best = kind_maps(pictures).flatten(2).amax(dim=2)
        return torch.stack([best[:, named_kinds(text)].mean(dim=1) for text in texts], dim=1)

    def relevance(
        self, pictures: Pictures, texts: Sequence[str]
    ) -> Float[Tensor, "batch height width"]:
        """Return how well the named kinds' glyphs fit where they cover a pixel."""
        maps = kind_maps(pictures)
        rows = [one[named_kinds(text)].amax(dim=0) for one, text in zip(maps, texts, strict=True)]
        return torch.stack(rows).relu()


@cache
def _loaded(kind: str, name: str) -> tuple[Any, Any]:
    import transformers

    made = getattr(transformers, kind).from_pretrained(name, use_safetensors=True).eval()
    return made, transformers.AutoProcessor.from_pretrained(name)


def _shown(processor: Any, pictures: Pictures) -> Tensor:
    """Return pictures as a processor prepares them."""
    made = processor.image_processor(list(pictures.cpu()), do_rescale=False, return_tensors="pt")
    return made["pixel_values"]


@dataclass(frozen=True)
class BlipMatcher(Matcher):
    """BLIP's image-text matching, as AGLA was released with: its map is a GradCAM.

    Args:
        name: a folder or Hub id of a ``BlipForImageTextRetrieval``.
        layer: the text encoder's layer whose cross-attention is asked, 0-based.
    """

    name: str
    layer: int = 6

    def similarity(self, pictures: Pictures, texts: Sequence[str]) -> Float[Tensor, "batch text"]:
        """Return cosines of BLIP's projected features (its contrastive head)."""
        model, processor = _loaded("BlipForImageTextRetrieval", self.name)
        said = processor.tokenizer(list(texts), return_tensors="pt", padding=True)
        pixels = _shown(processor, pictures)
        with torch.no_grad():
            seen = model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
            read = model.text_encoder(**said, return_dict=True).last_hidden_state[:, 0]
            one = functional.normalize(model.vision_proj(seen), dim=-1)
            other = functional.normalize(model.text_proj(read), dim=-1)
        return one @ other.T

    def relevance(
        self, pictures: Pictures, texts: Sequence[str]
    ) -> Float[Tensor, "batch height width"]:
        """Return the mean over heads and words of A·relu(dL/dA), L the logit of a match."""
        model, processor = _loaded("BlipForImageTextRetrieval", self.name)
        pixels, maps = _shown(processor, pictures), []
        attention = model.text_encoder.encoder.layer[self.layer].crossattention.self
        for row, text in zip(pixels, texts, strict=True):
            kept: list[Tensor] = []

            def keep(_: Any, __: Any, out: Any, kept: list[Tensor] = kept) -> None:
                out[1].retain_grad()
                kept.append(out[1])

            said = processor.tokenizer(text, return_tensors="pt")
            handle = attention.register_forward_hook(keep)
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    found = model(**said, pixel_values=row[None].clone(), output_attentions=True)
                    (slope,) = torch.autograd.grad(found.itm_score[0, 1], kept[0])
            finally:
                handle.remove()
            weighed = (kept[0] * slope.relu()).detach()[0, :, :, 1:]
            side = round(weighed.shape[-1] ** 0.5)
            maps.append(rearrange(weighed.mean(dim=(0, 1)), "(r c) -> r c", r=side))
        grown = functional.interpolate(
            torch.stack(maps)[:, None], size=pictures.shape[2:], mode="bicubic", align_corners=False
        )
        return grown[:, 0].relu().to(pictures.device)


@dataclass(frozen=True)
class ClipMatcher(Matcher):
    """CLIP or SigLIP: cosines of a picture's and a text's features.

    Args:
        name: a folder or Hub id, as DLC's "google/siglip-so400m-patch14-384".
    """

    name: str

    def similarity(self, pictures: Pictures, texts: Sequence[str]) -> Float[Tensor, "batch text"]:
        """Return the cosines."""
        model, processor = _loaded("AutoModel", self.name)
        pad = "max_length" if "siglip" in type(model).__name__.lower() else True
        said = processor.tokenizer(list(texts), return_tensors="pt", padding=pad, truncation=True)
        known = {name: said[name] for name in ("input_ids", "attention_mask") if name in said}
        with torch.no_grad():
            out = model(**known, pixel_values=_shown(processor, pictures))
        one, other = (
            functional.normalize(made, dim=-1) for made in (out.image_embeds, out.text_embeds)
        )
        return (one @ other.T).to(pictures.device)


MATCHERS = {"toy": ToyMatcher()}
LARGEST_TOY = 64


def as_matcher(matcher: Matcher | str) -> Matcher:
    """Return a matcher, or the one that a name means.

    Raises:
        ParameterError: if no matcher has this name.
    """
    if isinstance(matcher, Matcher):
        return matcher
    if matcher not in MATCHERS:
        raise ParameterError(
            f"there is no matcher {matcher!r}. Pass matcher='toy' for toy pictures, or for photos "
            "BlipMatcher(name) or ClipMatcher(name) of clva_lens.methods.matching."
        )
    return MATCHERS[matcher]


class Shown:
    """A model's inputs as a second model wants them: pixels in [0, 1], and words."""

    def __init__(self, processor: Any, matcher: Matcher, image_token_id: int, name: str) -> None:
        """Name who asks.

        Raises:
            InterventionError: if the model came without its processor.
        """
        if processor is None:
            raise InterventionError(
                f"{name} has to read a prompt's words and undo what was done to its pixels, but a "
                "bare transformers model has no processor. Pass the model that "
                "cl.load((hf_model, processor)) returns."
            )
        self.tokenizer, self.images = processor.tokenizer, processor.image_processor
        self.matcher, self.image_token_id, self.name = matcher, image_token_id, name

    def pictures(self, pixels: Tensor) -> Pictures:
        """Return pixels as they were before the processor shifted and scaled them.

        Raises:
            InterventionError: if they are not one square a prompt, or no toy pictures for the toy
                matcher.
        """
        if pixels.ndim != 4:
            raise InterventionError(
                f"{self.name} shows a second model the picture, but this model takes it as tiles "
                f"or patches (pixel_values of {pixels.ndim} axes). Use one that takes one square."
            )
        if isinstance(self.matcher, ToyMatcher) and max(pixels.shape[2:]) > LARGEST_TOY:
            raise InterventionError(
                f"matcher='toy' knows the glyphs of the toy world, and the picture has "
                f"{pixels.shape[3]} × {pixels.shape[2]} pixels. Pass {self.name} a matcher for "
                "photos: see clva_lens.methods.matching."
            )
        mean, deviation = self._scale(pixels)
        return (pixels.float() * deviation + mean).clamp(0, 1)

    def pixels(self, pictures: Pictures) -> Tensor:
        """Return pictures as the model takes them."""
        mean, deviation = self._scale(pictures)
        return (pictures - mean) / deviation

    def _scale(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        asked = getattr(self.images, "do_normalize", True)
        mean = self.images.image_mean if asked else [0.0] * 3
        deviation = self.images.image_std if asked else [1.0] * 3
        found = (pixels.new_tensor(one) for one in (mean, deviation))
        one, other = (rearrange(each, "c -> c 1 1") for each in found)
        return one, other

    def questions(self, inputs: Inputs) -> list[str]:
        """Return the words of each prompt after its picture."""
        found = []
        for row, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = row[real.bool()].tolist()
            last = max((i for i, one in enumerate(ids) if one == self.image_token_id), default=-1)
            found.append(self.words(ids[last + 1 :]))
        return found

    def words(self, ids: Sequence[int]) -> str:
        """Return tokens as text."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()
