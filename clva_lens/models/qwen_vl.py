"""Qwen-VL and Qwen-VL-Chat (2023): a resampler's 256 tokens in a Qwen decoder's own sequence."""

import math
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, ProcessorMixin

from clva_lens.ground.errors import PromptError
from clva_lens.models import activations, decoders
from clva_lens.models.decoder_passes import DecoderPasses
from clva_lens.models.family import (
    FAMILIES,
    TINY_DECODER,
    Inputs,
    ModelFamily,
    Site,
    ask_by_template,
    note_inputs,
    replace_lead,
)

NO_SYSTEM = (
    "Qwen-VL's base model answers '<img>…</img>question Answer:', which has no place for a system "
    "message. Leave system= out, or load Qwen-VL-Chat."
)


class QwenVL(ModelFamily):
    """``QwenVLForConditionalGeneration``: attention is read and edited in the decoder.

    The resampler is a single layer of cross-attention, without an earlier layer to anchor in or a
    later one to edit, so CLVA's clause for abstractors (Eq. 14) does not apply to it.
    """

    name = "qwen-vl"
    architectures = ("QwenVLForConditionalGeneration",)
    chats = False

    def sites(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """Return the decoder's self-attention."""
        decoder: Any = model.get_decoder()
        modules = tuple(layer.self_attn for layer in decoder.layers)
        layers, image = tuple(range(len(modules))), self.image_token_id(model)
        watch = lambda: DecoderPasses(model, image)  # noqa: E731
        return (Site("decoder", modules, layers, len(layers), modules[0].config, watch),)

    def activations(self, model: PreTrainedModel) -> activations.Activations:
        """Return the names of the vision tower and of the decoder; the resampler has none."""
        inner: Any = model
        seeing = activations.vision(inner.model.vision_tower.encoder.layers, activations.CLIP)
        stack: Any = model.get_decoder()
        found = {i: block.self_attn for i, block in enumerate(stack.layers)}
        reading = decoders.decoder(model, stack, inner.lm_head, found)
        return reading._replace(places=(*seeing, *reading.places))

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Return the id of ``<imgpad>``."""
        return model.config.image_token_id

    def visual_count(self, model: PreTrainedModel, site: str) -> int:
        """Return the number of the resampler's queries."""
        return model.config.vision_config.num_queries

    def grid(self, model: PreTrainedModel, site: str) -> tuple[int, int]:
        """Return the queries' own grid, 16 × 16.

        A query's fixed position is that of its cell, and so are those of the patches that it is
        meant to read; but it may read any patch, so a map over queries is not one over patches.
        """
        side = math.isqrt(model.config.vision_config.num_queries)
        return side, side

    def ask(self, processor: ProcessorMixin, question: str, system: str | None) -> str:
        """Return Qwen-VL-Chat's ChatML, or the base model's ``<img></img>question Answer:``.

        The base model's wording is that of VCD's evaluation (DAMO-NLP-SG/VCD at 039af55). In a chat
        ``system=""`` is an empty system message: there always is one.

        Raises:
            PromptError: if the base model is given a system message.
        """
        if getattr(processor, "chat_template", None) is None:
            if system:
                raise PromptError(NO_SYSTEM)
            return f"<img></img>{question} Answer:"
        return ask_by_template(processor, question, system)

    def watch(self, model: PreTrainedModel, seen: dict[str, Tensor]) -> list[RemovableHandle]:
        """Keep the pixels that the vision tower is given."""
        inner: Any = model
        tower = inner.model.vision_tower
        return [note_inputs(tower, lambda given: {"pixel_values": given["pixel_values"]}, seen)]

    def disturb(
        self, model: PreTrainedModel, processor: Any, inputs: Inputs, instruction: str
    ) -> Inputs:
        """Return the chat with the instruction as its system message.

        Raises:
            PromptError: if it is the base model, which has no place for it.
        """
        lead = self.ask(processor, "?", instruction).split("<img>")[0]
        head = processor.tokenizer(lead).input_ids
        images = inputs["input_ids"] == self.image_token_id(model)
        starts = (int(row.nonzero()[0]) - 1 for row in images)  # from <img> on
        return replace_lead(inputs, head, starts, processor.tokenizer.pad_token_id)

    def tiny(self, **text_config: Any) -> PreTrainedModel:
        """Return a 12-layer, 4-head Qwen-VL of width 32 with 16 image tokens (token id 5)."""
        from clva_lens.models.qwen import QwenVLConfig, QwenVLForConditionalGeneration
        from clva_lens.models.qwen.configuration import QwenVLTextConfig, QwenVLVisionConfig

        vision = QwenVLVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=48,
            patch_size=8,
            position_side=4,
            num_queries=16,
            output_size=32,
            resampler_heads=2,
        )
        sizes: dict[str, Any] = TINY_DECODER | {"seq_length": 128} | text_config
        text = QwenVLTextConfig(**sizes)
        config = QwenVLConfig(text_config=text, vision_config=vision, image_token_id=5)
        return QwenVLForConditionalGeneration(config).eval()


FAMILIES.register("qwen-vl", QwenVL())
