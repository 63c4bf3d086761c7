"""Edge attribution: which head or MLP matters to the answer through which later layer.

An edge (u, v) carries what u writes to the residual stream to where v reads it. Giving v alone the
source's value of u changes the metric m by about

    (a_u,source − a_u,target) · ∂m/∂x_v,

x_v being the stream as v reads it (EAP, Syed et al., arXiv:2310.10348). EAP-IG takes the mean of
the gradients over ``steps`` runs whose input embeddings lie at k/steps of the way from the target
to the source, k = 1 … steps (Hanna et al., arXiv:2403.17806). Writers are the embedding, each head
and each MLP; readers are each layer's attention and MLP, and the logits: what their norm reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.engine.stream import Stream, StreamCall
from clva_lens.figures import patching as draw_patching
from clva_lens.ground.ambient import exact
from clva_lens.ground.drawn import SelfDrawn
from clva_lens.ground.errors import ModelLoadError, ParameterError
from clva_lens.ground.parameters import is_integer
from clva_lens.ground.progress import progress_bar
from clva_lens.lens.intervene import refuse_in_trace
from clva_lens.lens.margins import MARGIN
from clva_lens.lens.patch_estimates import check_aligned, gradients, run_through
from clva_lens.lens.patching import LogitMetric, reader_of
from clva_lens.methods.base import MethodLike
from clva_lens.methods.target import shape_of
from clva_lens.models.belonging import hook_before
from clva_lens.models.family import find_family, transformers_model
from clva_lens.models.prompt import Asked, Prompt, as_prompt
from clva_lens.models.readout import CacheModel

HowEdges = Literal["eap", "eap-ig"]


class Edge(NamedTuple):
    """A writer and a reader: "embed", "h3.5" (layer, head) or "m3"; "a4", "m4" or "logits"."""

    writer: str
    reader: str


@dataclass(frozen=True, eq=False, repr=False)
class EdgeAttribution(SelfDrawn):
    """What each edge would change the metric by, [batch, writer, reader]; 0 where there is none.

    ``exists`` says which edges there are, ``passes`` counts forward and backward ones.
    """

    scores: Float[Tensor, "batch writer reader"]
    exists: Bool[Tensor, "writer reader"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    target: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]
    how: str
    label: str
    passes: int

    def top(self, count: int = 10) -> list[tuple[Edge, float]]:
        """Return the edges with the largest scores, of either sign, averaged over the batch."""
        mean = self.scores.mean(dim=0)
        size = mean.abs().masked_fill(~self.exists, -1.0)
        order = size.flatten().argsort(descending=True)[: min(count, int(self.exists.sum()))]
        places = [divmod(int(place), len(self.readers)) for place in order]
        return [(Edge(self.writers[u], self.readers[v]), float(mean[u, v])) for u, v in places]

    def draw(self, reader: str = "logits") -> Any:
        """Return what each head sends to a reader, by layer and head, drawn.

        Raises:
            ParameterError: if there is no such reader.
        """
        if reader not in self.readers:
            raise ParameterError(
                f"reader is {reader!r}, but readers are {', '.join(self.readers)}. Pass one."
            )
        heads = [one for one in self.writers if one.startswith("h")]
        layers = list(dict.fromkeys(int(one[1:].split(".")[0]) for one in heads))
        mean = self.scores.mean(dim=0)[:, self.readers.index(reader)]
        rows = torch.stack([mean[self.writers.index(one)] for one in heads])
        table = rows.reshape(len(layers), -1).float().cpu().numpy()
        label = f"effect on {self.label}\nthrough {reader} ({self.how})"
        across = "head that writes (index, 0-based)"
        return draw_patching(table, layers=layers, across=across, label=label)

    def __repr__(self) -> str:
        """Return the size, and the edges with the largest scores."""
        best = ", ".join(f"{u}→{v} {score:+.2f}" for (u, v), score in self.top(3))
        return f"EdgeAttribution({self.how}: {int(self.exists.sum())} edges; {best})"


def edge_attribution(
    model: Any,
    source: Asked,
    target: Asked,
    *,
    how: HowEdges = "eap",
    steps: int = 5,
    metric: LogitMetric | None = None,
    method: MethodLike | None = None,
) -> EdgeAttribution:
    """Return first-order estimates of every edge's effect between heads, MLPs and layers.

    "eap" takes two forward passes and one backward, "eap-ig" 2 + ``steps`` forward and ``steps``
    backward. ``patch_edges`` measures single edges.

    Args:
        model: the model that both prompts are for.
        source: whose activations would be taken: the same question about another picture.
        target: the prompt that is run, token for token as long as the source.
        how: "eap", or "eap-ig", with gradients along the way from the target to the source.
        steps: of "eap-ig".
        metric: as that of ``cl.attribution_patching``.
        method: holds in all runs, and gradients flow through it.

    Raises:
        ParameterError: if an argument does not fit, or the prompts do not line up.
        ModelLoadError: if the stream is no plain sum of what heads and MLPs write.
        InterventionError: inside a trace, or under gradient checkpointing.

    >>> edges = cl.edge_attribution(model, there, gone)
    >>> edges.scores.shape  # embedding, 12 × 8 heads and 12 MLPs; 12 × 2 layers and the logits
    torch.Size([1, 109, 25])
    """
    refuse_in_trace("edge_attribution", "")
    if how not in ("eap", "eap-ig") or not is_integer(steps) or steps < 1:
        raise ParameterError(
            f"how is {how!r} and steps is {steps}, but how is 'eap' or 'eap-ig', and steps >= 1. "
            "Pass how='eap'."
        )
    graph = _Graph(model, source, target, metric, method)
    with exact(), torch.inference_mode(False):
        with torch.no_grad():
            own = _Nodes(graph)
            before = graph.run(graph.source, own)
        first = _Nodes(graph)
        if how == "eap":
            after, slopes = graph.slopes(first, None)
        else:
            with torch.no_grad():
                after = graph.run(graph.target, first)
            slopes = graph.mean_slopes(first.values["embed"], own.values["embed"], steps)
        with torch.no_grad():
            scores = graph.scores(own, first, slopes)
    return EdgeAttribution(
        scores=scores,
        exists=graph.exists,
        writers=graph.writers,
        readers=graph.readers,
        target=after,
        source=before.expand_as(after),
        how=how,
        label=MARGIN if metric is None else getattr(metric, "__name__", "metric"),
        passes=3 if how == "eap" else 2 + 2 * steps,
    )


def patch_edges(
    model: Any,
    source: Asked,
    target: Asked,
    edges: Sequence[tuple[str, str]],
    *,
    metric: LogitMetric | None = None,
    method: MethodLike | None = None,
    progress: bool = True,
) -> Float[Tensor, "batch edge"]:
    """Return what each of these edges changes the metric by: a reader gets the source's writer.

    One pass an edge. All else that the reader reads, and all other readers, are the target's.

    Raises:
        ParameterError: if there is no such edge, or the prompts do not line up.
        ModelLoadError: as ``edge_attribution``.
    """
    graph = _Graph(model, source, target, metric, method)
    unknown = [one for one in edges if not graph.has(*one)]
    if unknown:
        raise ParameterError(
            f"there is no edge from '{unknown[0][0]}' to '{unknown[0][1]}'. Pass edges as "
            "edge_attribution(...).top() has them, such as ('h3.5', 'm4')."
        )
    found = []
    with exact(), torch.inference_mode(False), torch.no_grad():
        own, other = _Nodes(graph), _Nodes(graph)
        graph.run(graph.source, own)
        plain = graph.run(graph.target, other)
        with progress_bar("edges", len(edges), wanted=progress and len(edges) > 1) as advance:
            for writer, reader in edges:
                change = graph.written(own, writer) - graph.written(other, writer)
                found.append(graph.run(graph.target, _Nodes(graph, {reader: change})) - plain)
                advance(1)
    return torch.stack(found, dim=1)


class _Graph:
    """The writers and readers of a model, and the two prompts."""

    def __init__(
        self,
        model: Any,
        source: Asked,
        target: Asked,
        metric: LogitMetric | None,
        method: MethodLike | None,
    ) -> None:
        self.source, self.target = as_prompt(model, source), as_prompt(model, target)
        check_aligned(self.source, self.target)
        self.model, self.method = model, method
        self.found: Any = transformers_model(model)
        self.read: Callable[[Tensor], Tensor] = reader_of(model, metric)
        readout = find_family(self.found).activations(self.found).readout
        shape = shape_of(self.found, "decoder")
        written, sublayers = readout.written, readout.sublayers
        plain = readout.unsummed is None and len(shape.layers) == shape.depth == len(sublayers)
        if not plain or not all(
            two is not None and one.after is None and one.leaves == 1.0 and not one.gated
            for one, two in zip(written, sublayers, strict=True)
        ):
            raise ModelLoadError(
                f"the residual stream of this {type(self.found).__name__} is no plain sum of what "
                "heads and MLPs write, each read through a norm, so it has no edges here. Use "
                "cl.attribution_patching, which needs no such sum."
            )
        self.shape, self.times = shape, [one.times for one in written]
        config = self.found.config.get_text_config()
        self.blocks = CacheModel(readout, None, config, "").blocks
        norms: dict[str, Any] = {}
        for layer, one in enumerate(sublayers):
            assert one is not None
            norms |= {f"a{layer}": one.norm, f"m{layer}": one.norm_feed}
        self.norms = {**norms, "logits": readout.norm}
        self.readers = tuple(self.norms)
        heads = [f"h{i}.{head}" for i in range(shape.depth) for head in range(shape.heads)]
        self.writers = ("embed", *heads, *(f"m{i}" for i in range(shape.depth)))
        self.exists = torch.tensor([[self.has(u, v) for v in self.readers] for u in self.writers])

    def has(self, writer: str, reader: str) -> bool:
        """Whether a reader comes after a writer."""
        if writer not in self.writers or reader not in self.readers:
            return False
        if reader == "logits" or writer == "embed":
            return True
        wrote = int(writer[1:].split(".")[0]) * 2 + (writer[0] == "m")
        return wrote < int(reader[1:]) * 2 + (reader[0] == "m")

    def run(self, prompt: Prompt, nodes: "_Nodes") -> Float[Tensor, " batch"]:
        """Return the metric of a run."""
        return self.read(run_through(self.model, self.found, prompt, [nodes], self.method))

    def slopes(self, nodes: "_Nodes", embedding: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the metric of the target, and its gradient at each reader."""
        nodes.embedding = embedding
        with torch.enable_grad():
            value = self.run(self.target, nodes)
            found = gradients(value, list(nodes.added.values()))
        return value.detach(), dict(zip(nodes.added, found, strict=True))

    def mean_slopes(self, start: Tensor, end: Tensor, steps: int) -> dict[str, Tensor]:
        """Return the mean gradient at each reader, with embeddings on the way to the source's."""
        mean: dict[str, Tensor] = {}
        for k in range(1, steps + 1):
            _, found = self.slopes(_Nodes(self), start + (end - start) * (k / steps))
            for reader, slope in found.items():
                mean[reader] = mean.get(reader, 0) + slope / steps
        return mean

    def written(self, nodes: "_Nodes", writer: str) -> Float[Tensor, "batch row width"]:
        """Return what a writer adds to the stream."""
        if "." not in writer:
            return nodes.values[writer]
        layer, head = map(int, writer[1:].split("."))
        weight = self.blocks[layer].attn.W_O[head]
        z = nodes.values[f"h{layer}"][:, :, head]
        return self.times[layer] * (z.to(weight) @ weight)

    def scores(
        self, own: "_Nodes", other: "_Nodes", slopes: dict[str, Tensor]
    ) -> Float[Tensor, "batch writer reader"]:
        """Return the products of what writers change and of readers' gradients."""
        columns, depth = [], range(self.shape.depth)
        names = ("embed", *(f"h{i}" for i in depth), *(f"m{i}" for i in depth))
        for reader in self.readers:
            slope, column = slopes[reader], []
            for name in names:
                change = (own.values[name] - other.values[name]).to(slope)
                if name[0] == "h":
                    layer = int(name[1:])
                    weight = self.blocks[layer].attn.W_O.to(slope)
                    through = torch.einsum("bpm,hdm->bphd", slope, weight) * self.times[layer]
                    column.append((change * through).sum(dim=(1, 3)))
                else:
                    column.append((change * slope).sum(dim=(1, 2))[:, None])
            columns.append(torch.cat(column, dim=1))
        found = torch.stack(columns, dim=2)
        return found * self.exists.to(found.device)


