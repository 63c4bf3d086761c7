"""IMCCD, intra- and cross-modal contrastive decoding (lijm48/IMCCD at 9db52a0, from its formulas).

Two parts. **CDAR** acts on the model itself: text looks at the image as if image positions were
compressed. With c = 3, image token j of N (the first at s) stands at s + j/c, and a text row p at
p − N(1 − 1/c); the score of every text row to every image token is that of these positions.

**CMVED** impairs the second input, which is otherwise the same: of the text rows' scores L to the
image, those above their mean (one mean a layer, over heads, rows and image tokens) are marked, and
what a marked token would bring is replaced by nothing in particular. With A = softmax(L) over all
keys and M the marks,

    O_i = Σ_j A_ij (1 − M_ij) V_j + (Σ_j A_ij M_ij) · v̄,

v̄ the mean of the head's values over image tokens and channels. The prompt's text rows share a
mean, a generated row has its own, as in stepwise decoding. Then (1 + α)·l − α·l′ for tokens with
l ≥ max l + ln β.

For captions the release leaves the contrast out (α := 0; the cut-off stays) at steps that look
little at the image: with g the sum of the model's own scores L over the image, after CDAR, for the
row that predicts the token, averaged over layers and heads, those with g below its mean over the
steps so far, this one included. Sampling takes the first 30 of these, greedy search the last 30:
``gate`` = "first" or "last". g is of scores, not of probabilities, so it has no unit and any sign.

**Departs from the release**: the mean is taken for each sample of a batch (the release has batches
of one), and so is what ``gate`` decides; of beams, each has its own mean and its own second cache,
where the release takes one mean over all beams, does not reorder the second cache with the first
and never gates, so that its beam search is another (the same answers once both are mended in it);
the second input is read from its first token, where the
release copies what its system and image rows have in common with the first, with the same result
(as is done here where the picture was read before its questions).
α = 0 leaves the contrast out, ``compression`` = 1 leaves CDAR out. CDAR forms the scores of text to
image, CMVED the rows of text, in every layer; both are exact under fused kernels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine.session import AttentionCall, Session, raw_scores
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, edited_rows, register_method
from clva_lens.methods.contrast import ContrastRule, ContrastSession, Gate, same
from clva_lens.methods.target import Target, shape_of
from clva_lens.models.family import find_family, find_site

# (α, β, c) of the release's POPE scripts.
RELEASED = {"instructblip": (3.0, 0.3, 1.0)}
RELEASED_ELSE = (3.0, 0.2, 3.0)
# How many steps the release's gate takes the mean of.
REMEMBERED = 30

Window = Literal["first", "last"]
"""Which steps the gate takes the mean of."""


@register_method
@dataclass(frozen=True, kw_only=True)
class IMCCD(Method):
    """Compressed distances to the image, contrasted with an impaired look at it.

    None takes the release's setting for POPE. The release's captions use alpha=1 and a gate.

    Args:
        alpha: α, the strength of the contrast, >= 0; 0 leaves it out. Default: 3.
        beta: β of the cut-off, in [0, 1]. Default: 0.2; InstructBLIP 0.3.
        compression: c, how much nearer image positions lie to each other, >= 1; 1 leaves CDAR out.
            Default: 3; InstructBLIP 1, as released.
        gate: leave the contrast out at steps that look less at the image than the mean of the
            "first" 30 steps, as the release samples captions, or the "last" 30, as it searches
            them greedily. None: never, as for questions.

    Raises:
        ParameterError: if a parameter is out of range.

    >>> cl.generate(model, prompt, cl.IMCCD(gate="last")).texts
    ['no']
    """

    name: ClassVar[str] = "imccd"
    paper: ClassVar[str] = "lijm48/IMCCD on GitHub"
    kernel: ClassVar[Kernel] = "eager rows"
    forwards: ClassVar[float | int] = 2
    sites: ClassVar[tuple[str, ...]] = ()
    extended: ClassVar[tuple[str, ...]] = ("beam",)
    zero: ClassVar[Mapping[str, Any] | None] = {"alpha": 0.0, "compression": 1}
    alpha: float | int | None = None
    beta: float | int | None = None
    compression: float | int | None = None
    gate: Window | None = None

    def __post_init__(self) -> None:
        """Check everything that was given."""
        _, compression = self._resolve(RELEASED_ELSE)
        if not (math.isfinite(compression) and compression >= 1):
            raise ParameterError(
                f"compression must be a finite number >= 1, but is {compression}. Pass 3, or 1 to "
                "leave the positions as they are."
            )
        if self.gate not in (None, *get_args(Window)):
            raise ParameterError(
                f"gate must be 'first', 'last' or None, but is {self.gate!r}. Pass gate='last' for "
                "captions by greedy search."
            )

    def _resolve(self, defaults: tuple[float, float, float]) -> tuple[ContrastRule, float | int]:
        given = (self.alpha, self.beta, self.compression)
        alpha, beta, compression = (
            default if value is None else value
            for value, default in zip(given, defaults, strict=True)
        )
        return ContrastRule(strength=alpha, beta=beta), compression

    def sessions(self, target: Target) -> list[Session]:
        """Return CDAR and the contrast, each if its strength is not that of nothing.

        Raises:
            ParameterError: if positions are to be compressed that are not rotary.
        """
        model = target.model
        rule, compression = self._resolve(RELEASED.get(find_family(model).name, RELEASED_ELSE))
        sessions: list[Session] = []
        if compression != 1:
            sessions.append(_CompressedDistances(model, compression))
        if not rule.is_identity:
            gate = None if self.gate is None else _Looking(model, self.gate)
            if gate is not None:
                sessions.append(gate)
            sessions.append(ContrastSession(model, same, rule, _impair, gate))
        return sessions


def _impair(model: PreTrainedModel) -> list[Session]:
    return [_Impaired(model)]


class _CompressedDistances(Session):
    """CDAR. Turning an image key by (1 − 1/c)(N − j) positions is the same as moving both ends."""

    leaves_prefix = True

    def __init__(self, model: PreTrainedModel, compression: float | int) -> None:
        language: Any = find_site(model, "decoder").passes().entry
        decoder: Any = language.get_decoder()
        if not hasattr(decoder, "rotary_emb"):
            raise ParameterError(
                f"compression={compression} compresses rotary positions, but a "
                f"{type(decoder).__name__} has none. Pass compression=1."
            )
        self.site, self.layers = "decoder", shape_of(model, "decoder").layers
        self.rotary, self.share = decoder.rotary_emb, 1 - 1 / compression

    def attention(self, call: AttentionCall) -> Float[Tensor, "batch head query key"] | None:
        """Return the new scores of text rows to the image, less the old ones."""
        start, rows = _text_rows(call)
        keys = _at_image(call, call.key)
        count = keys.shape[2]
        # In float64 where there is one: angles reach hundreds of radians.
        kind = torch.float32 if keys.device.type == "mps" else torch.float64
        turn = self.share * (count - torch.arange(count, dtype=kind, device=keys.device))
        angle = turn[:, None] * self.rotary.inv_freq.to(keys.device, kind)
        # Scores are linear in the keys.
        if call.softcap is not None:
            raise InterventionError(
                "the model caps its attention scores, which IMCCD's compressed positions do not go "
                "through. Pass compression=1."
            )
        change = raw_scores(call.query[:, :, start:], _turned_by(keys.float(), angle), call.scaling)
        change = change * rearrange(rows, "b q -> b 1 q 1")
        shape = (*call.query.shape[:3], call.key.shape[2])
        bias = torch.zeros(shape, dtype=torch.float32, device=call.query.device)
        where = rearrange(call.step.visual, "b v -> b 1 1 v").expand_as(change)
        bias[:, :, start:].scatter_(3, where, change)
        return bias


def _turned_by(
    keys: Float[Tensor, "batch kv_head visual width"], angle: Float[Tensor, "visual half"]
) -> Float[Tensor, "batch kv_head visual width"]:
    """Return rotary keys that are turned by these angles, less the keys."""
    first, second = keys.chunk(2, dim=-1)
    cos, sin = (angle.cos() - 1).float(), angle.sin().float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Impaired(Session):
    """CMVED: what stands out in the image brings the mean of its values instead of its own."""

    edits_output = True
    leaves_prefix = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.site, self.layers = "decoder", shape_of(model, "decoder").layers

    def output(
        self, call: AttentionCall, out: Float[Tensor, "batch query head width"]
    ) -> Float[Tensor, "batch query head width"]:
        """Return z with the marked tokens' share replaced in text rows."""
        assert call.value is not None
        start, rows = _text_rows(call)
        count = call.query.shape[2]
        scores = call.scores(start, count)
        looked, share = map(call.step.on_image, (scores, scores.softmax(dim=-1)))
        old = count - start - call.new_rows
        marked = looked > _means(looked, rows, old)
        taken = share * marked * rearrange(rows, "b q -> b 1 q 1")
        values = _at_image(call, call.value).float()
        grouped = rearrange(taken, "b (h g) q v -> b h (g q) v", h=values.shape[1])
        mean = rearrange(values.mean(dim=(2, 3)), "b h -> b h 1 1")
        change = grouped.sum(dim=3, keepdim=True) * mean - grouped @ values
        change = rearrange(change, "b h (g q) w -> b (h g) q w", q=taken.shape[2])
        edited = out.clone()
        edited[:, start:] += rearrange(change, "b h q w -> b q h w").to(out.dtype)
        return edited


