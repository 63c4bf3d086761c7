"""TransformerLens' names of activations, and where transformers' modules make them: facts only.

Each table is in the order of the forward pass, which is the order in which nnsight serves values.
Forms: ``stream`` is [batch, pos, width], ``heads`` [batch, pos, head, d_head] (keys and values of
grouped heads have fewer), ``scale`` [batch, pos, 1] and ``normalized`` [batch, pos, d_model] belong
to a norm, before its weight; ``result`` is [batch, pos, head, d_model]. ``pattern`` and
``attn_scores`` are [batch, head, query_pos, key_pos], ``rot_q``, ``rot_k`` and ``value`` (as the
kernel gets them) as ``heads``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from clva_lens.ground.errors import ModelLoadError
from clva_lens.models.final_logits import FinalLogits

ValueForm = Literal[
    "stream",
    "heads",
    "scale",
    "normalized",
    "result",
    "pattern",
    "attn_scores",
    "rot_q",
    "rot_k",
    "value",
]


class Tap(NamedTuple):
    """Where a block has an activation: a module's "input" or "output", or an argument's name.

    "attention" is inside of the module: between its queries and keys, and its output. ``part`` is
    which of the ``parts`` of a joint projection. The activation is ``times`` what is there.
    """

    path: str
    side: str
    form: ValueForm = "stream"
    part: int | None = None
    parts: int = 3
    times: float = 1.0


class Place(NamedTuple):
    """A named activation of a model, and its module.

    ``site`` is the attention site that shows it, if one does; ``layer`` counts within the stack.
    Places of one ``group`` are near each other in the forward pass.
    """

    name: str
    module: nn.Module
    tap: Tap
    group: str
    layer: int
    d_head: int
    site: str | None


class Sublayers(NamedTuple):
    """The modules of a layer around its heads, in the order of its pass.

    ``project`` takes what the heads put out; ``feed`` is the MLP, run one after another.
    """

    norm: nn.Module
    project: nn.Module
    norm_feed: nn.Module
    feed: tuple[nn.Module, ...]


class Written(NamedTuple):
    """How what a layer's blocks put out reaches the residual stream.

    ``heads`` is the projection of what its heads put out, each ``d_head`` wide; None without any.
    Attention is added after the norm ``after``, if there is one; what is added is ``times`` that,
    also of the MLP, whose last projection is ``mlp`` (None: it is not one). The whole stream leaves
    the layer ``leaves`` times as large. ``gated``: what the heads put out is multiplied by gates
    before it is projected.
    """

    heads: nn.Module | None
    d_head: int
    after: nn.Module | None = None
    times: float = 1.0
    leaves: float = 1.0
    mlp: nn.Module | None = None
    gated: bool = False


class Readout(NamedTuple):
    """Modules of a language model that make logits of its residual stream, and those before them.

    ``copies`` makes one stream of several, where a model has several; ``final`` is what happens to
    the unembedding's output. ``written`` is by layer, ``sublayers`` too: None for a layer that has
    more in it; neither is known of a bridge. ``unsummed`` says why the stream is no sum of what
    heads and MLPs add, if it is none.
    """

    norm: nn.Module
    unembed: nn.Module
    d_head: int
    final: FinalLogits = FinalLogits()
    copies: nn.Module | None = None
    written: tuple[Written, ...] = ()
    sublayers: tuple[Sublayers | None, ...] = ()
    unsummed: str | None = None


class Missing(NamedTuple):
    """Names that a model's layers do not have, and why; ``layers`` None are all of them.

    A name stands for all that begin with it, as "attn" for "attn.hook_q".
    """

    names: tuple[str, ...]
    reason: str
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """Return the reason, with the layers that it holds for."""
        if self.layers is None:
            return self.reason
        return f"{self.reason} (layers {', '.join(map(str, self.layers))})"


class Activations(NamedTuple):
    """Every activation of a model that has a name, in the order of the forward pass."""

    places: tuple[Place, ...]
    readout: Readout
    missing: tuple[Missing, ...] = ()


def attention(path: str, q: Tap, k: Tap, v: Tap, out: str, rotary: bool) -> dict[str, Tap]:
    """Return the names within one attention; a rotary one has queries and keys before and after."""
    turned = {
        "hook_rot_q": Tap(path, "attention", "rot_q"),
        "hook_rot_k": Tap(path, "attention", "rot_k"),
    }
    return {
        **(turned if rotary else {}),
        "hook_attn_scores": Tap(path, "attention", "attn_scores"),
        "hook_pattern": Tap(path, "attention", "pattern"),
        "hook_q": q,
        "hook_k": k,
        "hook_v": v,
        "hook_z": Tap(out, "input", "heads"),
        "hook_result": Tap(out, "input", "result"),
    }


def projected(path: str, q: str, k: str, v: str, out: str, rotary: bool = False) -> dict[str, Tap]:
    """Return the names within an attention that has a projection each."""
    taps = [Tap(f"{path}.{name}", "output", "heads") for name in (q, k, v)]
    return attention(path, taps[0], taps[1], taps[2], out, rotary)


def within(prefix: str, taps: Mapping[str, Tap]) -> dict[str, Tap]:
    """Return taps under a longer name."""
    return {f"{prefix}.{name}": tap for name, tap in taps.items()}


def norm(name: str, path: str) -> dict[str, Tap]:
    """Return the names of a norm."""
    return {
        f"{name}.hook_scale": Tap(path, "input", "scale"),
        f"{name}.hook_normalized": Tap(path, "input", "normalized"),
    }


_BLIP_ATTENTION = attention(
    "self_attn",
    Tap("self_attn.qkv", "output", "heads", 0),
    Tap("self_attn.qkv", "output", "heads", 1),
    Tap("self_attn.qkv", "output", "heads", 2),
    "self_attn.projection",
    rotary=False,
)

OPT: dict[str, Tap] = {
    "hook_resid_pre": Tap("", "input"),
    **norm("ln1", "self_attn_layer_norm"),
    **within("attn", projected("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj")),
    "hook_attn_out": Tap("self_attn.out_proj", "output"),
    "hook_resid_mid": Tap("final_layer_norm", "input"),
    **norm("ln2", "final_layer_norm"),
    "mlp.hook_pre": Tap("fc1", "output"),
    "mlp.hook_post": Tap("fc2", "input"),
    "hook_mlp_out": Tap("fc2", "output"),
    "hook_resid_post": Tap("", "output"),
}

CLIP: dict[str, Tap] = {
    "hook_resid_pre": Tap("", "input"),
    **norm("ln1", "layer_norm1"),
    **within("attn", projected("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj")),
    "hook_attn_out": Tap("self_attn.out_proj", "output"),
    "hook_resid_mid": Tap("layer_norm2", "input"),
    **norm("ln2", "layer_norm2"),
    "mlp.hook_pre": Tap("mlp.fc1", "output"),
    "mlp.hook_post": Tap("mlp.fc2", "input"),
    "hook_mlp_out": Tap("mlp.fc2", "output"),
    "hook_resid_post": Tap("", "output"),
}

BLIP_VISION: dict[str, Tap] = {
    "hook_resid_pre": Tap("", "input"),
    **norm("ln1", "layer_norm1"),
    **within("attn", _BLIP_ATTENTION),
    "hook_attn_out": Tap("self_attn.projection", "output"),
    "hook_resid_mid": Tap("layer_norm2", "input"),
    **norm("ln2", "layer_norm2"),
    "mlp.hook_pre": Tap("mlp.fc1", "output"),
    "mlp.hook_post": Tap("mlp.fc2", "input"),
    "hook_mlp_out": Tap("mlp.fc2", "output"),
    "hook_resid_post": Tap("", "output"),
}

# The Q-Former normalises after each sum, so its residual names are what its norms put out.
QFORMER: dict[str, Tap] = {
    "hook_resid_pre": Tap("", "input"),
    **within(
        "attn",
        projected("attention.attention", "query", "key", "value", "attention.output.dense"),
    ),
    "hook_attn_out": Tap("attention.output.dense", "output"),
    "hook_resid_mid": Tap("attention", "output"),
}
QFORMER_CROSS: dict[str, Tap] = {
    **within(
        "cross_attn",
        projected(
            "crossattention.attention", "query", "key", "value", "crossattention.output.dense"
        ),
    ),
    "hook_cross_attn_out": Tap("crossattention.output.dense", "output"),
    "hook_resid_mid_cross": Tap("crossattention", "output"),
}
QFORMER_MLP: dict[str, Tap] = {
    "mlp.hook_pre": Tap("intermediate_query.dense", "output"),
    "mlp.hook_post": Tap("output_query.dense", "input"),
    "hook_mlp_out": Tap("output_query.dense", "output"),
    "hook_resid_post": Tap("", "output"),
}


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers of one kind: the prefix of their names, and the attention sites that show them."""

    prefix: str
    sites: Mapping[str, str]

    def embed(self, block: nn.Module) -> Place:
        """Name what enters the first layer."""
        group = f"{self.prefix}blocks.0"
        return Place(f"{self.prefix}hook_embed", block, Tap("", "input"), group, 0, 0, None)

    def block(
        self, layer: int, module: nn.Module, taps: Mapping[str, Tap], d_head: int
    ) -> Iterator[Place]:
        """Name the activations of one layer."""
        group = f"{self.prefix}blocks.{layer}"
        for name, tap in taps.items():
            site = self.sites.get(name.split(".")[0]) if tap.side == "attention" else None
            found = module.get_submodule(tap.path)
            yield Place(f"{group}.{name}", found, tap, group, layer, d_head, site)

    def beside(self, module: nn.Module, taps: Mapping[str, Tap]) -> Iterator[Place]:
        """Name activations beside the layers."""
        for name, tap in taps.items():
            found = module.get_submodule(tap.path)
            yield Place(self.prefix + name, found, tap, self.prefix + tap.path, 0, 0, None)


