"""InstructBLIP and BLIP-2: a Q-Former reads the picture into a few tokens for a language model.

Two attention sites. ``qformer``: the learned queries look at the vision tower's output (a CLS
token, then patches), in every second layer. ``decoder``: the language model looks at the queries'
outputs, which stand at the head of its prompt. The first is where CLVA acts (Eq. 14,
arXiv:2603.25088v1).

Batches are padded left of the image tokens, where transformers' processor pads between them and
the text: the distance from text to image is then that of the prompt alone. The Q-Former's text,
whose positions are absolute, is padded on the right.
"""

from collections.abc import Mapping
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import ClvaLensError, ModelLoadError, PromptError
from clva_lens.models import activations, decoders
from clva_lens.models.decoder_passes import DecoderPasses
from clva_lens.models.family import (
    FAMILIES,
    TINY_DECODER,
    Inputs,
    ModelFamily,
    Site,
    note_inputs,
    pad_left,
)
from clva_lens.models.passes import (
    EncoderDecoderPasses,
    Passes,
    QueryPasses,
    picture_spans,
)
from clva_lens.models.wording import Message

BEGUN = "\0"  # between a question and the beginning of its answer
CLS = 1  # keys of the Q-Former that lie on no patch
LANGUAGE_MODELS = ("llama", "opt", "t5")