class _Nodes(Session):
    """Keeps what writers write, and adds to what readers read: zeros for gradients, or a change."""

    site = "decoder"
    edits_output = True
    prompt_only = True

    def __init__(self, graph: _Graph, change: dict[str, Tensor] | None = None) -> None:
        self.graph, self.change = graph, change or {}
        self.layers = graph.shape.layers
        self.streams = {("resid_pre", 0), *(("mlp_out", i) for i in range(graph.shape.depth))}
        self.values: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}
        self.embedding: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """Watch what readers read."""
        for reader, norm in self.graph.norms.items():
            self._hooks.append(hook_before(norm, self._reading(reader)))

    def end(self) -> None:
        """Watch no more."""
        while self._hooks:
            self._hooks.pop().remove()

    def _reading(self, reader: str) -> Callable[..., Any]:
        def before(_: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
            if reader in self.change:
                return (args[0] + self.change[reader].to(args[0]), *args[1:]), kwargs or {}
            if not torch.is_grad_enabled():
                return None
            added = self.added[reader] = torch.zeros_like(args[0], requires_grad=True)
            return (args[0] + added, *args[1:]), kwargs or {}

        return before

    def stream(self, call: StreamCall, hidden: Stream) -> Stream | None:
        """Keep what an MLP writes; keep or replace the embedding."""
        if call.part == "mlp_out":
            self.values[f"m{call.layer}"] = hidden.detach()
            return None
        if self.embedding is not None:
            return self.embedding.to(hidden)
        self.values["embed"] = hidden.detach()
        return None

    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Keep what heads put out."""
        self.values[f"h{call.layer}"] = out.detach()
