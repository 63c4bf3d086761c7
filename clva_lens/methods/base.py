"""What a method is: frozen parameters, and a session for each run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from clva_lens.engine.bias import Bias, KeyBias
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import ParameterError
from clva_lens.ground.parameters import Parameters
from clva_lens.ground.registry import Registry
from clva_lens.methods.bridge_hooks import MethodHooks, method_hooks
from clva_lens.methods.target import Shape, Target
from clva_lens.models.prompt import Asked

Rows = Literal["text", "last"]
"""Which prompt rows an edit is for: all text after the image, or the last one only."""

Kernel = Literal["none", "fused", "fused + rows", "eager rows"]
"""How a method meets the attention kernel; each kind gives what its formula gives.

``"none"``: attention is left alone. ``"fused"``: a bias on the scores, which fused kernels take.
``"fused + rows"``: the same, and some rows of scores are formed to find it. ``"eager rows"``: what
it does is no bias, so the rows (or heads) in question are computed again, eagerly.
"""


Variant = Literal["released", "paper"]
"""A method as its public code computes it, or as its paper says."""


def check_variant(variant: str) -> None:
    """Raise ParameterError unless ``variant`` is one."""
    if variant not in get_args(Variant):
        raise ParameterError(
            f"variant must be 'released' or 'paper', but is {variant!r}. Pass variant='released'."
        )


class BiasSession(Session):
    """A session without memory: ``bias`` makes the bias of each of its layers in each pass."""

    def __init__(
        self,
        site: str,
        layers: Sequence[int],
        bias: Callable[[AttentionCall], Bias | None],
        *,
        row: Callable[[AttentionCall], Bias | None] | None = None,
        leaves_prefix: bool = False,
    ) -> None:
        """Name the site and its layers, 0-based, and give the function.

        ``row`` makes it for a single generated row, by less, and as what can be compiled.
        """
        self.site, self.layers, self.bias = site, tuple(layers), bias
        self.row, self.compiles = row, row is not None
        self.leaves_prefix = leaves_prefix

    def attention(self, call: AttentionCall) -> Bias | None:
        """Return the bias at the session's layers, None elsewhere."""
        if call.layer not in self.layers:
            return None
        return self.row(call) if self.row is not None and call.is_step else self.bias(call)

    def compiled_step(self, call: AttentionCall, seen: dict[Any, Any]) -> Bias | None:
        """Return the bias of the only row."""
        return None if self.row is None else self.row(call)