class InstructBlip(ModelFamily):
    """``InstructBlipForConditionalGeneration`` and ``Blip2ForConditionalGeneration``."""

    name = "instructblip"
    architectures = ("InstructBlipForConditionalGeneration", "Blip2ForConditionalGeneration")
    chats = False

    def sites(self, model: PreTrainedModel) -> tuple[Site, ...]:
        """Return the Q-Former's cross-attention and the language model's attention."""
        qformer: Any = model.qformer
        stack = qformer.encoder.layer
        layers = tuple(i for i, layer in enumerate(stack) if layer.has_cross_attention)
        modules = tuple(stack[i].crossattention.attention for i in layers)
        reading = Site(
            "qformer",
            modules,
            layers,
            len(stack),
            modules[0].config,
            lambda: QueryPasses(
                qformer,
                self.image_token_id(model),
                model.get_input_embeddings(),
                lead=CLS,
                patches=self.visual_count(model, "qformer"),
            ),
            ordered=False,
        )
        return reading, self._decoder(model)

    def _decoder(self, model: PreTrainedModel) -> Site:
        language: Any = model.language_model
        kind = language.config.model_type
        if kind not in LANGUAGE_MODELS:
            raise ModelLoadError(
                f"the language model is a '{kind}', whose attention clva_lens does not know "
                f"(it knows {', '.join(LANGUAGE_MODELS)}). Load a model with one of these."
            )
        decoder = language.get_decoder()
        watcher: type[DecoderPasses] | type[EncoderDecoderPasses]
        if kind == "t5":
            modules = tuple(block.layer[1].EncDecAttention for block in decoder.block)
            watcher = EncoderDecoderPasses
        else:
            modules = tuple(layer.self_attn for layer in decoder.layers)
            watcher = DecoderPasses

        def passes() -> Passes:
            return watcher(language, self.image_token_id(model), model.get_input_embeddings())

        layers = tuple(range(len(modules)))
        return Site("decoder", modules, layers, len(layers), modules[0].config, passes)

    def seeing(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """Return the vision tower, and BLIP-2's Q-Former."""
        inner: Any = model
        asked = isinstance(model, InstructBlipForConditionalGeneration)
        return (inner.vision_model,) if asked else (inner.vision_model, inner.qformer)

    def asking(self, model: PreTrainedModel) -> tuple[nn.Module, ...]:
        """Return the Q-Former's self-attention, layer by layer: of queries and question."""
        inner: Any = model
        return tuple(layer.attention.attention for layer in inner.qformer.encoder.layer)

    def activations(self, model: PreTrainedModel) -> activations.Activations:
        """Return the names of the vision tower, of the Q-Former and of the language model.

        Raises:
            ModelLoadError: if the language model is a T5.
        """
        inner: Any = model
        kind = inner.language_model.config.model_type
        if kind not in ("llama", "opt"):
            raise ModelLoadError(
                f"the language model is a '{kind}', for which run_with_cache has no table of "
                "TransformerLens names (it has llama and opt). Read its activations inside "
                "model.trace(prompt)."
            )
        seeing = activations.vision(inner.vision_model.encoder.layers, activations.BLIP_VISION)
        asking = activations.qformer(inner.qformer.encoder.layer)
        language = inner.language_model
        stack: Any = language.get_decoder()
        if kind == "opt":
            reading = activations.opt(stack, language.lm_head)
        else:
            found = {i: block.self_attn for i, block in enumerate(stack.layers)}
            reading = decoders.decoder(model, stack, language.lm_head, found)
        return reading._replace(places=(*seeing, *asking, *reading.places))

    def image_token_id(self, model: PreTrainedModel) -> int:
        """Return the id of ``<image>``.

        Raises:
            ModelLoadError: if the configuration has none, as those of old checkpoints.
        """
        image = getattr(model.config, "image_token_index", None)
        if image is None:
            raise ModelLoadError(
                f"{type(model).__name__}'s configuration has no image_token_index, so its image "
                "tokens cannot be found in a prompt. It is an old checkpoint: add the token "
                "'<image>' to its tokenizer, resize the token embeddings, set "
                "model.config.image_token_index, and pass (hf_model, processor)."
            )
        return image

    def visual_count(self, model: PreTrainedModel, site: str) -> int:
        """Return the number of patches, or of queries."""
        if site == "decoder":
            return model.config.num_query_tokens
        rows, columns = self.grid(model, site)
        return rows * columns

    def grid(self, model: PreTrainedModel, site: str) -> tuple[int, int]:
        """Return the patch grid of the vision tower, which the Q-Former looks at.

        Raises:
            PromptError: for the decoder, whose image tokens are queries' outputs.
        """
        if site == "decoder":
            raise PromptError(
                f"the decoder's {model.config.num_query_tokens} image tokens are outputs of the "
                "Q-Former's queries, each of which may look anywhere, so they lie on no grid. Draw "
                "the Q-Former's maps (site='qformer'), or cl.composed_saliency(model, prompt)."
            )
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def spans(self, model: PreTrainedModel, site: str, inputs: Mapping[str, Tensor]) -> TokenSpans:
        """Return the spans of a site's keys."""
        if site == "decoder":
            return super().spans(model, site, inputs)
        batch, keys = len(inputs["input_ids"]), CLS + self.visual_count(model, site)
        return picture_spans(batch, keys, CLS, inputs["input_ids"].device)

    def ask(self, processor: ProcessorMixin, question: str, system: str | None) -> str:
        """Return the question as it is; BLIP-2, which follows no instructions, gets a frame."""
        if not hasattr(processor, "qformer_tokenizer"):
            question = f"Question: {question} Answer:"
        return f"{system} {question}" if system else question

    def encode(
        self, model: PreTrainedModel, processor: Any, images: list[Any], texts: list[str]
    ) -> dict[str, Tensor]:
        """Return the model's inputs: padding, image tokens, text; and the Q-Former's text."""
        tokenizer = processor.tokenizer
        halves = [text.split(BEGUN) for text in texts]
        texts = [half[0] for half in halves]
        image = [self.image_token_id(model)] * model.config.num_query_tokens
        language: Any = model.language_model
        pair = language.config.is_encoder_decoder
        begun = [
            tokenizer(half[1], add_special_tokens=False).input_ids if half[1:] else []
            for half in halves
        ]
        rows = [
            image + tokenizer(text).input_ids + ([] if pair else more)
            for text, more in zip(texts, begun, strict=True)
        ]
        ids, mask = pad_left(rows, tokenizer.pad_token_id or 0)
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        if isinstance(model, InstructBlipForConditionalGeneration):
            reader = getattr(processor, "qformer_tokenizer", None)
            if reader is None:
                raise PromptError(
                    "InstructBLIP's Q-Former reads the question too, but "
                    f"{type(processor).__name__} has no qformer_tokenizer to make "
                    "qformer_input_ids. Use the model's own InstructBlipProcessor."
                )
            text = reader(texts, padding=True, padding_side="right", return_tensors="pt")
            inputs["qformer_input_ids"] = text["input_ids"]
            inputs["qformer_attention_mask"] = text["attention_mask"]
        if pair:
            start = language.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.tensor([[start, *more] for more in begun])
        return inputs

    def begin(self, text: str, answer: str) -> str:
        """Return both with a mark between them: the Q-Former reads the question only."""
        return f"{text}{BEGUN}{answer}"

    def converse(self, processor: Any, messages: list[Message], system: str | None) -> str:
        """Raise PromptError: these models answer one question about one picture."""
        raise PromptError(
            "InstructBLIP and BLIP-2 answer one question about one picture and have no place for "
            "earlier turns. Leave turns= out, or write them into the question."
        )

    def watch(self, model: PreTrainedModel, seen: dict[str, Tensor]) -> list[RemovableHandle]:
        """Keep the pixels that the vision tower is given, and the text that the Q-Former reads."""
        inner: Any = model

        def text(given: dict[str, Any]) -> Inputs:
            queries = given["query_embeds"].shape[1]
            return {
                "qformer_input_ids": given["input_ids"],
                "qformer_attention_mask": given["attention_mask"][:, queries:],
            }

        def pixels(given: dict[str, Any]) -> Inputs:
            return {"pixel_values": given["pixel_values"]}

        handles = [note_inputs(inner.vision_model, pixels, seen)]
        if isinstance(model, InstructBlipForConditionalGeneration):
            handles.append(note_inputs(inner.qformer, text, seen))
        return handles

    def disturb(
        self, model: PreTrainedModel, processor: Any, inputs: Inputs, instruction: str
    ) -> Inputs:
        """Return the prompt with the instruction before the Q-Former's text.

        Raises:
            PromptError: if the Q-Former reads no text, as BLIP-2's.
        """
        reader = getattr(processor, "qformer_tokenizer", None)
        if reader is None or "qformer_input_ids" not in inputs:
            raise PromptError(
                "ICD puts its instruction into the Q-Former's text, but this model's reads none "
                "(BLIP-2), or the processor has no qformer_tokenizer. Use an InstructBLIP with its "
                "own processor."
            )
        mask = inputs["qformer_attention_mask"]
        if not mask[:, 0].all():
            raise PromptError(
                "the Q-Former's text is padded on the left, where ICD's instruction goes. Pad "
                "qformer_input_ids on the right, as model.prompt() does."
            )
        extra = reader(instruction, add_special_tokens=False).input_ids
        whole = reader(instruction).input_ids
        lead = next(i for i in range(len(whole)) if whole[i : i + len(extra)] == extra)
        ids = inputs["qformer_input_ids"]
        added = torch.tensor(extra, device=ids.device).expand(len(ids), -1)
        return inputs | {
            "qformer_input_ids": torch.cat([ids[:, :lead], added, ids[:, lead:]], dim=1),
            "qformer_attention_mask": torch.cat([torch.ones_like(added), mask], dim=1),
        }

    def explain(self, error: Exception) -> ClvaLensError | None:
        """Return what is missing where transformers fails on a question that is not there."""
        *_, (frame, _) = walk_tb(error.__traceback__)
        inside = frame.f_code.co_name == "get_image_features"
        unset = inside and frame.f_locals.get("qformer_input_ids", 0) is None
        if not unset and "'qformer_input_ids'" not in str(error):
            return None
        return PromptError(
            "the Q-Former reads the question too, but the model was called without "
            "qformer_input_ids. Pass them: model.prompt(image, question) has them."
        )

    def tiny(self, **text_config: Any) -> InstructBlipForConditionalGeneration:
        """Return a small InstructBLIP: two 12-layer, 4-head stacks, 8 queries, 16 patches."""
        return self.tiny_with(LlamaConfig(**(TINY_DECODER | text_config)))

    def tiny_inputs(self, model: PreTrainedModel, seed: int = 0, words: int = 6) -> Inputs:
        """Return the inputs, and a text of the Q-Former."""
        ids = torch.randint(8, 60, (1, 4), generator=torch.Generator().manual_seed(seed))
        reading = {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
        return super().tiny_inputs(model, seed, words) | reading

    @staticmethod
    def tiny_with(text_config: PreTrainedConfig) -> InstructBlipForConditionalGeneration:
        """Return a small InstructBLIP around a language model."""
        config = InstructBlipConfig(
            vision_config={
                "hidden_size": 24,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "initializer_range": 0.02,  # theirs is 1e-10, at which all patches look the same
            },
            qformer_config={
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 12,
                "num_attention_heads": 4,
                "encoder_hidden_size": 24,
                "max_position_embeddings": 128,
            },
            text_config=text_config,
            num_query_tokens=8,
            image_token_index=5,
        )
        model = InstructBlipForConditionalGeneration(config).eval()
        with torch.no_grad():
            # They start as zeros, so that all queries would be one.
            model.query_tokens.normal_(0, 1)
        return model


FAMILIES.register("instructblip", InstructBlip())
