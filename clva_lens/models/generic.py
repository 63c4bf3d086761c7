"""Any model whose image tokens lie in its decoder's sequence, known by its configuration alone.

What is asked of a model: its configuration names an image token (``image_token_id``), a language
model head stands on a decoder with ``layers`` (found by ``get_decoder()``), and the layers' softmax
attention goes through transformers' attention interface, in modules that share one configuration.
Image tokens may lie apart (several pictures, tiles, tokens that end rows). Layers with a sliding
window keep their own mask. Layers without softmax attention (linear attention, convolutions) are
left out of the site; the numbers of the others stay, and so does the depth that L/2 − 2 is of.

What is refused: encoder-decoder models, pictures that are read by cross-attention, and videos.

Untested for want of devices: a model that is split over real ones (two are emulated in the tests),
and quantised weights on a GPU.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import InterventionError, ModelLoadError, PromptError
from clva_lens.models import activations, decoders
from clva_lens.models.decoder_passes import DecoderPasses
from clva_lens.models.family import (
    FAMILIES,
    TINY_DECODER,
    ModelFamily,
    Site,
    ask_by_template,
)
from clva_lens.models.grids import picture_grid

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
PLACING = ("FuyuProcessor",)
"""Processors that write the picture's place into every text."""
PAGED = ("GotOcr2Processor",)
"""Processors to which a list of pictures is the pages of one."""
VIDEO = (
    "the prompt has video tokens, whose attention is not told from that of a picture's. Pass "
    "pictures only."
)


class PicturePasses(DecoderPasses):
    """Passes of a decoder whose prompts must have no videos."""

    def __init__(self, entry: nn.Module, image_token_id: int, video_token_id: int | None) -> None:
        """Name the token of a video too, where it is not that of a picture."""
        super().__init__(entry, image_token_id)
        self.video = None if video_token_id == image_token_id else video_token_id

    def begin(
        self, rows: Tensor, ids: Tensor, mask: Tensor | None, length: int | None = None
    ) -> TokenSpans:
        """Take a new prompt.

        Raises:
            InterventionError: if it has a video.
        """
        if self.video is not None and (ids == self.video).any():
            raise InterventionError(VIDEO)
        return super().begin(rows, ids, mask, length)


