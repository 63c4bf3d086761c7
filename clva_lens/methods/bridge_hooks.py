"""Methods as TransformerLens hooks: the same sessions, fed with the scores that a bridge forms.

A ``TransformerBridge`` forms every layer's scores in full and lets a hook at ``hook_attn_scores``
replace them before the softmax, which is where the bias of a session belongs (engine/run.py). So
nothing of a method is written twice: sessions read the rows of these scores and return a bias.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clva_lens.engine.bias import dense
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Part, StreamCall, stream_name
from clva_lens.ground.axes import TokenSpans
from clva_lens.ground.errors import InterventionError, ModelLoadError, ParameterError
from clva_lens.methods.target import Shape, Target
from clva_lens.models.activations import Readout
from clva_lens.models.decoder_passes import DecoderPasses
from clva_lens.models.family import matching_family
from clva_lens.models.kv_cache import CACHE
from clva_lens.models.prompt import Asked, Prompt, as_prompt, model_inputs
from clva_lens.models.transformerlens import transformer_lens

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]


class MethodHooks(list[Hook]):
    """What ``run_with_hooks(fwd_hooks=...)`` of TransformerLens takes: names and functions.

    ``sessions`` are behind them; after a run, that of a CLVA has its ``anchors``.
    """

    def __init__(self, hooks: Sequence[Hook], sessions: Sequence[Session]) -> None:
        """Keep the hooks in order."""
        super().__init__(hooks)
        self.sessions = tuple(sessions)


def image_token_id(model: Any) -> int:
    """Return the id of a model's image token: its family's, or the one in its configuration.

    Raises:
        ModelLoadError: if the configuration names none.
    """
    family = matching_family(model)
    if family is not None:
        return family.image_token_id(model)
    image = getattr(model.config, "image_token_id", None)
    if image is None:
        raise ModelLoadError(
            f"{type(model).__name__}'s configuration has no image_token_id, so its image tokens "
            "cannot be found in a prompt. Load a vision-language model whose image tokens stand in "
            "the prompt."
        )
    return image


def asked_tensors(bridge: Any, asked: Asked) -> Mapping[str, Tensor]:
    """Return what a bridge is asked as its inputs, for models of no known family too.

    Raises:
        PromptError: if it is no prompt, no processor's output and no (image, question), or the
            bridge has no processor to make one of that.
    """
    if isinstance(asked, Mapping) and not isinstance(asked, Prompt):
        return model_inputs(bridge.original_model, asked)
    return asked if isinstance(asked, Prompt) else as_prompt(bridge, asked)


def prompt_spans(model: Any, inputs: Mapping[str, Tensor]) -> TokenSpans:
    """Return which positions of a prompt's ``input_ids`` are image, text and so on.

    Raises:
        ModelLoadError: if the model's configuration names no image token.
    """
    mask = inputs.get("attention_mask")
    return TokenSpans.from_ids(inputs["input_ids"], image_token_id(model), mask)


def method_hooks(
    sessions_for: Callable[[Target], list[Session]], bridge: Any, prompt: Asked
) -> MethodHooks:
    """Return a method's sessions as hooks for one prompt on a ``TransformerBridge``.

    Raises:
        InterventionError: if ``bridge`` is no bridge, or its attention cannot be edited by hooks.
        ParameterError: if the method does not fit the model.
    """
    lens = transformer_lens()
    if not isinstance(bridge, lens.bridge):
        raise InterventionError(
            f"as_hooks() needs a TransformerBridge, but got {type(bridge).__name__}. Pass "
            "cl.to_transformer_lens(model), or use cl.intervening(model, method)."
        )
    fixed = [
        type(block.attn).__name__
        for block in bridge.blocks
        if not isinstance(getattr(block, "attn", None), lens.editable)
    ]
    if fixed:
        raise InterventionError(
            f"TransformerLens leaves the attention of {bridge.cfg.architecture} to transformers "
            f"({fixed[0]}) and drops what hooks make of its scores, so the method would do nothing."
            " Use a model of the LLaVA kind or, if clva_lens loads this one, cl.intervening()."
        )
    sessions = sessions_for(_BridgeTarget(bridge))
    if any(session.edits_logits for session in sessions):
        raise InterventionError(
            "the method edits logits, for which it may run the model a second time, and hooks of "
            "one TransformerLens pass cannot do that. Use cl.intervening(model, method)."
        )
    watch = _Watch(bridge.original_model, asked_tensors(bridge, prompt))
    hooks: list[Hook] = [("embed.hook_in", watch.begin)]
    for layer in sorted({layer for session in sessions for layer in session.layers}):
        edit = _ScoresHook(layer, watch, tuple(s for s in sessions if layer in s.layers))
        hooks.append((f"blocks.{layer}.attn.hook_attn_scores", edit))
        if any(session.edits_output for session in edit.sessions):
            hooks.append((f"blocks.{layer}.attn.hook_z", edit.output))
    for part, layer in sorted({place for session in sessions for place in session.streams}):
        wanting = tuple(s for s in sessions if (part, layer) in s.streams)
        hook = _StreamHook(part, layer, watch, wanting)
        hooks.append((stream_name("decoder", part, layer), hook))
    return MethodHooks(hooks, sessions)


class _BridgeTarget(Target):
    """The one site of a bridge, for models of no known family too."""

    def __init__(self, bridge: Any) -> None:
        super().__init__(bridge.original_model)
        self.bridge = bridge

    def at(self, site: str | None = None) -> Shape:
        """Return the shape of the decoder."""
        if site not in (None, "decoder"):
            raise ParameterError(
                f"a TransformerBridge has no attention site {site!r}; it has 'decoder'. Pass "
                "site='decoder', or leave it out."
            )
        depth = self.bridge.cfg.n_layers
        return Shape("decoder", tuple(range(depth)), depth, self.bridge.cfg.n_heads)

    def readout(self) -> Readout:
        """Return the model's own norm and unembedding, which the bridge wraps."""
        parts = [
            getattr(one, "original_component", one)
            for one in (self.bridge.ln_final, self.bridge.unembed)
        ]
        return Readout(*parts, d_head=self.bridge.cfg.d_head)