class _Looking(Gate):
    """How much the rows that predict tokens look at the image, by the sum of their scores."""

    edits_output = True  # it edits none, but then sees the scores under every method's bias
    leaves_prefix = True

    def __init__(self, model: PreTrainedModel, window: Window) -> None:
        self.site, self.layers = "decoder", shape_of(model, "decoder").layers
        self.window = window
        self._seen: Float[Tensor, "batch step"] | None = None
        self._sum: Float[Tensor, "batch row"] | None = None

    def end(self) -> None:
        """Forget the steps."""
        self._seen = self._sum = None

    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Add a layer's share; after the last one, the pass's steps are known."""
        # Read again without a cache, a pass has all steps; with one, only its own.
        start = max(0, call.step.prompt_rows - 1 - call.step.offset)
        scores = call.scores(start, call.query.shape[2])
        share = call.step.on_image(scores).sum(dim=3).mean(dim=1) / len(self.layers)
        before = None if call.layer == self.layers[0] else self._sum
        self._sum = share if before is None else before + share.to(before.device)
        if call.layer == self.layers[-1]:
            whole = call.step.number == 0 or call.step.offset == 0
            known = None if whole else self._seen
            self._seen = self._sum if known is None else torch.cat([known, self._sum], dim=1)

    def opened(self) -> Bool[Tensor, " batch"]:
        """Return which samples look at the image as much as in the mean, or more."""
        assert self._seen is not None, "layers run before the logits"
        window = slice(REMEMBERED) if self.window == "first" else slice(-REMEMBERED, None)
        return ~(self._seen[:, -1] < self._seen[:, window].mean(dim=1))

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Take these rows' steps."""
        if self._seen is not None:
            self._seen = self._seen[rows.to(self._seen.device)]


