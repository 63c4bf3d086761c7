"""OPERA, over-trust penalty and retrospection-allocation (arXiv:2311.17911; shikiw/OPERA 61426ef).

A beam search that looks one token ahead. Each beam's N likeliest tokens are tried; their logits,
less a penalty, are the only ones that are left. With a_ij the attention of token i to key j in the
last layer, the largest over the heads, each row divided by its sum, and generated tokens counted
from 0, a candidate for position t is penalised by

    −Σ_{j in image} a_tj                              if t < 10,
    10⁻⁷ · max_c Π_{i=c..t} σ·a_ic                    after that,

the second being how much one earlier token c is leant on by all tokens since. **Retrospection**: s
is the most frequent argmax c over candidates, and then over beams. Once s was the argmax in more
than r steps so far in every beam, and s ≥ 10, the search goes back to where token s was the last:
what was chosen there is ruled out, and everything else competes with its own logits, without
a penalty. A place is returned to N times at most, then the one before it.

**As released**, c is the argmax of scores in float16, which is a floor on what counts: where no
product reaches 0.3, all scores vanish (below 2⁻²⁵), c is 0, and the search does not go back.
``variant="paper"`` takes the largest product, however small, and goes back more readily.

**Departs from the release**: penalties are of summed logarithms in float64 (there float16, which
overflows at 65504); other tokens are impossible (there their logit is −999, which wins over
candidates with a larger penalty); what was ruled out after the place that is returned to is
forgotten (there, of other places); the ten is a parameter; ``window`` bounds c (there it bounds how
far back one can go, to the same effect up to 512 tokens). The release is for one prompt at a time,
and so is this: ``generate`` asks a batch one by one. ``weight=0`` is transformers' own search, all
tokens being left. The paper's text was not at hand. The release stands on transformers 4.29, which
divides a finished beam's score by its length with the prompt: ``cl.Beam(length="with prompt")``.

Rows of one layer are formed from queries and keys, one row a pass; no pattern is. What one token
ahead wrote to the key-value cache is taken off again; to go back, the answer is read again.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig

from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import (
    Kernel,
    Method,
    MethodHooks,
    Variant,
    check_variant,
    register_method,
)
from clva_lens.methods.beams import Beams
from clva_lens.methods.target import Target
from clva_lens.models.decoder_passes import DecoderPasses
from clva_lens.models.family import find_site
from clva_lens.models.kv_cache import cache_of, take_off

FLOOR = 1e-7
# Of a logarithm: the largest penalty is e^600, far below float64's largest number.
LARGEST = 600.0

Columns = Float[Tensor, "beam generated"]
Logits = Float[Tensor, "beam vocabulary"]


@register_method
@dataclass(frozen=True, kw_only=True)
class OPERA(Method):
    """Over-trust penalty and retrospection-allocation, a beam search of its own.

    Args:
        scale: σ, >= 0, what attention is multiplied by.
        threshold: r, >= 2: how many steps may agree on a token before the search goes back.
        candidates: N, >= 1: the tokens tried for each beam, each for a forward pass.
        weight: of the penalty, finite and >= 0; 0 is transformers' own beam search.
        early: >= 1: as many first tokens are judged by their attention to the image.
        window: >= 1: how many tokens back c may lie.
        variant: whether c has to reach what float16 can hold ("released"), or not ("paper").

    Raises:
        ParameterError: if a parameter is out of range.

    >>> five = cl.Beam(num_beams=5, max_new_tokens=4)
    >>> cl.generate(model, prompt, cl.OPERA(), five).texts
    ['no']
    """

    name: ClassVar[str] = "opera"
    paper: ClassVar[str] = "OPERA, arXiv:2311.17911"
    kernel: ClassVar[Kernel] = "fused + rows"
    forwards: ClassVar[float | int] = 6
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    decodings: ClassVar[tuple[str, ...]] = ("beam",)
    scale: float | int = 50.0
    threshold: int = 15
    candidates: int = 5
    weight: float | int = 1.0
    early: int = 10
    window: int = 512
    variant: Variant = "released"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_variant(self.variant)
        for name, usual in (("scale", 50.0), ("weight", 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ParameterError(
                    f"{name} must be a finite number >= 0, but is {value}. Pass {name}={usual}."
                )
        for name, least, usual in (
            ("threshold", 2, 15),
            ("candidates", 1, 5),
            ("early", 1, 10),
            ("window", 1, 512),
        ):
            value = getattr(self, name)
            if value < least:
                raise ParameterError(
                    f"{name} must be at least {least}, but is {value}. Pass {name}={usual}."
                )

    def sessions(self, target: Target) -> list[Session]:
        """Return what searches; nothing for a weight of 0.

        Raises:
            InterventionError: if the language model is an encoder-decoder.
        """
        if self.weight == 0:
            return []
        if not isinstance(find_site(target.model, "decoder").passes(), DecoderPasses):
            raise InterventionError(
                "OPERA looks at a decoder's attention to its own answer, but this "
                f"{type(target.model).__name__} has an encoder-decoder (T5). Use the model with a "
                "Llama or OPT."
            )
        return [OperaSearch(self, target.at("decoder").layers[-1])]

    def as_hooks(self, bridge: Any, prompt: Any) -> MethodHooks:
        """Raise InterventionError: a search is no hook."""
        raise InterventionError(OUTSIDE)


OUTSIDE = (
    "OPERA is a beam search of its own, so it cannot act on a pass or a generation of somebody "
    "else's. Use cl.generate(model, prompt, method=cl.OPERA(), decoding=cl.Beam(num_beams=5))."
)


@dataclass(eq=False)
class _Past:
    """The search before a step, and what was chosen in it: flat numbers of (beam, token)."""

    beams: Beams
    columns: Columns
    options: dict[str, Any]
    chosen: Int[Tensor, " beam"] | None = None


@dataclass(eq=False)
class _Memory:
    """The steps so far, and how often and from what choices the search went back to one."""

    steps: list[_Past] = field(default_factory=list)
    leant_on: list[Int[Tensor, " beam"]] = field(default_factory=list)
    times: dict[int, int] = field(default_factory=dict)
    ruled_out: dict[int, list[Tensor]] = field(default_factory=dict)

    def place(self, method: OPERA) -> int | None:
        """Return the step to go back to, or None; it is counted."""
        now = len(self.steps) - 1
        token = int(most_frequent(self.leant_on[-1]))
        agreeing = (torch.stack(self.leant_on) == token).sum(dim=0)
        if token < method.early or not bool((agreeing > method.threshold).all()):
            return None
        for place in (token + 1, token):
            if self.times.get(place, 0) < method.candidates and place < now:
                self.times[place] = self.times.get(place, 0) + 1
                return place
        return None

    def return_to(self, place: int) -> Int[Tensor, " ruled_out"]:
        """Forget what came after a step; return what must not be chosen in it again."""
        chosen = self.steps[place].chosen
        assert chosen is not None
        del self.steps[place + 1 :], self.leant_on[place + 1 :]
        self.ruled_out = {at: out for at, out in self.ruled_out.items() if at <= place}
        self.ruled_out.setdefault(place, []).append(chosen)
        return torch.cat(self.ruled_out[place])


class OperaSearch(Session):
    """The search of one prompt at a time.

    ``penalties`` are those of each judged step, Float["beam candidate"], in nats; ``returns`` the
    steps at which it went back, as (step, step gone back to).
    """

    site = "decoder"
    cuts_off = True

    def __init__(self, method: OPERA, layer: int) -> None:
        """Name the last layer."""
        self.method, self.layers = method, (layer,)
        self.penalties: list[Float[Tensor, "beam candidate"]] = []
        self.returns: list[tuple[int, int]] = []
        self._searching = False
        self._row: tuple[Tensor, Tensor] | None = None

    def attention(self, call: AttentionCall) -> None:
        """Keep the last row: the largest over the heads, divided by its sum.

        Raises:
            InterventionError: if somebody else runs the model.
        """
        if call.layer not in self.layers:
            return
        if not self._searching:
            raise InterventionError(OUTSIDE)
        count = call.query.shape[2]
        row = call.rows(count - 1, count)[:, :, 0].amax(dim=1).double()
        self._row = row / row.sum(dim=1, keepdim=True), call.step.visual

    def end(self) -> None:
        """Forget the last row."""
        self._row = None

    def decode(
        self,
        model: Any,
        input_ids: Int[Tensor, "beam position"],
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        """Return the answer's ids after the prompt's, as ``generate(custom_generate=...)`` does.

        Raises:
            ParameterError: if it is to sample, or to read several prompts or a cache of a fixed
                size.
            InterventionError: if the model's cache does not go back.
        """
        _check(input_ids, generation_config, options)
        self._searching, memory = True, _Memory()
        reader = _Reader(model, input_ids.shape[1], options)
        beams = Beams.start(input_ids)
        columns = torch.zeros(len(input_ids), 0, dtype=torch.double, device=input_ids.device)
        self.penalties, self.returns, self.uncut = [], [], None
        try:
            while not beams.over:
                logits = reader.read(beams.ids)
                columns = self._lengthen(columns, beams)
                memory.steps.append(_Past(beams, columns, reader.options))
                scores = self._judge(reader, beams, columns, logits, memory)
                place = memory.place(self.method)
                if place is not None:
                    self.returns.append((beams.generated, place))
                    ruled_out = memory.return_to(place)
                    beams, columns = memory.steps[place].beams, memory.steps[place].columns
                    logits = reader.reread(memory.steps, place).double()
                    scores = logits.flatten().index_fill(0, ruled_out, -torch.inf)
                    scores = scores.reshape(logits.shape)
                log_probs = logits_processor(beams.ids, scores.log_softmax(dim=1).float())
                beams, parents, tokens = beams.advance(
                    log_probs, generation_config, lambda ids: stopping_criteria(ids, None)
                )
                memory.steps[-1].chosen = parents * log_probs.shape[1] + tokens
                reader.reorder(parents)
                columns = columns[parents]
        finally:
            self._searching, self._row = False, None
        return beams.output(generation_config)

    def _lengthen(self, columns: Columns, beams: Beams) -> Float[Tensor, "beam longer"]:
        """Return the columns' sums with the row of the token that was read, if it is one."""
        if beams.generated == 0:
            return columns
        assert self._row is not None
        row = self._row[0][:, beams.prompt_rows :]
        return functional.pad(columns, (0, 1)) + (self.method.scale * row).log()

    def _judge(
        self,
        reader: "_Reader",
        beams: Beams,
        columns: Columns,
        logits: Logits,
        memory: _Memory,
    ) -> Float[Tensor, "beam vocabulary"]:
        """Return the candidates' logits less their penalties, −∞ elsewhere; note what is leant on.

        In float64, up to a constant of each beam.
        """
        method, found, where = self.method, [], []
        most, candidates = logits.topk(min(method.candidates, logits.shape[1]), dim=1)
        for tokens in candidates.unbind(dim=1):
            reader.look_ahead(torch.cat([beams.ids, rearrange(tokens, "b -> b 1")], dim=1))
            assert self._row is not None
            row, visual = self._row
            leaning = functional.pad(columns, (0, 1))
            leaning = leaning + (method.scale * row[:, beams.prompt_rows :]).log()
            leaning[:, : -method.window] = -torch.inf
            worst = leaning.amax(dim=1)
            counted = (FLOOR * leaning.exp()).half() if method.variant == "released" else leaning
            where.append(counted.argmax(dim=1))
            if beams.generated < method.early:
                found.append(-row.gather(1, visual).sum(dim=1))
            else:
                found.append(FLOOR * worst.clamp_max(LARGEST).exp())
        penalties = torch.stack(found, dim=1)
        self.penalties.append(penalties)
        memory.leant_on.append(most_frequent(torch.stack(where, dim=1)))
        # A constant of a beam goes out in its softmax; without it, nothing large is subtracted.
        less = method.weight * (penalties - penalties.amin(dim=1, keepdim=True))
        scores = torch.full_like(logits, -torch.inf, dtype=torch.double)
        if self.uncut is None:
            kept = (most - method.weight * penalties).to(logits.dtype)
            self.uncut = logits.scatter(1, candidates, kept)
        return scores.scatter(1, candidates, most.double() - less)