class _Watch:
    """Follows the token ids that reach the embedding, and says which pass is running."""

    def __init__(self, model: Any, prompt: Mapping[str, Tensor]) -> None:
        self.ids: Int[Tensor, "batch sequence"] = prompt["input_ids"]
        self.mask = prompt.get("attention_mask")
        self.image_token_id = image_token_id(model)
        self.passes = DecoderPasses(model, self.image_token_id)
        self.seen: set[int] = set()
        self.edited: _ScoresCall | None = None

    def begin(self, ids: Tensor, hook: Any) -> None:
        """Begin with the prompt, or go on to a generated token."""
        step = self.passes.step
        if self._is_prompt(ids):
            cached = 0
        elif step is not None and ids.shape == (len(self.ids), 1):
            cached = step.keys
        else:
            raise InterventionError(
                f"the bridge reads token ids of shape {tuple(ids.shape)}, which are neither the "
                f"prompt that the hooks were made for ({tuple(self.ids.shape)}) nor the next token "
                "of each sample. Make hooks for this prompt with as_hooks(bridge, prompt), and "
                "generate with use_past_kv_cache=True."
            )
        cache = SimpleNamespace(get_seq_length=lambda: cached)
        told = {"input_ids": self.ids if cached == 0 else ids, CACHE: cache}
        self.passes.watch((), told | {"attention_mask": self.mask})
        self.seen = set()

    def _is_prompt(self, ids: Tensor) -> bool:
        if ids.shape != self.ids.shape:
            return False
        # Models with an image token outside their vocabulary embed another one in its place.
        own = self.ids.to(ids.device)
        return bool(((ids == own) | (own == self.image_token_id)).all())

    def call(self, layer: int, scores: Tensor) -> "_ScoresCall":
        """Return what the sessions see of a layer."""
        step = self.passes.step
        keys = scores.shape[3]
        if step is None or layer in self.seen or step.keys != keys:
            raise InterventionError(
                f"layer {layer} attends over {keys} keys without the bridge having read the prompt "
                "that the hooks were made for (token embeddings were passed, or a filled "
                "key-value cache). Run the bridge on the prompt's input_ids under the hooks."
            )
        self.seen.add(layer)
        return _ScoresCall(layer, step, scores, _like_keys(scores), None, None, 1.0, formed=scores)


