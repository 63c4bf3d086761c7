"""``run_with_cache``: one forward pass into TransformerLens' ActivationCache, through nnsight.

Names are TransformerLens' own for the language model. The vision tower's begin with "vision." and
the Q-Former's with "qformer." Only what is asked for is kept, and a pattern is formed at the layers
where it is asked for. Where each name lies is in ``models/decoders.py``.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Float
from nnsight import NNsight
from torch import Tensor, nn
from transformers import PreTrainedModel

from clva_lens.engine.run import edited_streams, running
from clva_lens.engine.session import AttentionCall, Session, as_additive, raw_scores
from clva_lens.engine.stream import Part, Stream, StreamCall
from clva_lens.ground.ambient import undisturbed
from clva_lens.ground.errors import ParameterError, UnknownName
from clva_lens.lens.intervene import intervening, refuse_in_trace
from clva_lens.methods.base import MethodLike
from clva_lens.models.activations import Missing, Place
from clva_lens.models.family import find_family, transformers_model
from clva_lens.models.norms import norm_form
from clva_lens.models.prompt import Asked, as_prompt, readable
from clva_lens.models.readout import CacheModel, per_head
from clva_lens.models.transformerlens import transformer_lens

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None
MATRICES = ("attn_scores", "pattern")
ONLY_IF_NAMED = (*MATRICES, "result")


class CachedRun(NamedTuple):
    """Logits [batch, pos, vocab] and the ``transformer_lens.ActivationCache`` of the same pass."""

    logits: Float[Tensor, "batch pos vocab"]
    cache: "ActivationCache"


@undisturbed()
def run_with_cache(
    lens: Any, prompt: Asked, names_filter: NamesFilter = None, method: MethodLike | None = None
) -> CachedRun:
    """Return the logits and the activations of one forward pass; see ``LensModel.run_with_cache``.

    ``lens`` is a ``LensModel``, a transformers model or an nnsight handle of one.

    Raises:
        UnknownName: if ``names_filter`` has a name that the model does not.
        ParameterError: if ``names_filter`` selects nothing, or is of another kind.
        ModelLoadError: if nobody wrote the names of this model down.
        InterventionError: inside a trace, or if attention is asked for and its kernel cannot be
            intercepted.
        PromptError: if ``prompt`` is none.
    """
    refuse_in_trace("run_with_cache", ", or read activations in it with .output.save()")
    model, prompt = transformers_model(lens), as_prompt(lens, prompt)
    handle: Any = lens if getattr(lens, "_module", None) is model else nnsight_handle(model)
    activations = find_family(model).activations(model)
    chosen = choose(activations.places, names_filter, activations.missing)
    reader = _Reader(handle, activations.places, chosen, len(prompt["input_ids"]))
    sites = {place.site for place in chosen if place.site is not None}
    sessions: list[_Attention | _Stream] = [_Attention(site, chosen) for site in sorted(sites)]
    with intervening(lens, method):
        # What methods make of a module's output comes after nnsight has served it.
        edited = edited_streams(model)
        late = [place for place in chosen if place.name in edited and place.tap.side == "output"]
        sessions += [_Stream(place) for place in late]
        with running(model, sessions), readable(prompt), handle.trace(**prompt.inputs):
            reader.read()
            logits = handle.output.logits.save()
    found = reader.found
    for session in sessions:
        found |= session.found
    config = model.config.get_text_config()
    name = getattr(lens, "name", model.name_or_path) or ""
    standing = CacheModel(activations.readout, getattr(lens, "words", None), config, name)
    ordered = {place.name: found[place.name] for place in chosen}
    return CachedRun(logits, transformer_lens().cache(ordered, standing))


def nnsight_handle(model: PreTrainedModel) -> NNsight:
    """Return a plain handle of a transformers model."""
    with warnings.catch_warnings():
        # A Q-Former has submodules called "output", which nnsight serves as "E_output".
        warnings.filterwarnings("ignore", "Module '.*' has a submodule named 'output'")
        return NNsight(model)


def choose(
    places: Sequence[Place], names_filter: NamesFilter, missing: Sequence[Missing] = ()
) -> tuple[Place, ...]:
    """Return the places that a filter selects, in the order of the forward pass.

    None selects all but those that grow with the square of the prompt or with heads × width.

    Raises:
        UnknownName: for a name that there is not, with the reason or the nearest ones.
        ParameterError: if nothing is selected, or the filter is of another kind.
    """
    if names_filter is None:
        return tuple(place for place in places if place.tap.form not in ONLY_IF_NAMED)
    names = [place.name for place in places]
    if callable(names_filter):
        wanted = {name for name in names if names_filter(name)}
    else:
        wanted = {names_filter} if isinstance(names_filter, str) else _strings(names_filter)
        for name in sorted(wanted - set(names)):
            raise UnknownName(_unknown(name, names, missing))
    if not wanted:
        raise ParameterError(
            f"names_filter selects none of the {len(names)} activations. Pass names such as "
            f"'{names[-1]}', a function that is true of some, or None for all."
        )
    return tuple(place for place in places if place.name in wanted)


def _strings(names: Any) -> set[str]:
    listed = list(names) if isinstance(names, Iterable) else [names]
    for name in listed:
        if not isinstance(name, str):
            raise ParameterError(
                f"names_filter holds {name!r}, which is no name. Pass a name, a list of names, a "
                "function of a name, or None."
            )
    return set(listed)


def _unknown(name: str, names: Sequence[str], missing: Sequence[Missing]) -> str:
    inside = name.partition("blocks.")[2].partition(".")[2]
    for one in missing:
        if inside.startswith(tuple(f"{stem}." for stem in one.names)) or inside in one.names:
            return (
                f"the model has no activation '{name}': {one}. Ask for the names that "
                "run_with_cache(model, prompt) returns without names_filter."
            )
    near = get_close_matches(name, names, n=3) or [one for one in names if name in one][:3]
    hint = f"Did you mean {' or '.join(repr(one) for one in near)}? " if near else ""
    stems = sorted({_stem(one) for one in names})
    return (
        f"the model has no activation '{name}'. {hint}Known, with i for a layer: "
        f"{', '.join(stems)}."
    )


def _stem(name: str) -> str:
    return ".".join("i" if part.isdigit() else part for part in name.split("."))


class _Reader:
    """Reads places in the order of the pass, inside a trace; ``found`` has what it read.

    A value that several places share is read once, and kept until the layer is done.
    """

    def __init__(
        self, lens: Any, places: Sequence[Place], chosen: Sequence[Place], batch: int
    ) -> None:
        self.found: dict[str, Tensor] = {}
        self.chosen = [place for place in chosen if place.site is None]
        self._named = {place.name: place for place in places}
        self._envoys = {id(envoy._module): envoy for envoy in lens.modules()}
        self._batch = batch
        self._group, self._values = "", dict[tuple[int, str], Any]()

    def read(self) -> None:
        for place in self.chosen:
            if place.group != self._group:
                self._group = place.group
                self._values.clear()
            self.found[place.name] = self._read(place)
        self._values.clear()

    def _read(self, place: Place) -> Tensor:
        form, module = place.tap.form, place.module
        if form in MATRICES:
            return self._matrix(place)
        value = self._value(module, place.tap.side)
        if value.ndim == 2:  # OPT flattens batch and position before its MLP
            value = value.unflatten(0, (self._batch, -1))
        if form in ("scale", "normalized"):
            norm = norm_form(module)
            return norm.scale(value) if form == "scale" else norm.normalised(value)
        if place.tap.part is not None:
            parts = value.chunk(place.tap.parts, dim=-1)
            value = parts[place.tap.part].clone()  # not a view of them all
        if form == "stream":
            return value if place.tap.times == 1.0 else value * place.tap.times
        heads = rearrange(value, "b p (h d) -> b p h d", d=place.d_head)
        if form == "result":
            return torch.einsum("bphd,hdm->bphm", heads, per_head(module, place.d_head))
        return heads

    def _matrix(self, place: Place) -> Float[Tensor, "batch head query key"]:
        """Form the attention of a module that no site shows: it sees all, but for a mask."""
        inputs = self._value(place.module, "inputs")
        stem = place.name.rpartition(".")[0]
        query, key = (
            rearrange(self._read(self._named[f"{stem}.hook_{one}"]), "b p h d -> b h p d")
            for one in ("q", "k")
        )
        scores = raw_scores(query, key, place.d_head**-0.5)
        mask = inputs[1].get("attention_mask")
        if mask is not None:
            scores += as_additive(mask)
        return scores.softmax(dim=-1) if place.tap.form == "pattern" else scores

    def _value(self, module: nn.Module, side: str) -> Any:
        key = (id(module), side)
        if key not in self._values:
            envoy = self._envoys[id(module)]
            if side in ("input", "output", "inputs"):
                value = getattr(envoy, side)
            else:
                value = envoy.inputs[1][side]
            if side == "output" and isinstance(value, tuple):
                value = value[0]
            self._values[key] = value
        return self._values[key]


class _Attention(Session):
    """Edits nothing; keeps what is asked of a site's attention, under the sessions before it."""

    def __init__(self, site: str, chosen: Sequence[Place]) -> None:
        self.site = site
        self.found: dict[str, Tensor] = {}
        self._wanted: Mapping[int, list[Place]] = {}
        for place in chosen:
            if place.site == site:
                self._wanted.setdefault(place.layer, []).append(place)
        self.layers = tuple(self._wanted)

    def attention(self, call: AttentionCall) -> None:
        for place in self._wanted.get(call.layer, ()):
            self.found[place.name] = _seen(call, place.tap.form)


class _Stream(Session):
    """Edits nothing; keeps a part of the residual stream as the sessions before it left it."""

    layers = ()

    def __init__(self, place: Place) -> None:
        self.site = "qformer" if place.name.startswith("qformer.") else "decoder"
        part = place.name.rpartition("hook_")[2]
        self.streams = {(cast(Part, part), place.layer)}
        self.name = place.name
        self.found: dict[str, Tensor] = {}

    def stream(self, call: StreamCall, hidden: Stream) -> None:
        self.found[self.name] = hidden


def _seen(call: AttentionCall, form: str) -> Tensor:
    given = {"rot_q": call.query, "rot_k": call.key, "value": call.value}
    if form in given:
        found = given[form]
        assert found is not None
        return rearrange(found, "b h p d -> b p h d")
    batch, heads, count = call.query.shape[:3]
    size = (batch, heads, count, call.key.shape[2])
    matrix = torch.empty(size, dtype=torch.float32, device=call.query.device)
    rows = call.rows if form == "pattern" else call.scores
    for start, stop in call.row_pieces(0, count):
        matrix[:, :, start:stop] = rows(start, stop)
    return matrix