class _Reader:
    """Runs the model for the search, with its key-value cache if there is one."""

    def __init__(self, model: Any, prompt_rows: int, options: dict[str, Any]) -> None:
        self.model, self.prompt_rows = model, prompt_rows
        self.options = options
        self._next: dict[str, Any] | None = None

    def _run(self, ids: Int[Tensor, "beam position"], options: dict[str, Any]) -> Any:
        first = ids.shape[1] == self.prompt_rows
        only = 1 if options["use_cache"] and not first else None
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=only, is_first_iteration=first, **options
        )
        return self.model(**inputs, return_dict=True)

    def read(self, ids: Int[Tensor, "beam position"]) -> Logits:
        """Return the logits after these tokens, of which all but the last were read before."""
        if self._next is not None:
            self.options, self._next = self._next, None
        out = self._run(ids, self.options)
        self._next = self.model._update_model_kwargs_for_generation(out, dict(self.options))
        return out.logits[:, -1].float()

    def look_ahead(self, ids: Int[Tensor, "beam position"]) -> None:
        """Read one more token, and leave no trace of it."""
        assert self._next is not None
        self._run(ids, self._next)
        if self._next["use_cache"]:
            take_off(cache_of(self._next), 1)

    def reread(self, steps: list[_Past], place: int) -> Logits:
        """Go back to a step, whose answer so far is read again; return its logits."""
        ids, options = steps[place].beams.ids, steps[place].options
        self._next = None
        if options["use_cache"]:
            cache = cache_of(options)
            take_off(cache, cache.get_seq_length() - self.prompt_rows)
            for step in range(1, place):
                self._run(ids[:, : self.prompt_rows + step], steps[step].options)
        self.options = options
        return self.read(ids)

    def reorder(self, parents: Int[Tensor, " beam"]) -> None:
        """Have the cache follow the beams."""
        assert self._next is not None
        if self._next["use_cache"]:
            cache_of(self._next).reorder_cache(parents)


