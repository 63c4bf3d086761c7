"""The one attention function: it lets sessions look at attention rows and put a bias on them.

Sessions may also look at and edit the residual stream (stream.py), in the same run.

Multiplying attention weights by w and renormalising is the same as adding log w to the scores:
softmax(s + log w) = w·softmax(s) / Σ w·softmax(s). So every edit of Eqs. 10–11 of
arXiv:2603.25088v1 is a bias, the fused kernels keep working, and no pattern is ever formed. What
methods need to *see* is formed from queries and keys, for the rows in question only.

``clva_sdpa`` and ``clva_eager`` are registered with transformers once, each with the mask builder
of its base kernel. While a ``Run`` is installed its site's configuration names one of them; modules
of no run are passed through. Nothing is stored on any module, and ``remove`` restores everything.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from clva_lens.errors import InterventionError
from clva_lens.models.family import Site, find_family, find_site
from clva_lens.passes import Step
from clva_lens.stream import Part, Stream, StreamCall, stream_hooks, stream_name

# Rows of the pattern are formed in pieces of at most this many scores (64 MiB of float32).
SCORES_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Queries and keys of one layer in one pass, and the bias that earlier sessions put on them.

    Queries and keys are as the kernel gets them: after the rotary embedding, with the whole cache.
    """

    layer: int
    step: Step
    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch kv_head key width"]
    mask: Tensor | None
    bias: Float[Tensor, "batch _ query key"] | None
    scaling: float

    @property
    def new_rows(self) -> int:
        """How many of this pass's query rows, at its end, are generated tokens."""
        count = self.query.shape[2]
        return max(0, min(count, self.step.offset + count - self.step.prompt_rows))

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head row key"]:
        """Return the pattern of query rows ``start`` to ``stop``; each row sums to 1.

        Softmax in float32 over all keys, under the mask and the bias. Rows are relative to this
        pass; those of padding are meaningless.
        """
        return self.scores(start, stop).softmax(dim=-1)

    def scores(self, start: int, stop: int) -> Float[Tensor, "batch head row key"]:
        """Return what the softmax of ``rows`` is taken of, in float32, under mask and bias."""
        scores = raw_scores(self.query[:, :, start:stop], self.key, self.scaling)
        allowed = self.additive_mask(start, stop)
        if allowed is not None:
            scores += allowed
        if self.bias is not None:
            scores += self.bias[:, :, start:stop]
        return scores

    def row_pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (start, stop) of pieces of these rows that hold few scores each."""
        batch, heads = self.query.shape[:2]
        each = max(1, SCORES_AT_ONCE // (batch * heads * self.key.shape[2]))
        return [(at, min(at + each, stop)) for at in range(start, stop, each)]

    def additive_mask(self, start: int, stop: int) -> Float[Tensor, "..."] | None:
        """Return 0 where a row may look, the lowest float32 elsewhere; None if it may anywhere."""
        keys = self.key.shape[2]
        if self.mask is not None:
            rows = slice(start, stop) if self.mask.shape[2] > 1 else slice(None)
            mask = self.mask[:, :, rows, :keys]
            return as_additive(mask)
        count = self.query.shape[2]
        if not self.step.causal or (count == 1 and keys == self.step.offset + 1):
            return None
        position = torch.arange(keys, device=self.key.device)
        row = torch.arange(start, stop, device=self.key.device) + self.step.offset
        future = position[None, :] > row[:, None]
        return torch.zeros(future.shape, device=self.key.device).masked_fill_(
            future, torch.finfo(torch.float32).min
        )


def raw_scores(
    query: Float[Tensor, "batch head row width"],
    key: Float[Tensor, "batch kv_head key width"],
    scaling: float | int,
) -> Float[Tensor, "batch head row key"]:
    """Return the scaled products of queries and keys in float32; keys may be of grouped heads."""
    query, key = query.float(), key.float()
    batch, heads, count, width = query.shape
    groups = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], groups * count, width)
    return (grouped @ key.mT).reshape(batch, heads, count, -1) * scaling


def as_additive(mask: Tensor) -> Float[Tensor, "..."]:
    """Return a mask, of truths or of summands, as float32 summands of the scores."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(
        ~mask, torch.finfo(torch.float32).min
    )


