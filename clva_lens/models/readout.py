"""What TransformerLens' ActivationCache asks of a model: sizes and weights, read in place.

``logit_attrs`` divides by the final norm's cached scale and leaves out the norm's weight, so the
directions that it asks for carry that weight: its sum over all components is then the model's own
logit, up to the constant of a norm's bias and of the unembedding's.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.models.activations import Readout, Written
from clva_lens.models.norms import called, norm_form, plain_weight


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
        self.final = readout.final
        self.form = norm_form(readout.norm)
        self.blocks = tuple(_Block(_Attention(one), _Mlp(one)) for one in readout.written)
        unembed: Any = readout.unembed
        heads = config.num_attention_heads
        downs = [one.mlp for one in readout.written if one.mlp is not None]
        mlp: Any = downs[0] if downs else None
        centred = self.form.centred
        self.cfg = SimpleNamespace(
            model_name=name,
            n_layers=len(self.blocks),
            n_heads=heads,
            n_key_value_heads=getattr(config, "num_key_value_heads", heads),
            d_head=readout.d_head,
            d_model=len(self.form.gain),
            d_mlp=None if mlp is None else mlp.in_features,
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

        They carry the final norm's weight, and the factor of the logits. A soft cap comes after.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() == 1:
            tokens = int(tokens)
        gain = self.form.gain * (self.final.times / self.final.over)
        return self.W_U.T[tokens] * gain.to(self.cfg.device, self.cfg.dtype)

    def to_single_token(self, text: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ParameterError: if it is none or several, or unknown to the tokenizer.
        """
        return single_token(self._tokenizer, text)

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
    written: Written

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return per_head(
            _there(self.written.heads, "no heads of softmax attention"), self.written.d_head
        )

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return _bias(_there(self.written.heads, "no heads of softmax attention"))


class _Mlp(NamedTuple):
    written: Written

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return plain_weight(self._down).detach().T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return _bias(self._down)

    @property
    def _down(self) -> Any:
        return _there(self.written.mlp, "experts in place of one MLP")


class _Block(NamedTuple):
    attn: _Attention
    mlp: _Mlp


def _there(module: Any, instead: str) -> Any:
    if module is None:
        raise ModelLoadError(
            f"the layer has {instead}, so it has no such weight. Ask for layers that have one."
        )
    return module


def per_head(out: Any, d_head: int) -> Float[Tensor, "head d_head d_model"]:
    """Return an output projection's weight by head, as a view of it."""
    return rearrange(plain_weight(out).detach(), "m (h d) -> h d m", d=d_head)


def _bias(linear: Any) -> Tensor:
    if linear.bias is not None:
        return linear.bias.detach()
    return plain_weight(linear).detach().new_zeros(()).expand(linear.out_features)


def read_out(
    readout: Readout, residual: Float[Tensor, "*stream d_model"]
) -> Float[Tensor, "*places vocabulary"]:
    """Return the logits of a residual stream: the model's own final norm, unembedding and cap.

    Without the modules' hooks, so that it may be used in a trace. In the model's own type, as the
    model does it. A stream of several copies has them in the axis before the last.
    """
    unembed: Any = readout.unembed
    words = plain_weight(unembed)
    normal = final_state(readout, residual).to(words.device)
    return readout.final.of(functional.linear(normal, words, getattr(unembed, "bias", None)))


def final_state(
    readout: Readout, residual: Float[Tensor, "*stream d_model"]
) -> Float[Tensor, "*places d_model"]:
    """Return a residual stream through the model's own final norm, as its unembedding reads it."""
    norm: Any = readout.norm
    residual = residual.to(plain_weight(norm).device)
    if readout.copies is not None:
        flat = residual.flatten(0, -3)[None]
        residual = called(readout.copies, flat)[0].unflatten(0, residual.shape[:-2])
    return called(norm, residual)


def single_token(tokenizer: Any, text: str) -> int:
    """Return the id of a text that is one token.

    Raises:
        ParameterError: if it is none or several, or unknown to the tokenizer.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ParameterError(
            f"{text!r} is {len(ids)} tokens ({ids}), but a single one is needed. Pass a text "
            "that is one token, or a token id."
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    if ids[0] == unknown and text.strip() != tokenizer.unk_token:
        raise ParameterError(
            f"{text!r} is a word that the tokenizer does not know, so that it stands for every "
            f"unknown one ('{tokenizer.unk_token}'). Pass another text, or a token id."
        )
    return ids[0]


def token_ids(size: int, words: Any, tokens: Sequence[str | int]) -> list[int]:
    """Return the ids of tokens that are given as texts or ids; ``words`` is the tokenizer.

    ``size`` is that of the vocabulary.

    Raises:
        ParameterError: if a text is no single token, an id does not exist, or there is no tokenizer
            for a text.
    """
    if words is None and any(isinstance(one, str) for one in tokens):
        raise ParameterError(
            f"tokens are {list(tokens)}, but the traced handle has no tokenizer. Pass token ids as "
            "tokens=, or trace the model that cl.load() returned."
        )
    ids = [single_token(words, one) if isinstance(one, str) else one for one in tokens]
    if any(not 0 <= one < size for one in ids):
        raise ParameterError(f"tokens are {ids}, but ids are 0 to {size - 1}. Pass ids like that.")
    return ids