def _means(
    looked: Float[Tensor, "batch head row visual"], rows: Bool[Tensor, "batch row"], old: int
) -> Float[Tensor, "batch 1 row 1"]:
    """Return each row's mean score: the first ``old`` rows share one, of those that are text."""
    each = looked.mean(dim=(1, 3))
    if old > 0:
        text = rows[:, :old]
        # Rows before the text do not see the whole image: their means are not finite.
        shared = each[:, :old].where(text, 0.0).sum(dim=1) / text.sum(dim=1)
        each = torch.cat([rearrange(shared, "b -> b 1").expand(-1, old), each[:, old:]], dim=1)
    return rearrange(each, "b q -> b 1 q 1")


def _text_rows(call: AttentionCall) -> tuple[int, Bool[Tensor, "batch row"]]:
    """Return the first row of this pass that is text or generated, and which from there on are."""
    start = max(0, call.step.first_text - call.step.offset)
    return start, edited_rows(call, "text")[:, start:]


def _at_image(
    call: AttentionCall, values: Float[Tensor, "batch kv_head key width"]
) -> Float[Tensor, "batch kv_head visual width"]:
    """Return the keys or values of the image tokens; a view where they are a block."""
    if call.step.block is not None:
        return values[:, :, slice(*call.step.block)]
    _, heads, _, width = values.shape
    where = rearrange(call.step.visual, "b v -> b 1 v 1").expand(-1, heads, -1, width)
    return values.gather(2, where)