def opt(decoder: Any, unembed: nn.Module) -> Activations:
    """Return the activations of an OPT decoder, whose positions are learned and added.

    Raises:
        ModelLoadError: if it normalises after each sum, or projects its embeddings (OPT-350m).
    """
    layers = decoder.layers
    if decoder.final_layer_norm is None or decoder.project_out is not None:
        raise ModelLoadError(
            "this OPT normalises after each sum or projects its embeddings, as OPT-350m does, so "
            "its residual stream has no TransformerLens names. Load a model with another OPT."
        )
    d_head = layers[0].self_attn.head_dim
    stack = Stack(prefix="", sites={"attn": "decoder"})
    embed = {
        "hook_embed": Tap("", "inputs_embeds"),
        "hook_pos_embed": Tap("embed_positions", "output"),
    }
    places = [*stack.beside(decoder, embed)]
    for layer, block in enumerate(layers):
        places += stack.block(layer, block, OPT, d_head)
    places += stack.beside(decoder, norm("ln_final", "final_layer_norm"))
    written = tuple(Written(block.self_attn.out_proj, d_head, mlp=block.fc2) for block in layers)
    sublayers = tuple(
        Sublayers(
            block.self_attn_layer_norm,
            block.self_attn.out_proj,
            block.final_layer_norm,
            (block.fc1, block.activation_fn, block.fc2),
        )
        for block in layers
    )
    readout = Readout(
        decoder.final_layer_norm, unembed, d_head, written=written, sublayers=sublayers
    )
    return Activations(tuple(places), readout)