class Session:
    """One method's state during one run; it dies with the run.

    ``site`` is where it acts, ``layers`` are those whose attention it reads or edits;
    ``edits_output`` says whether it wants ``output`` called, ``streams`` for which parts of which
    layers of the site's stack it wants ``stream`` called. Both stay as they are during a run.
    """

    site: str
    layers: tuple[int, ...]
    edits_output: bool = False
    streams: Collection[tuple[Part, int]] = ()

    def attention(self, call: AttentionCall) -> Float[Tensor, "batch _ query key"] | None:
        """Look at one layer's attention; return a bias on its scores, or None for no edit."""
        return None

    def output(
        self, call: AttentionCall, out: Float[Tensor, "batch query head width"]
    ) -> Float[Tensor, "batch query head width"] | None:
        """Look at what the heads of one layer put out, z; return what replaces it, or None.

        ``call`` has the bias of all sessions.
        """
        return None

    def stream(self, call: StreamCall, hidden: Stream) -> Stream | None:
        """Look at a part of the residual stream; return what replaces it, or None for no edit.

        "resid_pre" and "resid_post" are what enters and leaves a layer, "attn_out" and "mlp_out"
        (and a Q-Former's "cross_attn_out") what its blocks put out, as in TransformerLens. With a
        key-value cache, ``hidden`` has this pass's rows only, from position ``call.step.offset``.
        nnsight serves a module's own ``.output`` before this, inputs and later modules after it.
        """
        return None


