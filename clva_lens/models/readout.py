"""What TransformerLens' ActivationCache asks of a model: sizes and weights, read in place.

``logit_attrs`` divides by the final norm's cached scale and leaves out the norm's weight, so the
directions that it asks for carry that weight: its sum over all components is then the model's own
logit, up to the constant of a norm's bias and of the unembedding's.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.models.activations import Readout

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CacheModel:
    """Stands for the language model in an ActivationCache; it copies no weight.

    Weights have TransformerLens' axes: ``blocks[i].attn.W_O`` [head, d_head, d_model], ``b_O``,
    ``blocks[i].mlp.W_out`` [d_mlp, d_model], ``b_out``, ``W_U`` [d_model, d_vocab], ``b_U``.
    """

    training = False

    def __init__(self, readout: Readout, tokenizer: Any, config: Any, name: str) -> None:
        """Take the modules to read from, and the configuration of the language model."""
        self._tokenizer = tokenizer
        self.ln_final = readout.norm
        self.unembed = readout.unembed
        self.blocks = tuple(
            _Block(_Attention(out, readout.d_head), _Mlp(down))
            for out, down in zip(readout.attention, readout.mlp, strict=True)
        )
        centred = isinstance(readout.norm, nn.LayerNorm)
        attention: Any = readout.attention[0]
        mlp: Any = readout.mlp[0]
        unembed: Any = readout.unembed
        heads, d_head = attention.in_features // readout.d_head, readout.d_head
        self.cfg = SimpleNamespace(
            model_name=name,
            n_layers=len(self.blocks),
            n_heads=heads,
            n_key_value_heads=getattr(config, "num_key_value_heads", heads),
            d_head=d_head,
            d_model=attention.out_features,
            d_mlp=mlp.in_features,
            d_vocab=unembed.out_features,
            n_ctx=config.max_position_embeddings,
            normalization_type="LN" if centred else "RMS",
            final_rms=not centred,
            positional_embedding_type="standard" if centred else "rotary",
            attn_only=False,
            device=unembed.weight.device,
            dtype=unembed.weight.dtype,
        )

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, without the final norm's weight."""
        return plain_weight(self.unembed).detach().T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias."""
        bias = getattr(self.unembed, "bias", None)
        return self.W_U.new_zeros(self.W_U.shape[1]) if bias is None else bias.detach()

    def tokens_to_residual_directions(
        self, tokens: str | int | Tensor
    ) -> Float[Tensor, "*tokens d_model"]:
        """Return the directions whose products with the normalised stream are the tokens' logits.

        They carry the final norm's weight.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() == 1:
            tokens = int(tokens)
        return self.W_U.T[tokens] * plain_weight(self.ln_final).detach().to(self.cfg.device)

    def to_single_token(self, text: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ParameterError: if it is none or several, or unknown to the tokenizer.
        """
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ParameterError(
                f"{text!r} is {len(ids)} tokens ({ids}), but a single one is needed. Pass a text "
                "that is one token, or a token id."
            )
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        if ids[0] == unknown and text.strip() != self._tokenizer.unk_token:
            raise ParameterError(
                f"{text!r} is a word that the tokenizer does not know, so that it stands for every "
                f"unknown one ('{self._tokenizer.unk_token}'). Pass another text, or a token id."
            )
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """Return the text of a token."""
        return self._tokenizer.decode([token])

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the biases that layers before ``layer`` write to the stream."""
        total = self.W_U.new_zeros(self.cfg.d_model)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases:
                total = total + block.mlp.b_out
        return total + self.blocks[layer].attn.b_O if mlp_input else total


class _Attention(NamedTuple):
    out: Any
    d_head: int

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return per_head(self.out, self.d_head)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return _bias(self.out)


class _Mlp(NamedTuple):
    down: Any

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return plain_weight(self.down).detach().T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return _bias(self.down)


class _Block(NamedTuple):
    attn: _Attention
    mlp: _Mlp


def plain_weight(module: Any) -> Tensor:
    """Return a module's weight, if it is all that the module multiplies by.

    Raises:
        ModelLoadError: if it is quantised, offloaded, or has an adapter beside it.
    """
    weight, what = module.weight, f"the weight of a {type(module).__name__}"
    if hasattr(module, "base_layer"):
        raise ModelLoadError(
            f"{what} cannot be read for this, because an adapter adds to it. Merge it first: "
            "cl.load((peft_model.merge_and_unload(), processor))."
        )
    if weight.is_meta:
        raise ModelLoadError(
            f"{what} cannot be read for this, because it is offloaded (on the device 'meta'). Load "
            "the model with a device_map that keeps the language model on a device."
        )
    if weight.dtype not in FLOATS:
        raise ModelLoadError(
            f"{what} cannot be read for this, because it is quantised ({weight.dtype}). Load the "
            "model without quantization_config."
        )
    return weight


def per_head(out: Any, d_head: int) -> Float[Tensor, "head d_head d_model"]:
    """Return an output projection's weight by head, as a view of it."""
    return rearrange(plain_weight(out).detach(), "m (h d) -> h d m", d=d_head)


def _bias(linear: Any) -> Tensor:
    if linear.bias is not None:
        return linear.bias.detach()
    return plain_weight(linear).detach().new_zeros(()).expand(linear.out_features)


def read_out(
    readout: Readout, residual: Float[Tensor, "*places d_model"]
) -> Float[Tensor, "*places vocabulary"]:
    """Return the logits of a residual stream: the model's own final norm, then its unembedding.

    Computed from the modules' weights without calling them, so that it may be used in a trace.
    In the model's own type, as the model does it.
    """
    norm: Any = readout.norm
    unembed: Any = readout.unembed
    weight, words = plain_weight(norm), plain_weight(unembed)
    residual = residual.to(weight.device)
    if isinstance(norm, nn.LayerNorm):
        normal = functional.layer_norm(residual, norm.normalized_shape, weight, norm.bias, norm.eps)
    else:
        exact = wide(residual)
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        normal = weight * exact.to(residual.dtype)
    return functional.linear(normal.to(words.device), words, getattr(unembed, "bias", None))


def wide(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return a tensor in float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def normalise(norm: Any, value: Tensor, form: str) -> Tensor:
    """Return a norm's scale, or its output before its weight; in float32 or better."""
    value = wide(value)
    if isinstance(norm, nn.LayerNorm):
        value, eps = value - value.mean(dim=-1, keepdim=True), norm.eps
    else:
        eps = norm.variance_epsilon
    scale = (value.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    return scale if form == "scale" else value / scale


def token_ids(standing: CacheModel, words: Any, tokens: Sequence[str | int]) -> list[int]:
    """Return the ids of tokens that are given as texts or ids; ``words`` is the tokenizer.

    Raises:
        ParameterError: if a text is no single token, an id does not exist, or there is no tokenizer
            for a text.
    """
    if words is None and any(isinstance(one, str) for one in tokens):
        raise ParameterError(
            f"tokens are {list(tokens)}, but the traced handle has no tokenizer. Pass token ids as "
            "tokens=, or trace the model that cl.load() returned."
        )
    ids = [standing.to_single_token(one) if isinstance(one, str) else one for one in tokens]
    size = standing.cfg.d_vocab
    if any(not 0 <= one < size for one in ids):
        raise ParameterError(f"tokens are {ids}, but ids are 0 to {size - 1}. Pass ids like that.")
    return ids
