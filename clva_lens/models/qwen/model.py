"""Qwen-VL as a transformers model: Qwen2's layers, two rules for long sequences, and the eyes.

Facts from Qwen's released code (``modeling_qwen.py`` of Qwen/Qwen-VL-Chat), which no longer runs on
current transformers and is never run here (``tests/qwen_vl/parity_with_published.py`` compares with
it, run elsewhere). Up to ``seq_length`` (2,048) tokens the language model is a Qwen2. Beyond it:

* **log-n attention**: the query at position p (1-based) is multiplied by log(p) / log(seq_length);
* **NTK rule**: a prompt of n tokens is read with the rotary base b·α^(d/(d−2)), where
  α = 2^⌈log2(n / seq_length) + 1⌉ − 1 and d is a head's width. The tokens generated after it keep
  the prompt's α.

Both count padding, as the released code does: past ``seq_length``, a sample in a padded batch is
not quite what it is alone. Rotary angles are float32 whatever the model's type, as there.

The modules are exempt from the tests' type checks: nnsight runs other code in the middle of a
``forward``, and jaxtyping then takes one function's axes for another's.
"""

import math
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2Model,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import torch_compilable_check
from transformers.utils.output_capturing import capture_outputs

from clva_lens.ground.errors import PromptError
from clva_lens.models.kv_cache import CACHE, OLD, cache_of
from clva_lens.models.qwen.configuration import QwenVLConfig, QwenVLTextConfig
from clva_lens.models.qwen.vision import QwenVLResampler, QwenVLVisionTower

Turns = tuple[Float[Tensor, "_ row head_dim"], Float[Tensor, "_ row head_dim"]]
"""Cosine and sine of the rotary angles."""


def ntk_alpha(length: int, seq_length: int) -> int:
    """Return α of the NTK rule for a prompt of ``length`` tokens: 1 up to seq_length, then 3, 7."""
    return max(1, 2 ** math.ceil(math.log2(length / seq_length) + 1) - 1)


@no_type_check
class QwenVLRotaryEmbedding(Qwen2RotaryEmbedding):
    """Qwen2's rotary embedding, with the base of the NTK rule."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Int[Tensor, "_ row"], alpha: int = 1) -> Turns:
        """Return cosine and sine, in float32 or better.

        A base of b·α^(d/(d−2)) is the same as frequency i of b times α^(−2i/(d−2)).
        """
        kind = torch.promote_types(x.dtype, torch.float32)
        frequency = self.inv_freq.to(x.device, kind)
        if alpha != 1:
            half = len(frequency)
            powers = torch.arange(half, device=x.device, dtype=kind) / (half - 1)
            frequency = frequency * float(alpha) ** -powers
        angle = position_ids[..., None].to(kind) * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


@no_type_check
class QwenVLAttention(Qwen2Attention):
    """Qwen2's attention, with queries that log-n attention may have lengthened."""

    def forward(
        self,
        hidden_states: Float[Tensor, "batch row width"],
        position_embeddings: Turns,
        attention_mask: Any = None,
        query_scale: Float[Tensor, " row"] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the pattern where the kernel gives it."""
        query, key, value = (
            project(hidden_states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cosine, sine = position_embeddings
        kind, exact = value.dtype, cosine.dtype
        query, key = apply_rotary_pos_emb(query.to(exact), key.to(exact), cosine, sine)
        query, key = query.to(kind), key.to(kind)
        if (cache := cache_of(kwargs)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)[:, None]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), eager_attention_forward
        )
        out, pattern = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.flatten(2)), pattern


@no_type_check
class QwenVLTextModel(Qwen2Model):
    """The language model without its head."""

    config: QwenVLTextConfig
    _can_record_outputs = {  # noqa: RUF012 - transformers' own spelling
        "hidden_states": Qwen2DecoderLayer,
        "attentions": QwenVLAttention,
    }

    def __init__(self, config: QwenVLTextConfig) -> None:
        """Make a Qwen2 with this file's attention and rotary embedding."""
        super().__init__(config)
        self.rotary_emb = QwenVLRotaryEmbedding(config=config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = QwenVLAttention(config, index)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "batch row"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "_ row"] | None = None,
        inputs_embeds: Float[Tensor, "batch row width"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last layer's states after the final norm.

        Raises:
            ValueError: unless either ids or embeddings are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass input_ids or inputs_embeds, one of the two.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = cache_of(kwargs)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        kwargs = {name: one for name, one in kwargs.items() if name not in (CACHE, OLD)}
        kept: dict[str, Any] = {CACHE: cache}
        seen = 0 if cache is None else cache.get_seq_length()
        place = torch.arange(hidden.shape[1], device=hidden.device) + seen
        if position_ids is None:
            position_ids = place[None]
        mask = attention_mask
        if not isinstance(mask, dict):  # generate() may have made it
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kept,
            )
        else:
            mask = mask["full_attention"]
        alpha = self._alpha(hidden.shape[1], cache)
        turns = self.rotary_emb(hidden, position_ids, alpha)
        scale = self._query_scale(place)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=turns,
                query_scale=scale,
                **kept,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), **(kept if use_cache else {})
        )

    def _alpha(self, rows: int, cache: Cache | None) -> int:
        """Return α of the NTK rule: this prompt's, or that of the prompt in the cache.

        It lies with the cache, since it belongs to the keys that are there.
        """
        if not self.config.use_dynamic_ntk:
            return 1
        known = getattr(cache, "ntk_alpha", None)
        # A static cache knows its length on the device only: single rows do not ask for it.
        if cache is not None and known is not None and (rows == 1 or int(cache.get_seq_length())):
            return known
        alpha = ntk_alpha(rows, self.config.seq_length)
        if cache is not None:
            vars(cache)["ntk_alpha"] = alpha
        return alpha

    def _query_scale(self, place: Int[Tensor, " row"]) -> Float[Tensor, " row"] | None:
        """Return log-n attention's factor of each row, at least 1; None where it never acts."""
        if not self.config.use_logn_attn:
            return None
        longest = self.config.seq_length
        return ((place + 1).double().log() / math.log(longest)).clamp_min(1).float()


