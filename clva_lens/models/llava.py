"""LLaVA-1.5: a CLIP tower, a two-layer projector, and a Llama-like decoder."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
)

from clva_lens.ground.axes import TokenSpans
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
from clva_lens.models.wording import Message, texts_of

PIXTRAL = "pixtral"  # its pictures differ in size, and their rows end in a token


class Llava(ModelFamily):
    """``LlavaForConditionalGeneration``: image tokens lie in the decoder's own sequence."""

    name = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def matches(self, model: nn.Module) -> bool:
        """Return whether ``model`` is transformers' LLaVA (not LLaVA-NeXT, OneVision, Pixtral)."""
        config: Any = model.config if super().matches(model) else None
        return config is not None and config.vision_config.model_type != PIXTRAL

    def sites(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """Return the decoder's self-attention."""
        decoder: Any = model.get_decoder()
        modules = tuple(layer.self_attn for layer in decoder.layers)
        layers = tuple(range(len(modules)))
        image = self.image_token_id(model)
        return (
            Site(
                "decoder",
                modules,
                layers,
                len(layers),
                modules[0].config,
                lambda: DecoderPasses(model, image),
            ),
        )

    def activations(self, model: PreTrainedModel) -> activations.Activations:
        """Return the names of the vision tower and of the decoder."""
        inner: Any = model
        tower = inner.model.vision_tower
        seeing = activations.vision(
            getattr(tower, "vision_model", tower).encoder.layers, activations.CLIP
        )
        stack: Any = model.get_decoder()
        found = {i: block.self_attn for i, block in enumerate(stack.layers)}
        reading = decoders.decoder(model, stack, inner.lm_head, found)
        return reading._replace(places=(*seeing, *reading.places))

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Return the id of ``<image>``."""
        return model.config.image_token_index

    def visual_count(self, model: PreTrainedModel, site: str) -> int:
        """Return the number of patches, and the CLS feature if the model keeps it."""
        vision = model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (model.config.vision_feature_select_strategy != "default")

    def grid(self, model: PreTrainedModel, site: str) -> tuple[int, int]:
        """Return the patch grid of the vision tower; its CLS feature must be dropped.

        Raises:
            PromptError: if the model keeps the CLS feature, which lies on no patch.
        """
        if model.config.vision_feature_select_strategy != "default":
            raise PromptError(
                f"vision_feature_select_strategy is "
                f"'{model.config.vision_feature_select_strategy}', so the CLS feature is an image "
                "token that lies on no patch, and there is no grid. Maps can be read, not drawn."
            )
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def ask(self, processor: ProcessorMixin, question: str, system: str | None) -> str:
        """Return the chat template's prompt, or LLaVA-1.5's own where there is no template.

        Raises:
            PromptError: if there is a system message and the template drops it.
        """
        if getattr(processor, "chat_template", None) is None:
            lead = f"{system} " if system else ""
            return f"{lead}USER: <image>\n{question} ASSISTANT:"
        return ask_by_template(processor, question, system)

    def converse(self, processor: Any, messages: list[Message], system: str | None) -> str:
        """Return the chat template's conversation, or LLaVA-1.5's own where there is none."""
        if getattr(processor, "chat_template", None) is not None:
            return super().converse(processor, messages, system)
        written = f"{system} " if system else ""
        for message in messages:
            shown = "<image>\n" * sum(part["type"] == "image" for part in message["content"])
            said = f"{shown}{' '.join(texts_of([message]))}"
            end = processor.tokenizer.eos_token
            written += f"USER: {said} " if message["role"] == "user" else f"ASSISTANT: {said}{end}"
        return f"{written}ASSISTANT:"

    def watch(self, model: PreTrainedModel, seen: dict[str, Tensor]) -> list[RemovableHandle]:
        """Keep the pixels that the vision tower is given."""
        inner: Any = model
        tower = inner.model.vision_tower
        return [note_inputs(tower, lambda given: {"pixel_values": given["pixel_values"]}, seen)]

    def disturb(
        self, model: PreTrainedModel, processor: Any, inputs: Inputs, instruction: str
    ) -> Inputs:
        """Return the prompt with the instruction as its system message."""
        placeholder = str(getattr(processor, "image_token", "<image>"))
        lead = self.ask(processor, "?", instruction).split(placeholder)[0]
        bos = getattr(processor.tokenizer, "bos_token", None)
        special = not (bos and lead.startswith(bos))
        head = processor.tokenizer(lead, add_special_tokens=special).input_ids
        image = self.image_token_id(model)
        spans = TokenSpans.from_ids(inputs["input_ids"], image, inputs["attention_mask"])
        starts = (int(kept.nonzero()[0]) for kept in spans.image | spans.text)
        return replace_lead(inputs, head, starts, processor.tokenizer.pad_token_id or 0)

    def tiny(self, **text_config: Any) -> LlavaForConditionalGeneration:
        """Return a 12-layer, 4-head LLaVA of width 32 with 16 image tokens (token id 5)."""
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=24,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**(TINY_DECODER | text_config)),
            image_token_index=5,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
        return LlavaForConditionalGeneration(config).eval()


FAMILIES.register("llava", Llava())
