"""Answers whose decoding steps are one compiled graph, under methods of one pass.

The prompt is read as ever, by the run that is open: there anchors are found. Every later token then
goes through one graph with a cache of fixed size, in which the sessions act as functions of tensors
(engine/compiled.py). What cannot be compiled is refused with the reason, never answered otherwise.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from clva_lens.engine.compiled import PASS, RowEdits, RowPass
from clva_lens.engine.run import running_step
from clva_lens.engine.session import Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.lens.decoding import Watch, answering_module
from clva_lens.models.family import find_site
from clva_lens.models.kv_cache import CACHE, OLD
from clva_lens.models.positions import positions_of

# As transformers compiles its own generation.
COMPILING: dict[str, Any] = {"mode": "reduce-overhead"}

# Caches are as long as a multiple of this, so that prompts of several lengths share a graph.
ROOM = 64

_COMPILED: WeakKeyDictionary[PreTrainedModel, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()


def generate_compiled(
    model: PreTrainedModel,
    method: str,
    sessions: Sequence[Session],
    seen: Watch,
    *,
    generation_config: GenerationConfig,
    **inputs: Any,
) -> Int[Tensor, "batch position"]:
    """Return what ``model.generate`` does for a greedy decoding, prompts included.

    ``sessions`` are those of the run that is open on the model, ``method`` tells them from others.
    ``seen`` is shown the logits. As with ``generate``, a row that has ended is padded.

    Raises:
        ParameterError: if the model, a session, the decoding or the prompt cannot be compiled.
        InterventionError: if the compiler fails.
    """
    new, ids = generation_config.max_new_tokens, inputs["input_ids"]
    assert new is not None
    room = -(-(ids.shape[1] + new - 1) // ROOM) * ROOM
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=room)
    reason = (
        _why_not_decoding(generation_config, inputs)
        or _why_not_model(model, cache)
        or next(filter(None, map(_why_not_session, sessions)), None)
    )
    if reason is not None:
        raise ParameterError(f"compiled=True is not possible: {reason}. Pass compiled=False.")
    length = ids.shape[1] + new
    steps = _Steps(model, method, tuple(sessions), inputs, cache, room)
    ends = torch.tensor(_ends(generation_config), device=ids.device, dtype=ids.dtype)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    logits = steps.prompt
    while True:
        token = logits.argmax(dim=-1).to(ids.device)
        token = token.where(~done, generation_config.pad_token_id or 0)
        ids, done = torch.cat([ids, token[:, None]], dim=1), done | torch.isin(token, ends)
        if ids.shape[1] == length or bool(done.all()):
            return ids
        logits = steps.next(token)
        seen.look(logits)


class _Steps:
    """A prompt that was read, and the steps after it, each of which shows one token to the model.

    ``mask`` says which positions of the cache there are; it is written in place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str,
        sessions: tuple[Session, ...],
        inputs: dict[str, Any],
        cache: StaticCache,
        room: int,
    ) -> None:
        ids = inputs["input_ids"]
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        given = {**inputs, "attention_mask": real.long()}
        places = positions_of(model, given)
        if places is not None:
            given["position_ids"] = places
        reading: Any = model
        out = reading(**given, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        self.prompt: Float[Tensor, "batch vocabulary"] = out.logits[:, -1].clone()
        self.model, self.cache, self.length = model, cache, ids.shape[1]
        self.place = None if places is None else places[..., -1:].clone()
        self.edits = None
        if sessions:
            step = running_step(model)
            self.edits = RowEdits.of(sessions, step.to(ids.device), room)
        kept = torch.zeros(len(ids), room, dtype=torch.bool, device=ids.device)
        kept[:, : self.length] = real
        self.mask, self.there = _mask(model, kept[:, None, None])
        known, shape = _COMPILED.setdefault(model, {}), (method, _kernel(model), len(ids), room)
        if shape not in known:
            known[shape] = torch.compile(_fresh(_step), fullgraph=True, dynamic=False, **COMPILING)
        self.step = known[shape]

    def next(self, token: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocabulary"]:
        """Return the logits after one more token."""
        self.mask[..., self.length] = self.there
        self.length += 1
        places = {}
        if self.place is not None:
            self.place = self.place + 1
            places = {"position_ids": self.place}
        with _compiler():
            logits, met = self.step(
                self.model, token[:, None], self.mask, places, self.cache, self.edits
            )
        if self.edits is not None and met != len(self.edits.layers):
            raise InterventionError(
                f"{type(self.model).__name__} does not hand its keyword arguments down to its "
                "attention, so a compiled step would leave the method out. Pass compiled=False."
            )
        return logits.clone()  # the graph writes to the same place again


def _step(
    model: Any,
    ids: Int[Tensor, "batch 1"],
    mask: Tensor,
    places: dict[str, Tensor],
    cache: StaticCache,
    edits: RowEdits | None,
) -> tuple[Float[Tensor, "batch vocabulary"], int]:
    """Return the logits after one token, and in how many layers something acted: what is compiled.

    Hooks on the model itself, which tell a run of its passes, are not called.
    """
    now = None if edits is None else RowPass(edits)
    passing = {} if now is None else {PASS: now}
    out = model.forward(
        input_ids=ids, attention_mask=mask, **places, **{CACHE: cache}, use_cache=True, **passing
    )
    return out.logits[:, -1], 0 if now is None else now.met


def _fresh(function: Any) -> Any:
    """Return a function with code of its own: the compiler keeps a few graphs for each code."""
    plain: Any = inspect.unwrap(function)
    return FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)


@contextmanager
def _compiler() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    try:
        with warnings.catch_warnings():
            # The levels of Eq. 10 are worked out once, which changes nothing.
            warnings.filterwarnings("ignore", message=".*lru_cache")
            yield
    except TorchDynamoException as error:
        said = str(error).strip().partition("\n")[0]
        raise InterventionError(
            f"the decoding step could not be compiled: {type(error).__name__}: {said}. Pass "
            "compiled=False."
        ) from error


def _mask(model: PreTrainedModel, kept: Tensor) -> tuple[Tensor, bool | float]:
    """Return the mask of a single row as the model's kernel takes it, and what it has at a key."""
    if _kernel(model) == "sdpa":
        return kept, True
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(kept.shape, dtype=model.dtype, device=kept.device).masked_fill_(
        ~kept, lowest
    ), 0.0


def _kernel(model: PreTrainedModel) -> str:
    name = find_site(model, "decoder").config._attn_implementation or "eager"
    return str(name).removeprefix("clva_")


def _ends(config: GenerationConfig) -> list[int]:
    eos: Any = config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def _why_not_decoding(config: GenerationConfig, inputs: dict[str, Any]) -> str | None:
    """Return why answers cannot be decoded so; None if they can."""
    plain = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    asked, known = config.to_dict(), plain.to_dict()
    if any(known.get(name) != value for name, value in asked.items() if name[0] != "_"):
        return "only cl.Greedy() is compiled, and not beams, draws or penalties"
    if any(inputs.get(name) is not None for name in (CACHE, OLD)):
        return "the prompt goes on from a prefix, whose cache is not of a fixed size"
    return None


def _why_not_model(model: PreTrainedModel, cache: StaticCache) -> str | None:
    """Return why a model's step cannot be compiled; None if nothing is known against it."""
    site, name = find_site(model, "decoder"), type(model).__name__
    if answering_module(model) is not model or model.config.is_encoder_decoder:
        return f"{name} hands embeddings to a language model that generates by itself"
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return f"some layers of {name} keep a window or a recurrent state in place of all keys"
    if _kernel(model) not in ("sdpa", "eager"):
        return f"its attention kernel is '{_kernel(model)}', and only 'sdpa' and 'eager' take masks"
    if any(
        getattr(m, "layer_idx", None) != i for m, i in zip(site.modules, site.layers, strict=True)
    ):
        return f"the attention modules of {name} do not know their layers"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over several devices"
    return None


def _why_not_session(session: Session) -> str | None:
    """Return why what a method does at a step cannot be compiled; None if it can."""
    acts = session.edits_output or session.edits_logits or session.streams or session.decode
    if session.compiles and session.site == "decoder" and not acts:
        return None
    name = type(session).__name__.removeprefix("_").removesuffix("Session")
    return (
        f"what {name} does at a decoding step is no function of tensors that makes a bias on "
        "attention (cl.CLVA, cl.KnockOut, cl.ClearSight and cl.PAI without guidance have one)"
    )