def vision(layers: Any, taps: Mapping[str, Tap]) -> list[Place]:
    """Return the activations of a vision tower's layers, under "vision."."""
    _made_of(layers[0], ("self_attn", "mlp", "layer_norm1", "layer_norm2"))
    d_head = layers[0].self_attn.head_dim
    stack = Stack(prefix="vision.", sites={})
    places = [stack.embed(layers[0])]
    for layer, block in enumerate(layers):
        places += stack.block(layer, block, taps, d_head)
    return places


def qformer(layers: Any) -> list[Place]:
    """Return the activations of a Q-Former, under "qformer."."""
    d_head = layers[0].attention.attention.attention_head_size
    stack = Stack(prefix="qformer.", sites={"cross_attn": "qformer"})
    places = [stack.embed(layers[0])]
    for layer, block in enumerate(layers):
        cross = QFORMER_CROSS if block.has_cross_attention else {}
        places += stack.block(layer, block, QFORMER | cross | QFORMER_MLP, d_head)
    return places


def _made_of(block: nn.Module, parts: tuple[str, ...]) -> None:
    found = {name for name, part in block.named_children() if any(True for _ in part.parameters())}
    if found != set(parts):
        raise ModelLoadError(
            f"a layer ({type(block).__name__}) is made of {', '.join(sorted(found))}, but the "
            f"table of TransformerLens' names is for layers of {', '.join(sorted(parts))}. Write "
            "a table for it (clva_lens/models/activations.py), or read it inside "
            "model.trace(prompt)."
        )