class Generic(ModelFamily):
    """Models that no other family takes, if their decoder's attention can be found."""

    name = "generic"
    fallback = True
    flat_pictures = False

    def matches(self, model: nn.Module) -> bool:
        """Return whether ``model`` has a head, a decoder with layers, and an image token."""
        if not isinstance(model, PreTrainedModel) or _image_token(model) is None:
            return False
        return _decoder(model) is not None and model.get_output_embeddings() is not None

    def sites(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """Return the decoder's self-attention, in the layers that have it.

        Raises:
            ModelLoadError: if pictures do not come in as tokens, or attention is not found.
        """
        name, decoder = type(model).__name__, _decoder(model)
        if model.config.is_encoder_decoder:
            raise ModelLoadError(
                f"{name} is an encoder-decoder model, whose decoder reads the picture through its "
                "encoder. Register a ModelFamily for it."
            )
        assert decoder is not None
        found = [(index, _attention(name, layer)) for index, layer in enumerate(decoder.layers)]
        places = [(index, module) for index, module in found if module is not None]
        if not places:
            raise ModelLoadError(
                f"no layer of {name}'s decoder calls transformers' attention interface, so its "
                "attention cannot be intercepted. Register a ModelFamily for it, or use another "
                "model."
            )
        layers, modules = zip(*places, strict=True)
        config: Any = getattr(modules[0], "config", None)
        if config is None or any(
            getattr(module, "config", None) is not config for module in modules
        ):
            raise ModelLoadError(
                f"the attention modules of {name} have no configuration in common, so their kernel "
                "cannot be named in one place. Register a ModelFamily for it."
            )
        image, video = self.image_token_id(model), _video_token(model)

        passes = partial(PicturePasses, model, image, video)
        return (Site("decoder", modules, layers, len(decoder.layers), config, passes),)

    def activations(self, model: PreTrainedModel) -> activations.Activations:
        """Return the names of a decoder, as far as its layers have them; vision towers have none.

        Raises:
            ModelLoadError: if the decoder has no final norm.
        """
        (site,) = self.sites(model)
        stack, head = _decoder(model), model.get_output_embeddings()
        assert stack is not None and head is not None
        found = dict(zip(site.layers, site.modules, strict=True))
        return decoders.decoder(model, stack, head, found)

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Return the id of the image token that the configuration names."""
        image = _image_token(model)
        assert image is not None
        return image

    def visual_count(self, model: PreTrainedModel, site: str) -> None:
        """Return None: pictures have as many image tokens as the processor gives them."""
        return

    def grid(self, model: PreTrainedModel, site: str) -> tuple[int, int]:
        """Return the grid that every picture has.

        Raises:
            PromptError: if it depends on the picture, or is not known.
        """
        return picture_grid(model, {}, None)

    def prompt_grid(
        self, model: PreTrainedModel, site: str, inputs: Mapping[str, Tensor]
    ) -> tuple[int, int]:
        """Return the grid of this prompt's picture, which the processor may have chosen.

        Raises:
            PromptError: if there is none, saying why.
        """
        return picture_grid(model, inputs, self.spans(model, site, inputs).visual_count)

    def picture_size(self, model: PreTrainedModel) -> None:
        """Return None: the processor chooses, and the vision tower checks."""
        return

    def notes(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Return which layers are left out, and which look back a window only."""
        (site,) = self.sites(model)
        notes = []
        left_out = [layer for layer in range(site.depth) if layer not in site.layers]
        if left_out:
            notes.append(
                f"layers {_listed(left_out)} have no softmax attention and are left out; depth "
                f"counts all {site.depth}"
            )
        windows: dict[int, list[int]] = {}
        for layer, module in zip(site.layers, site.modules, strict=True):
            window = getattr(module, "sliding_window", None)
            if window is not None:
                windows.setdefault(window, []).append(layer)
        for window, layers in windows.items():
            notes.append(f"layers {_listed(layers)} look {window} positions back only")
        return tuple(notes)

    def spans(self, model: PreTrainedModel, site: str, inputs: Mapping[str, Tensor]) -> TokenSpans:
        """Return the spans of the prompt's tokens.

        Raises:
            PromptError: if there is a video among them.
        """
        image, video = self.image_token_id(model), _video_token(model)
        if video is not None and video != image and (inputs["input_ids"] == video).any():
            raise PromptError(VIDEO)
        return super().spans(model, site, inputs)

    def ask(self, processor: Any, question: str, system: str | None) -> str:
        """Return the chat template's prompt; without one, the picture and the question."""
        if getattr(processor, "chat_template", None) is not None:
            return ask_by_template(processor, question, system)
        if type(processor).__name__ in PLACING:
            return f"{system}\n{question}" if system else question
        # Where a picture's tokens stand between two others, the first of these stands for it.
        place = getattr(processor, "boi_token", None) or getattr(
            processor, "image_token", "<image>"
        )
        return f"{system} {place}\n{question}" if system else f"{place}\n{question}"

    def check_begun(self, processor: Any, texts: list[str], inputs: Mapping[str, Tensor]) -> None:
        """Check that the last token of each text is the last that the model reads.

        Raises:
            PromptError: if the processor writes something after it, as PaliGemma's and Fuyu's do.
        """
        for text, row in zip(texts, inputs["input_ids"].tolist(), strict=True):
            if processor.tokenizer(text, add_special_tokens=False).input_ids[-1:] != row[-1:]:
                raise PromptError(
                    f"the {type(processor).__name__} ends every text with something of its own, so "
                    "the model would not go on with the answer. Leave answer= out."
                )

    def encode(
        self, model: PreTrainedModel, processor: Any, images: list[Any], texts: list[str]
    ) -> dict[str, Tensor]:
        """Return the model's inputs; each text has a list of pictures.

        Raises:
            PromptError: if the processor refuses them, or makes other prompts of them.
        """
        rows = [row if isinstance(row, list) else [row] for row in images]
        paged = type(processor).__name__ in PAGED
        if paged and all(len(row) == 1 for row in rows):
            rows = [row[0] for row in rows]
        try:
            return super().encode(model, processor, rows, texts)
        except PromptError:
            raise
        except ValueError as error:
            raise PromptError(
                f"the {type(processor).__name__} cannot read this: {' '.join(str(error).split())} "
                "Pass another picture or text, or what the processor itself makes."
            ) from error

    def tiny(self, **text_config: Any) -> Gemma3ForConditionalGeneration:
        """Return a 12-layer, 4-head Gemma 3 with 16 image tokens and windows of 64."""
        text: dict[str, Any] = TINY_DECODER | {
            "head_dim": 8,
            "sliding_window": 64,
            "sliding_window_pattern": 3,
        }
        config = Gemma3Config(
            text_config=Gemma3TextConfig(**(text | text_config)),
            vision_config=SiglipVisionConfig(
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=4,
            ),
            mm_tokens_per_image=16,
            image_token_index=5,
            boi_token_index=6,
            eoi_token_index=7,
        )
        return Gemma3ForConditionalGeneration(config).eval()


def _image_token(model: PreTrainedModel) -> int | None:
    config = model.config
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def _video_token(model: PreTrainedModel) -> int | None:
    config = model.config
    found = getattr(config, "video_token_id", None)
    return getattr(config, "video_token_index", None) if found is None else found


def _decoder(model: PreTrainedModel) -> Any:
    """Return the module with the decoder's layers, within what ``get_decoder()`` returns."""
    decoder: Any = model.get_decoder()
    for _ in range(3):
        if isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            return decoder
        decoder = getattr(decoder, "model", getattr(decoder, "decoder", None))
    return None


def _attention(name: str, layer: nn.Module) -> nn.Module | None:
    """Return the module of a layer that calls the attention interface, if it has one.

    Raises:
        ModelLoadError: if it has several, or one that reads another sequence.
    """
    found = {path: part for path, part in layer.named_modules() if _calls_interface(part)}
    if not found:
        return None
    crossing = [path for path in found if "cross" in path]
    if crossing:
        raise ModelLoadError(
            f"{name} reads its pictures by cross-attention ('{crossing[0]}'), so no image tokens "
            "lie in the decoder's sequence. Register a ModelFamily for it."
        )
    if len(found) > 1:
        raise ModelLoadError(
            f"a layer of {name} has several attention modules ({', '.join(found)}), and it is "
            "unknown which one reads the picture. Register a ModelFamily for it."
        )
    return next(iter(found.values()))


def _calls_interface(module: nn.Module) -> bool:
    forward: Any = inspect.unwrap(type(module).forward)
    return INTERFACE in getattr(getattr(forward, "__code__", None), "co_names", ())


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(str(layer) for layer in layers)


FAMILIES.register("generic", Generic())