@dataclass(eq=False)
class _ScoresCall(AttentionCall):
    """Attention of which the masked scores are known: they stand in the place of the queries.

    Sessions take only sizes from ``query`` and ``key``; ``rows`` and ``products`` are all they
    read. ``formed`` are the scores before any session's bias.
    """

    formed: Float[Tensor, "batch head query key"] = field(kw_only=True)

    def products(self, start: int, stop: int) -> Float[Tensor, "batch head row key"]:
        """Return the scores of query rows as the bridge formed them, under its mask."""
        return self.formed[:, :, start:stop].float()

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head row key"]:
        """Return the pattern of query rows ``start`` to ``stop``; each row sums to 1."""
        scores = self.query[:, :, start:stop].float()
        # A row of padding that sees nothing (compatibility mode masks with −inf) is not NaN.
        return scores.clamp_min(torch.finfo(torch.float32).min).softmax(dim=-1)


def _like_keys(scores: Float[Tensor, "batch head query key"]) -> Tensor:
    """Return something of the size of keys that scores stand for; it takes no memory."""
    return scores[:, :, :1].mT.expand(-1, -1, -1, scores.shape[3])


@dataclass(frozen=True, eq=False)
class _ScoresHook:
    """The hook of one layer: each session sees the scores as those before it left them."""

    layer: int
    watch: _Watch
    sessions: tuple[Session, ...]

    def __call__(self, scores: Tensor, hook: Any) -> Tensor | None:
        """Return the scores with the sessions' biases, in float32; None without any."""
        call = self.watch.call(self.layer, scores)
        for session in self.sessions:
            bias = session.attention(call)
            if bias is not None:
                call = replace(call, query=call.query + dense(bias))
        self.watch.edited = call if any(s.edits_output for s in self.sessions) else None
        return None if call.query is scores else call.query

    def output(self, z: Tensor, hook: Any) -> Tensor | None:
        """Return what the heads put out, flat or by head, as the sessions leave it."""
        call, self.watch.edited = self.watch.edited, None
        assert call is not None and call.layer == self.layer
        out = z.reshape(*z.shape[:2], call.query.shape[1], -1)
        for session in self.sessions:
            edited = session.output(call, out) if session.edits_output else None
            out = out if edited is None else edited
        return out.reshape(z.shape)


@dataclass(frozen=True, eq=False)
class _StreamHook:
    """The hook of one part of a layer: each session sees it as those before it left it."""

    part: Part
    layer: int
    watch: _Watch
    sessions: tuple[Session, ...]

    def __call__(self, hidden: Tensor, hook: Any) -> Tensor | None:
        """Return what replaces this part of the residual stream; None for no edit."""
        step = self.watch.passes.step
        if step is None or step.keys != step.offset + hidden.shape[1]:
            raise InterventionError(
                f"layer {self.layer} reads {hidden.shape[1]} positions without the bridge having "
                "read the prompt that the hooks were made for. Run the bridge on the prompt's "
                "input_ids under the hooks."
            )
        call, found = StreamCall(self.part, self.layer, step), hidden
        for session in self.sessions:
            edited = session.stream(call, found)
            found = found if edited is None else edited
        return None if found is hidden else found
