"""What has a TransformerLens name in a decoder, and what its layers are made of: facts only.

A layer is known by the names of its modules: which norms stand before and after attention and MLP
(``LAYOUTS``), what makes queries, keys and values, and what the MLP is (``MLPS``). What is of no
known make has no name, and ``Activations.missing`` says why.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from clva_lens.ground.errors import ModelLoadError
from clva_lens.models.activations import (
    Activations,
    Missing,
    Place,
    Readout,
    Stack,
    Sublayers,
    Tap,
    Written,
    norm,
    within,
)
from clva_lens.models.final_logits import final_logits


class Norms(NamedTuple):
    """The norms of a layer by name: before and after its attention, before and after its MLP.

    ``parallel``: attention and MLP read the same norm's output, and their sum is added.
    """

    before: str | None = None
    after: str | None = None
    before_feed: str | None = None
    after_feed: str | None = None
    parallel: bool = False


LAYOUTS = {
    frozenset(name for name in norms[:4] if name is not None): norms
    for norms in (
        Norms("input_layernorm", None, "post_attention_layernorm"),
        Norms("attention_layernorm", None, "feedforward_layernorm"),
        Norms("operator_norm", None, "ffn_norm"),
        Norms("operator_norm", "post_operator_norm", "ffn_norm", "post_ffn_norm"),
        Norms(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        Norms(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
        Norms("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
        Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        Norms("input_layernorm", parallel=True),
    )
}
MIXERS = ("self_attn", "linear_attn", "conv")
FEEDS = ("mlp", "feed_forward")
OUTPUTS = ("o_proj", "out_proj", "dense")
GATES = {"g_proj", "gate_proj"}
ACTIVATIONS = {"act_fn", "activation_fn"}  # some have parameters
# What goes into the activation function, what is multiplied with it, and what reads the product.
MLPS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("up_proj", None, "down_proj"),
    ("w1", "w3", "w2"),
    ("fc1", None, "fc2"),
    ("dense_h_to_4h", None, "dense_4h_to_h"),
)
JOINT = "gate_up_proj"
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm")
PER_LAYER = "per_layer"
EXPERTS = "its MLP is several experts, of which each token goes through some"
COPIES = "its stream is several copies, which each block reads and writes by weights of its own"
UNKNOWN_NORMS = "its layers' norms are of no known arrangement"


def decoder(
    model: nn.Module, stack: Any, unembed: nn.Module, attention: Mapping[int, nn.Module]
) -> Activations:
    """Return the activations of a decoder, under TransformerLens' plain names.

    ``stack`` has the decoder's layers and final norm, ``model`` its unembedding, ``attention`` are
    the modules of softmax attention by layer.

    Raises:
        ModelLoadError: if there is no final norm.
    """
    layers = [_Layer(block, attention.get(i)) for i, block in enumerate(stack.layers)]
    final = next(
        (one for one in FINAL_NORMS if isinstance(getattr(stack, one, None), nn.Module)), None
    )
    if final is None:
        raise ModelLoadError(
            f"no final norm was found in a {type(stack).__name__} (looked for "
            f"{', '.join(FINAL_NORMS)}), so its residual stream cannot be read out. Write the "
            "readout of this family (ModelFamily.activations; clva_lens/models/decoders.py)."
        )
    named = Stack(prefix="", sites={"attn": "decoder"})
    places: list[Place] = [named.embed(stack.layers[0])]
    for i, layer in enumerate(layers):
        places += named.block(i, layer.block, layer.taps(), layer.d_head)
    places += named.beside(stack, norm("ln_final", final))
    readout = Readout(
        norm=getattr(stack, final),
        unembed=unembed,
        final=final_logits(model, unembed),
        copies=getattr(stack, "hc_head", None),
        d_head=next((one.d_head for one in layers if one.d_head), 0),
        written=tuple(layer.written() for layer in layers),
        sublayers=tuple(layer.sublayers() for layer in layers),
        unsummed=next((one.unsummed for one in layers if one.unsummed is not None), None),
    )
    return Activations(tuple(places), readout, _joined(layers))


class _Layer:
    """One layer: its modules by what they are for, and what has no name in it."""

    def __init__(self, block: Any, attention: nn.Module | None) -> None:
        self.block, self.attention = block, attention
        parts = {name: one for name, one in block.named_children() if _holds(one)}
        self.mixer = next((name for name in MIXERS if name in parts), None)
        self.feed = next((name for name in FEEDS if name in parts), None)
        rest = frozenset(parts) - {self.mixer, self.feed}
        self.copies = any(name.endswith("_hc") for name in dict(block.named_children()))
        norms = rest - {name for name in rest if PER_LAYER in name}
        found = None if self.copies else LAYOUTS.get(norms)
        self.known = found is not None
        self.norms = found or Norms()
        self.missing: list[tuple[tuple[str, ...], str]] = []
        self.unsummed = self._unsummed(rest)
        self.times = float(getattr(block, "residual_multiplier", 1.0))
        self.path = _path(block, attention)
        self.out = None if attention is None else _child(attention, OUTPUTS)
        self.d_head = 0 if attention is None else _d_head(attention)
        self.down: nn.Module | None = None

    def _unsummed(self, rest: frozenset[str]) -> str | None:
        if self.copies:
            return COPIES
        if any(PER_LAYER in name for name in rest):
            return "each of its layers adds embeddings of its own, besides attention and MLP"
        if not self.known or self.feed is None or self.mixer is None:
            return f"{UNKNOWN_NORMS} ({', '.join(sorted(rest))})"
        return None

    def taps(self) -> dict[str, Tap]:
        """Return the names, in the order of the pass; what has none is noted as missing."""
        norms, times = self.norms, self.times
        taps = {"hook_resid_pre": Tap("", "input")}
        taps |= {} if norms.before is None else norm("ln1", norms.before)
        taps |= within("attn", self._attention_taps())
        taps |= {} if norms.after is None else norm("ln1_post", norms.after)
        mixed = norms.after or self._output_of_mixer()
        if self.known and mixed is not None:
            taps["hook_attn_out"] = Tap(mixed, "output", times=times)
        fed = self.feed
        if norms.before_feed is not None:
            taps["hook_resid_mid"] = Tap(norms.before_feed, "input")
            taps |= norm("ln2", norms.before_feed)
        elif self.known and not norms.parallel and fed is not None:
            taps["hook_resid_mid"] = Tap(fed, "input")
        inside, output = self._feed_taps()
        taps |= within("mlp", inside)
        taps |= {} if norms.after_feed is None else norm("ln2_post", norms.after_feed)
        if self.known and output is not None:
            taps["hook_mlp_out"] = Tap(norms.after_feed or output, "output", times=times)
        taps["hook_resid_post"] = Tap("", "output")
        self._note_norms()
        return taps

    def _note_norms(self) -> None:
        if not self.known:
            outer = ("ln1", "ln2", "hook_attn_out", "hook_resid_mid", "hook_mlp_out")
            self.missing.append((outer, self.unsummed or UNKNOWN_NORMS))
        elif self.norms.parallel:
            both = ("hook_resid_mid", "ln2")
            self.missing.append((both, "its attention and its MLP read the same norm's output"))
        elif self.norms.before is None:
            self.missing.append((("ln1", "ln2"), "it has norms after attention and MLP only"))

    def _output_of_mixer(self) -> str | None:
        if self.path is not None and self.out is not None:
            return f"{self.path}.{self.out}"
        return self.mixer

    def _attention_taps(self) -> dict[str, Tap]:
        attention, path, out = self.attention, self.path, self.out
        if attention is None or path is None:
            self.missing.append((("attn",), "it has no softmax attention"))
            return {}
        taps = {
            "hook_rot_q": Tap(path, "attention", "rot_q"),
            "hook_rot_k": Tap(path, "attention", "rot_k"),
            "hook_attn_scores": Tap(path, "attention", "attn_scores"),
            "hook_pattern": Tap(path, "attention", "pattern"),
        }
        apart = all(isinstance(getattr(attention, f"{one}_proj", None), nn.Module) for one in "qkv")
        if not apart:
            why = "queries and keys have no projection of their own each"
            self.missing.append((("attn.hook_q", "attn.hook_k"), why))
            taps["hook_v"] = Tap(path, "attention", "value")
        else:
            if self._doubled(getattr(attention, "q_proj", None)):
                why = "queries come out of one projection with their gates"
                self.missing.append((("attn.hook_q",), why))
            else:
                taps["hook_q"] = Tap(f"{path}.q_proj", "output", "heads")
            taps["hook_k"] = Tap(f"{path}.k_proj", "output", "heads")
            taps["hook_v"] = Tap(f"{path}.v_proj", "output", "heads")
        if out is not None:
            taps["hook_z"] = Tap(f"{path}.{out}", "input", "heads")
            taps["hook_result"] = Tap(f"{path}.{out}", "input", "result")
        return taps

    def _feed_taps(self) -> tuple[dict[str, Tap], str | None]:
        """Return the names within the MLP, and the path of what it puts out."""
        path = self.feed
        if path is None:
            return {}, None
        feed = getattr(self.block, path)
        parts = {name for name, one in feed.named_children() if _holds(one)} - ACTIVATIONS
        if parts == {JOINT, "down_proj"}:
            self.down = feed.down_proj
            return {
                "hook_pre": Tap(f"{path}.{JOINT}", "output", part=0, parts=2),
                "hook_pre_linear": Tap(f"{path}.{JOINT}", "output", part=1, parts=2),
                "hook_post": Tap(f"{path}.down_proj", "input"),
            }, f"{path}.down_proj"
        for pre, linear, down in MLPS:
            if parts == {pre, linear, down} - {None}:
                self.down = getattr(feed, down)
                taps = {"hook_pre": Tap(f"{path}.{pre}", "output")}
                if linear is not None:
                    taps["hook_pre_linear"] = Tap(f"{path}.{linear}", "output")
                taps["hook_post"] = Tap(f"{path}.{down}", "input")
                return taps, f"{path}.{down}"
        self.missing.append((("mlp",), EXPERTS))
        return {}, path

    def written(self) -> Written:
        """Return how the layer's heads and its MLP reach the stream."""
        after = self.norms.after
        scalar = getattr(self.block, "layer_scalar", None)
        return Written(
            heads=None if self.out is None else getattr(self.attention, self.out),
            d_head=self.d_head,
            after=None if after is None else getattr(self.block, after),
            times=self.times,
            leaves=1.0 if scalar is None else float(scalar),
            mlp=self.down,
            gated=self.gated,
        )

    def sublayers(self) -> Sublayers | None:
        """Return the layer's modules, if it is a norm, heads, a norm and an MLP, and no more."""
        norms, out = self.norms, self.out
        simple = norms.before_feed is not None and norms.after is None and norms.after_feed is None
        if not simple or out is None or self.down is None or self.times != 1.0:
            return None
        if self.unsummed is not None or self.gated:
            return None
        block = self.block
        before, feed = getattr(block, str(norms.before)), getattr(block, str(self.feed))
        project = getattr(self.attention, out)
        return Sublayers(before, project, getattr(block, str(norms.before_feed)), (feed,))

    @property
    def gated(self) -> bool:
        """Whether what the heads put out is multiplied by gates before it is projected."""
        parts: Any = {} if self.attention is None else dict(self.attention.named_children())
        return bool(GATES & parts.keys()) or self._doubled(parts.get("q_proj"))

    def _doubled(self, query: Any) -> bool:
        """Whether a projection makes queries and gates."""
        out: Any = None if self.out is None else getattr(self.attention, self.out)
        return out is not None and getattr(query, "out_features", 0) == 2 * out.in_features


def _holds(part: nn.Module) -> bool:
    """Return whether a module has parameters."""
    return next(part.parameters(), None) is not None


def _child(module: nn.Module, names: Iterable[str]) -> str | None:
    return next((one for one in names if isinstance(getattr(module, one, None), nn.Module)), None)


def _path(block: nn.Module, module: nn.Module | None) -> str | None:
    """Return the path of a module within a layer."""
    return next((path for path, one in block.named_modules() if one is module), None)


def _d_head(attention: Any) -> int:
    """Return the width of what one head puts out."""
    return getattr(attention, "v_head_dim", None) or attention.head_dim


def _joined(layers: list[_Layer]) -> tuple[Missing, ...]:
    found: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for number, layer in enumerate(layers):
        for names, reason in layer.missing:
            found.setdefault((names, reason), []).append(number)
    return tuple(
        Missing(names, reason, None if len(which) == len(layers) else tuple(which))
        for (names, reason), which in found.items()
    )