class Method(Parameters, ABC):
    """A training-free method: parameters that never change.

    ``name`` is its registered name, ``paper`` where it comes from, ``kernel`` how it meets the
    attention kernel, ``forwards`` how many forward passes of the language model a generated token
    costs (1 for the model alone), ``sites`` the attention sites it can act at; none for a method
    that leaves attention alone. ``decodings`` are the names of those it works with, ``extended``
    those among them that neither its paper nor its release has. ``zero`` are the parameters that
    switch it off, so that the model's numbers come out to the bit; None if none do.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    kernel: ClassVar[Kernel] = "fused"
    forwards: ClassVar[float | int] = 1
    sites: ClassVar[tuple[str, ...]] = ("decoder", "qformer")
    decodings: ClassVar[tuple[str, ...]] = ("greedy", "beam", "sampling")
    extended: ClassVar[tuple[str, ...]] = ()
    zero: ClassVar[Mapping[str, Any] | None] = None

    @abstractmethod
    def sessions(self, target: Target) -> list[Session]:
        """Return fresh sessions for one run on a model with these sites.

        Raises:
            ParameterError: if a parameter does not fit (an unknown layer, for example).
        """

    def check_decoding(self, decoding: str) -> None:
        """Raise ParameterError unless the method works with a decoding, named as registered."""
        if decoding not in self.decodings:
            raise ParameterError(
                f"the method '{self.name}' decodes with {' or '.join(self.decodings)} only, but "
                f"was asked to with {decoding}. Pass decoding=cl.{self.decodings[0].title()}()."
            )

    def as_hooks(self, bridge: Any, prompt: Asked) -> MethodHooks:
        """Return the method as hooks for ``bridge.run_with_hooks(..., fwd_hooks=...)``.

        ``bridge`` is a TransformerLens ``TransformerBridge``, for example that of
        ``cl.to_transformer_lens(model)``. The hooks are for this ``prompt`` (or a processor's
        output), in any number of runs, and for what is generated from it inside
        ``with bridge.hooks(fwd_hooks=...)``. Lists of several methods may be joined; each sees the
        edits of those before it.

        Raises:
            InterventionError: if ``bridge`` is no bridge, or its attention cannot be edited by
                hooks.
            ParameterError: if the method does not fit the model.
        """
        return method_hooks(self.sessions, bridge, prompt)


SITES = ("decoder", "qformer")
_TEXTS = (str, "a text")
_NAMES = (tuple, "a tuple of names")
# What a method says of itself: (kind, its words), by attribute.
_SAYS: dict[str, tuple[Any, str]] = {
    "name": _TEXTS,
    "paper": _TEXTS,
    "kernel": _TEXTS,
    "forwards": (float | int, "a number"),
    "sites": _NAMES,
    "decodings": _NAMES,
    "extended": _NAMES,
    "zero": (Mapping | None, "a dictionary of parameters, or None"),
}


def _check_method(name: str, method: type[Method]) -> None:
    """Raise ParameterError, naming what a method lacks to be registered."""
    if not getattr(vars(method).get("__dataclass_params__"), "frozen", False):
        raise ParameterError(
            f"{method.__name__} is no frozen dataclass, so its parameters could change during a "
            "run. Put @dataclass(frozen=True, kw_only=True) between @register_method and the class."
        )
    if not isinstance(vars(method).get("name"), str):
        raise ParameterError(
            f"{method.__name__} has no name of its own to be registered under. Write "
            'name: ClassVar[str] = "..." in it.'
        )
    for attribute, (kind, words) in _SAYS.items():
        found = getattr(method, attribute)
        if not isinstance(found, kind):
            raise ParameterError(
                f"{attribute} of {method.__name__} must be {words}, but is {found!r}. Write "
                f"{attribute}: ClassVar = ... in the class, or leave it out for the default."
            )
    kind: Any = method
    parameters = {one.name: one for one in fields(kind)}
    unset = [
        one.name
        for one in parameters.values()
        if one.default is MISSING and one.default_factory is MISSING
    ]
    among = {
        "kernel": ((method.kernel,), get_args(Kernel)),
        "sites": (method.sites, SITES),
        "extended": (method.extended, method.decodings),
        "zero": (method.zero or (), parameters),
    }
    for attribute, (found, known) in among.items():
        strange = [one for one in found if one not in known]
        if strange:
            raise ParameterError(
                f"{attribute} of {method.__name__} has {strange[0]!r}, which must be one of "
                f"{', '.join(known) or 'none'}. Write {attribute} with these."
            )
    if unset:
        raise ParameterError(
            f"{method.__name__} has parameters without a default: {', '.join(unset)}. Give each "
            f"one, so that {method.__name__}() is a method."
        )


METHODS = Registry[type[Method]]("method", _check_method)
SomeMethod = TypeVar("SomeMethod", bound=type[Method])


def register_method(method: SomeMethod) -> SomeMethod:
    """Register a method under its ``name``; a decorator above ``@dataclass(frozen=True)``.

    A class of the same name and module takes the place of the one before, so that a notebook's
    cell can be run again.

    Args:
        method: the class.

    Raises:
        ParameterError: if it is no frozen dataclass with a name of its own and defaults for all
            parameters, what it says of itself is wrong, or another method has its name.

    Example::

        @cl.register_method
        @dataclass(frozen=True, kw_only=True)
        class Mine(Method):
            name = "mine"
    """
    _check_method("", method)
    known = dict(METHODS.items()).get(method.name)
    if known is not None:
        names = [(one.__module__, one.__qualname__) for one in (known, method)]
        if names[0] == names[1]:
            METHODS.remove(method.name)
    METHODS.register(method.name, method)
    return method


MethodLike = Method | str
"""A method, or the registered name of one, which is then made with its default parameters."""


def as_method(method: MethodLike | None) -> Method | None:
    """Return a method as it is, the one that a name means, or None for None and "none".

    Raises:
        UnknownName: if no method has this name.
        ParameterError: if it is neither a method nor a name.
    """
    if method is None or isinstance(method, Method):
        return method
    if not isinstance(method, str):
        made = f"{method.__name__}()" if isinstance(method, type) else "'clva'"
        raise ParameterError(
            f"method must be a method, the name of one, or None, but is {method!r}. Pass "
            f"method={made}, for example."
        )
    return None if method.casefold() == "none" else METHODS.get(method)()


def as_methods(methods: Sequence[MethodLike | None]) -> tuple[Method, ...]:
    """Return methods, each as ``as_method`` does, without those that are None."""
    return tuple(made for made in map(as_method, methods) if made is not None)


@dataclass(frozen=True)
class Composed(Method):
    """Several methods in one run, applied left to right; each sees the edits of those before it."""

    name: ClassVar[str] = "composed"
    methods: tuple[Method, ...]

    def sessions(self, target: Target) -> list[Session]:
        """Return the sessions of all methods in order."""
        return [session for method in self.methods for session in method.sessions(target)]

    def check_decoding(self, decoding: str) -> None:
        """Raise ParameterError unless each method works with the decoding."""
        for method in self.methods:
            method.check_decoding(decoding)


def compose(*methods: MethodLike | None) -> Method:
    """Return one method that applies ``methods`` left to right; with none, it changes nothing.

    Raises:
        UnknownName: if one is a name that no method has.

    >>> cl.compose(cl.CLVA(), cl.PAI()).name
    'composed'
    """
    return Composed(as_methods(methods))


def check_rows(rows: str) -> None:
    """Raise ParameterError unless ``rows`` names a set of rows."""
    if rows not in get_args(Rows):
        raise ParameterError(f"rows must be 'text' or 'last', but is {rows!r}. Pass rows='text'.")


def check_order(rows: Rows, shape: Shape) -> None:
    """Raise ParameterError if the last row is wanted where rows have no order."""
    if rows == "last" and not shape.ordered:
        raise ParameterError(
            f"rows='last' was passed, but the rows of the site '{shape.site}' are queries without "
            "an order. Pass rows='text' for all of them."
        )


def check_layers(name: str, layers: Sequence[int], shape: Shape) -> tuple[int, ...]:
    """Return ``layers`` sorted, each once.

    Raises:
        ParameterError: if a layer does not exist in the site.
    """
    unknown = [layer for layer in layers if layer not in shape.layers]
    if unknown:
        whole = len(shape.layers) == shape.depth
        known = (
            f"0 to {shape.depth - 1}" if whole else ", ".join(str(layer) for layer in shape.layers)
        )
        raise ParameterError(
            f"{name} names layer {unknown[0]}, but the model's {shape.site} has layers {known} "
            f"(0-based). Pass {name}= from these."
        )
    return tuple(sorted(set(layers)))


def edited_rows(call: AttentionCall, rows: Rows) -> Bool[Tensor, "batch query"]:
    """Return which query rows of this pass an edit is for: ``rows``, and generated ones."""
    step, count = call.step, call.query.shape[2]
    old = step.old_rows(count)
    chosen = torch.ones(call.query.shape[0], count, dtype=torch.bool, device=call.query.device)
    is_text = step.text_rows[:, step.offset : step.offset + old]
    if rows == "last":
        position = torch.arange(old, device=is_text.device) + step.offset
        is_text = is_text & (position == rearrange(step.last_text, "b -> b 1"))
    chosen[:, :old] = is_text
    return chosen


def row_bias(
    call: AttentionCall,
    rows: Rows,
    prompt: Float[Tensor, "batch visual"],
    generated: Float[Tensor, "batch row visual"] | None = None,
) -> Bias:
    """Return the bias that puts log-weights on the image keys of text and generated rows.

    ``prompt`` is for the prompt's rows after the image, ``generated`` for each generated row of
    this pass (None: as ``prompt``); all other rows and keys get 0. Float32; a ``KeyBias`` unless
    the rows differ.
    """
    step, new = call.step, call.new_rows if generated is None else generated.shape[1]
    if generated is None:
        generated = prompt[:, None].expand(-1, new, -1)
    old = call.query.shape[2] - new
    if old == 0 and new == 1:
        known = step.of_prompt[prompt.device]
        batch = prompt.shape[0]
        if known.single_row is None or known.single_row.shape[0] != batch:
            known.single_row = torch.ones(batch, 1, dtype=torch.bool, device=prompt.device)
        return KeyBias(_on_image(call, generated[:, 0]), known.single_row, 0)
    first = max(0, step.first_text - step.offset)
    bias = KeyBias(_on_image(call, prompt), edited_rows(call, rows), first)
    if new == 0:
        return bias
    dense = bias.dense.clone()
    visual = rearrange(step.visual, "b v -> b 1 1 v").expand(-1, -1, new, -1)
    dense[:, :, old:].scatter_(3, visual, rearrange(generated, "b r v -> b 1 r v"))
    return dense


def single_row_bias(call: AttentionCall, weights: Float[Tensor, "batch visual"]) -> KeyBias:
    """Return the bias of ``row_bias`` for a pass's only row, a generated one, without a memory."""
    rows = torch.ones(len(weights), 1, dtype=torch.bool, device=weights.device)
    return KeyBias(_on_image(call, weights), rows, 0)


def _on_image(
    call: AttentionCall, weights: Float[Tensor, "batch visual"]
) -> Float[Tensor, "batch key"]:
    """Return log-weights of all keys, 0 outside the image."""
    if call.step.block is not None:
        start, stop = call.step.block
        return functional.pad(weights, (start, call.key.shape[2] - stop))
    keys = torch.zeros(len(weights), call.key.shape[2], dtype=torch.float32, device=weights.device)
    return keys.scatter_(1, call.step.visual, weights)