def _check(
    ids: Int[Tensor, "beam position"], config: GenerationConfig, options: dict[str, Any]
) -> None:
    """Raise ParameterError unless one prompt's beams are to be searched, with a cache that fits."""
    if config.do_sample:
        raise ParameterError("OPERA is a beam search and does not sample. Pass do_sample=False.")
    if len(ids) != config.num_beams:
        raise ParameterError(
            f"OPERA searches for one prompt at a time, but got {len(ids)} rows for "
            f"{config.num_beams} beams. Use cl.generate(), which asks a batch one by one."
        )
    cache = cache_of(options)
    if options["use_cache"] and not isinstance(cache, DynamicCache):
        raise ParameterError(
            f"OPERA takes tokens off the key-value cache again, which a {type(cache).__name__} "
            "cannot do. Leave cache_implementation unset."
        )


def most_frequent(values: Int[Tensor, "*rows one"]) -> Int[Tensor, "*rows"]:
    """Return each row's most frequent value, the smallest of several."""
    equal = (rearrange(values, "... n -> ... n 1") == rearrange(values, "... n -> ... 1 n")).sum(-1)
    most = equal.amax(dim=-1, keepdim=True)
    return values.masked_fill(equal < most, torch.iinfo(values.dtype).max).amin(dim=-1)