@no_type_check
class QwenVLPreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config: QwenVLConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers' own spelling
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "CLIPEncoderLayer", "QwenVLResampler"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QwenVLResampler):
            module.fill()


@no_type_check
class QwenVLModel(QwenVLPreTrainedModel):
    """The vision tower, the resampler and the language model without its head."""

    def __init__(self, config: QwenVLConfig) -> None:
        """Make the parts of ``config``."""
        super().__init__(config)
        self.vision_tower = QwenVLVisionTower(config.vision_config)
        self.resampler = QwenVLResampler(config.vision_config)
        self.language_model = QwenVLTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the language model's embedding."""
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Float[Tensor, "image 3 height width"], **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the patches, and as ``pooler_output`` each picture's [query, width]."""
        seen = self.vision_tower(pixel_values)
        features = self.resampler(seen.last_hidden_state)
        pictures: Any = list(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.last_hidden_state, pooler_output=pictures
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch row"] | None = None,
        pixel_values: Float[Tensor, "image 3 height width"] | None = None,
        inputs_embeds: Float[Tensor, "batch row width"] | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Put each picture's tokens where the prompt has ``<imgpad>``, and run the language model.

        Raises:
            PromptError: if there are more or fewer places than picture tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        assert inputs_embeds is not None
        seen: Any = (mm_encoder_outputs or {}).get("image")
        if seen is None and pixel_values is not None:
            seen = self.get_image_features(pixel_values, return_dict=True)
        if seen is not None:
            features = torch.cat(list(seen.pooler_output)).to(
                inputs_embeds.device, inputs_embeds.dtype
            )
            where = self._places(input_ids, inputs_embeds, len(features))
            inputs_embeds = inputs_embeds.masked_scatter(where, features)
        out = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE: cache_of(out)},
        )

    def _places(self, ids: Tensor | None, embeds: Tensor, count: int) -> Tensor:
        """Return where the picture's tokens go, as a mask of the embeddings."""
        pad = self.config.image_token_id
        if ids is None:
            one = self.get_input_embeddings()(torch.tensor(pad, device=embeds.device))
            where = (embeds == one).all(dim=-1)
        else:
            where = ids == pad
        torch_compilable_check(
            where.sum() == count,
            lambda: (
                f"the prompt has {int(where.sum())} places for picture tokens, but the pictures "
                f"make {count}. Let the processor write the prompt: it puts one picture's tokens "
                "in for each '<img></img>'."
            ),
            PromptError,
        )
        return where[..., None].to(embeds.device)


@no_type_check
class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its head. Inputs are ``input_ids``, ``attention_mask`` and ``pixel_values``."""

    _tied_weights_keys = {  # noqa: RUF012 - transformers' own spelling
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }

    def __init__(self, config: QwenVLConfig) -> None:
        """Make the model of ``config``, with random weights."""
        super().__init__(config)
        self.model = QwenVLModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return what ``QwenVLModel.get_image_features`` does."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch row"] | None = None,
        pixel_values: Float[Tensor, "image 3 height width"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "_ row"] | None = None,
        inputs_embeds: Float[Tensor, "batch row width"] | None = None,
        labels: Int[Tensor, "batch row"] | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the last ``logits_to_keep`` positions; of all for 0."""
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE: cache_of(out)},
        )