class Run:
    """One site of a model whose attention goes through sessions, from ``install`` to ``remove``."""

    def __init__(self, site: Site) -> None:
        """Look at the site; nothing is changed before ``install``.

        Raises:
            InterventionError: if its attention kernel cannot be intercepted.
        """
        self.site = site
        self.passes = site.passes()
        self.sessions: list[Session] = []
        self.kernel = site.config._attn_implementation or "eager"
        if self.kernel.startswith("clva_"):
            raise InterventionError(
                "another model that shares this model's configuration object is in a run, or this "
                "model is a copy made during one. Give the models configurations of their own, or "
                "end the other run first."
            )
        if self.kernel not in KERNELS:
            raise InterventionError(
                f"the {site.name} runs attention kernel '{self.kernel}', which cannot be "
                f"intercepted (only {' and '.join(sorted(KERNELS))} can). Load the model with "
                "attn_implementation='sdpa'."
            )
        self._layers = dict(zip(map(id, site.modules), site.layers, strict=True))
        self._hooks: list[RemovableHandle] = []
        self._streams: dict[tuple[Part, int], RemovableHandle] = {}
        self._call: AttentionCall | None = None
        self._merged: tuple[Tensor | None, Tensor, Tensor] | None = None

    def install(self) -> None:
        """Route the site's attention through this run, and watch the model's inputs."""
        if any(id(module) in _ACTIVE for module in self.site.modules):
            raise InterventionError(
                "this model's attention is already routed through a run. This is a bug in "
                "clva_lens: open_run() should have joined it."
            )
        self._hooks = self.passes.hooks()
        self.site.config._attn_implementation = f"clva_{self.kernel}"
        for module in self.site.modules:
            _ACTIVE[id(module)] = self

    def remove(self) -> None:
        """Undo ``install``."""
        for module in self.site.modules:
            _ACTIVE.pop(id(module), None)
        self.site.config._attn_implementation = self.kernel
        for hook in (*self._hooks, *self._streams.values()):
            hook.remove()
        self._streams.clear()

    def follow(self, model: PreTrainedModel) -> None:
        """Have hooks on the residual stream where this run's sessions want them, nowhere else."""
        wanted = {place for session in self.sessions for place in session.streams}
        for place in self._streams.keys() - wanted:
            self._streams.pop(place).remove()
        missing = sorted(wanted - self._streams.keys())
        if missing:
            for place, hook in stream_hooks(model, self.site.name, missing, self.stream):
                self._streams[place] = hook

    def edit(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        """Show one layer to the sessions; return its mask with their biases, None without any."""
        step, self._call = self.passes.step, None
        if step is None or isinstance(query, FakeTensor):
            return None
        call = AttentionCall(self._layers[id(module)], step, query, key, mask, None, scaling)
        for session in self.sessions:
            bias = session.attention(call)
            if bias is not None:
                call = replace(call, bias=bias if call.bias is None else call.bias + bias)
        self._call = call if any(session.edits_output for session in self.sessions) else None
        return None if call.bias is None else self.merge(call)

    def output(self, out: Tensor) -> Tensor:
        """Return the output of the layer that ``edit`` was for, as the sessions leave it."""
        call, self._call = self._call, None
        if call is not None:
            for session in self.sessions:
                edited = session.output(call, out) if session.edits_output else None
                out = out if edited is None else edited
        return out

    def stream(self, part: Part, layer: int, value: Tensor) -> Tensor | None:
        """Show a part of the residual stream to the sessions; return what replaces it, or None."""
        step = self.passes.step
        if step is None or isinstance(value, FakeTensor):
            return None
        call = StreamCall(part, layer, step)
        batch = len(step.text_rows)
        hidden = value if value.ndim == 3 else value.unflatten(0, (batch, -1))  # OPT's MLPs
        found = hidden
        for session in self.sessions:
            if (part, layer) in session.streams:
                edited = session.stream(call, found)
                found = found if edited is None else edited
        return None if found is hidden else found.reshape(value.shape)

    def merge(self, call: AttentionCall) -> Tensor:
        """Return mask and bias as one additive mask; the last one is kept for the next layer."""
        mask, bias = call.mask, call.bias
        assert bias is not None
        if self._merged is None or self._merged[0] is not mask or self._merged[1] is not bias:
            additive = call.additive_mask(0, call.query.shape[2])
            # Finite in the queries' type: a row of padding that sees nothing must not become NaN.
            # The bias is float32, which the lowest float64 does not fit.
            lowest = max(torch.finfo(call.query.dtype).min, torch.finfo(bias.dtype).min)
            merged = bias if additive is None else (bias + additive).clamp_min(lowest)
            # CUDA kernels take a mask of the queries' type only; CPU kernels take float32 too.
            if merged.device.type != "cpu":
                merged = merged.to(call.query.dtype)
            self._merged = (mask, bias, merged)
        return self._merged[2]


_ACTIVE: dict[int, Run] = {}


def edited_streams(model: PreTrainedModel) -> set[str]:
    """Return TransformerLens' names of what sessions of open runs may edit in the stream."""
    runs = [_ACTIVE.get(id(site.modules[0])) for site in find_family(model).sites(model)]
    return {
        stream_name(run.site.name, *place)
        for run in runs
        if run is not None
        for session in run.sessions
        for place in session.streams
    }


def open_run(model: PreTrainedModel, sessions: Sequence[Session]) -> Callable[[], None]:
    """Add sessions to the runs of their sites, starting those there are not; return what undoes it.

    Raises:
        ModelLoadError: if no family knows the model.
        InterventionError: if a site's attention kernel cannot be intercepted.
        ParameterError: if a session names a part of the residual stream that there is not.
    """
    joined: list[tuple[Run, Session]] = []

    def close() -> None:
        for run, session in joined:
            if session in run.sessions:
                run.sessions.remove(session)
        for run in {id(run): run for run, _ in joined}.values():
            if run.sessions:
                run.follow(model)
            elif _ACTIVE.get(id(run.site.modules[0])) is run:
                run.remove()

    try:
        for session in sessions:
            site = find_site(model, session.site)
            run = _ACTIVE.get(id(site.modules[0]))
            if run is None:
                run = Run(site)
                run.install()
            run.sessions.append(session)
            joined.append((run, session))
            if session.streams:
                run.follow(model)
    except BaseException:
        close()
        raise
    return close


@contextmanager
def running(model: PreTrainedModel, sessions: Sequence[Session]) -> Iterator[None]:
    """Have sessions in the model's run inside the ``with`` block.

    An error of the model that its family understands is raised as a clearer one.
    """
    close = open_run(model, sessions)
    try:
        yield
    except TypeError as error:
        clearer = find_family(model).explain(error)
        if clearer is None:
            raise
        raise clearer from error
    finally:
        close()


def _base_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the eager attention function of the file that defines the module."""
    return sys.modules[type(module).__module__].eager_attention_forward


KERNELS: dict[str, Callable[[nn.Module], Callable[..., tuple[Tensor, Tensor | None]]]] = {
    "sdpa": lambda module: sdpa_attention_forward,
    "eager": _base_eager,
}


def _attend(kernel: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the base kernel, under the bias of the run that the module belongs to."""
        base = KERNELS[kernel](module)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        run = _ACTIVE.get(id(module))
        if run is not None:
            count, step = query.shape[2], run.passes.step
            # A static cache hands over its empty end too: leave it out, as the kernel would.
            seen, values = key, value
            if attention_mask is None and step is not None and step.causal and count > 1:
                seen, values = key[:, :, : step.offset + count], value[:, :, : step.offset + count]
            edited = run.edit(module, query, seen, attention_mask, scale)
            if edited is not None:
                key, value, attention_mask = seen, values, edited
        out, weights = base(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        return (out if run is None else run.output(out)), weights

    return attend


for _kernel, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(f"clva_{_kernel}", _attend(_kernel))
    AttentionMaskInterface.register(f"clva_{_kernel}", _mask)
