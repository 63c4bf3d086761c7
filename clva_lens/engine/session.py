"""What acts during a run: sessions, and what they are shown of a layer's attention."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from clva_lens.engine import bias as folding
from clva_lens.engine.bias import Bias
from clva_lens.engine.stream import Part, Stream, StreamCall
from clva_lens.ground.errors import InterventionError
from clva_lens.models.beginning import ReadBefore
from clva_lens.models.step import Step

# Rows of the pattern are formed in pieces of at most this many scores (64 MiB of float32).
SCORES_AT_ONCE = 2**24


@dataclass(eq=False)
class AttentionCall:
    """Queries, keys and values of one layer in one pass, and the bias that earlier sessions put.

    Sessions read it; the run sets ``bias`` and ``z`` as they act. Queries and keys are as the
    kernel gets them: after the rotary embedding, with the whole cache.
    ``z`` is what the heads put out before any session replaces it; None until they have.
    ``window`` is how many positions a row of this layer looks back, itself included; None is all.
    ``softcap`` c makes c·tanh(s / c) of each score s, before mask and bias; None leaves it.
    ``sinks`` are scores of what each head may look at besides the keys: a row's weights then sum to
    less than 1, and a bias on keys takes from the sink too, or gives to it.
    """

    layer: int
    step: Step
    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch kv_head key width"]
    mask: Tensor | None
    bias: Bias | None
    scaling: float
    value: Float[Tensor, "batch kv_head key value_width"] | None = None
    z: Float[Tensor, "batch query head value_width"] | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None

    @property
    def sees_image(self) -> bool:
        """Whether the last row of this pass looks back to the first image token."""
        last = self.step.offset + self.query.shape[2] - 1
        return self.window is None or self.step.image_start > last - self.window

    @property
    def new_rows(self) -> int:
        """How many of this pass's query rows, at its end, are generated tokens."""
        count, step = self.query.shape[2], self.step
        return count if step.offset >= step.text_rows.shape[1] else count - step.old_rows(count)

    @property
    def is_step(self) -> bool:
        """Whether this pass's only row is a generated token."""
        return self.query.shape[2] == 1 and self.step.offset >= self.step.text_rows.shape[1]

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head row key"]:
        """Return the pattern of query rows ``start`` to ``stop``; each sums to 1, less its sink.

        Softmax in float32 over all keys, under the mask and the bias. Rows are relative to this
        pass; those of padding are meaningless.
        """
        scores = self.scores(start, stop)
        if self.sinks is None:
            return scores.softmax(dim=-1)
        sinks = self.sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]

    def scores(self, start: int, stop: int) -> Float[Tensor, "batch head row key"]:
        """Return what the softmax of ``rows`` is taken of, in float32, under mask and bias."""
        scores = self.products(start, stop)
        allowed = self.additive_mask(start, stop)
        if allowed is not None:
            scores += allowed
        if self.bias is not None:
            scores += folding.part(self.bias, start, stop)
        return scores

    def products(self, start: int, stop: int) -> Float[Tensor, "batch head row key"]:
        """Return the scores of ``rows`` before mask and bias, as the model forms them.

        They are q·k/√d, or what a soft cap makes of that.
        """
        scores = raw_scores(self.query[:, :, start:stop], self.key, self.scaling)
        return scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()

    def row_pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (start, stop) of pieces of these rows that hold few scores each."""
        batch, heads = self.query.shape[:2]
        each = max(1, SCORES_AT_ONCE // (batch * heads * self.key.shape[2]))
        return [(at, min(at + each, stop)) for at in range(start, stop, each)]

    def additive_mask(self, start: int, stop: int) -> Float[Tensor, "..."] | None:
        """Return 0 where a row may look, the lowest float32 elsewhere; None if it may anywhere."""
        keys, count = self.key.shape[2], self.query.shape[2]
        if self.mask is not None:
            rows = slice(start, stop) if self.mask.shape[2] > 1 else slice(None)
            return as_additive(self.mask[:, :, rows, :keys])
        if not self.step.causal or (count == 1 and keys == self.step.offset + 1):
            return None
        known = self.step.of_pass
        # The last one is kept for the next layer; all pieces of many rows would be a whole mask.
        if known.future_place != (start, stop, keys):
            known.future_place, known.future = (start, stop, keys), self._future(start, stop)
        return known.future

    def _future(self, start: int, stop: int) -> Float[Tensor, "row key"]:
        """Return the additive mask of rows that see all that came before them."""
        position = torch.arange(self.key.shape[2], device=self.key.device)
        row = torch.arange(start, stop, device=self.key.device) + self.step.offset
        future = position[None, :] > row[:, None]
        return torch.zeros(future.shape, dtype=torch.float32, device=self.key.device).masked_fill_(
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
    if heads == key.shape[1]:
        return query @ key.mT * scaling
    groups = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], groups * count, width)
    return (grouped @ key.mT).reshape(batch, heads, count, -1) * scaling


def as_additive(mask: Tensor) -> Float[Tensor, "..."]:
    """Return a mask, of truths or of summands, as float32 summands of the scores."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(
        ~mask, torch.finfo(torch.float32).min
    )


class Session:
    """One method's state during one run; it dies with the run.

    ``site`` is where it acts, ``layers`` are those whose attention it reads or edits: only there
    are ``attention`` and ``output`` called. ``edits_output`` and ``edits_logits`` (at the site
    "decoder" only) say whether it wants ``output`` and ``logits`` called, ``streams`` for which
    parts of which layers of the site's stack it wants ``stream`` called. ``steady`` are those of
    ``layers`` whose bias is the same in one pass, so that one of them need be asked only. All stay
    as they are during a run. ``cuts_off``: it makes tokens impossible, which only one session of a
    run may do; ``uncut`` are the prompt's logits as they were before that. ``again`` makes the same
    session for a second model, None if it only looks, or is for the prompt alone and for no second
    input of a contrast (``prompt_only``). ``decode``: it decides the tokens itself, as
    ``generate(custom_generate=...)`` wants it. ``leaves_prefix``: it neither reads nor edits rows
    before the prompt's text, so that these may have been read without it; ``rereads``: but where
    they were, it has a twin of the model read them once more, and keeps what it wants to know with
    them (``step.read_before``). ``looks_ahead``: it is asked in the pass that reads them, too.
    ``compiles``: what it does in a pass of one generated row is ``compiled_step``, and nothing
    else. ``edits_tower``: it edits what the vision tower makes of a picture, so that this is of
    no use to who asks about the same picture without it.
    """

    site: str
    layers: tuple[int, ...] = ()
    steady: Collection[int] = ()
    edits_output: bool = False
    streams: Collection[tuple[Part, int]] = ()
    edits_logits: bool = False
    cuts_off: bool = False
    prompt_only: bool = False
    uncut: Float[Tensor, "batch vocabulary"] | None = None
    again: Callable[[PreTrainedModel], "Session"] | None = None
    decode: Callable[..., Any] | None = None
    leaves_prefix: bool = False
    rereads: bool = False
    looks_ahead: bool = False
    compiles: bool = False
    edits_tower: bool = False

    def begin(self) -> None:
        """Start watching what else is needed of the model; the session is in its run now."""

    def attention(self, call: AttentionCall) -> Bias | None:
        """Look at one layer's attention; return a bias on its scores, or None for no edit.

        A bias is Float["batch _ query key"], or a ``KeyBias`` where it is the same for all rows.
        """
        return None

    def compiled_step(self, call: AttentionCall, seen: dict[Any, Any]) -> Bias | None:
        """Return what ``attention`` does for the only row of a pass, a generated one.

        It is traced into one graph for all passes, so it is a function of tensors: it keeps nothing
        on the session, reads no value of a tensor, and asks no number that grows (``call.step``
        is that of the first generated token, with room for all). ``seen`` is its own for the length
        of a pass: what later layers need goes there.
        """
        raise NotImplementedError

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
        (and a Q-Former's "cross_attn_out") what its blocks put out, as in TransformerLens; "mlp_in"
        is what the MLP reads, after the norm. With a key-value cache, ``hidden`` has this pass's
        rows only, from position ``call.step.offset``.
        nnsight serves a module's own ``.output`` before this, inputs and later modules after it.
        """
        return None

    def logits(
        self, step: Step, logits: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"] | None:
        """Look at the logits of a pass's last position; return what replaces them, or None."""
        return None

    def end(self) -> None:
        """Undo ``begin``."""


def is_ahead(step: Step, sessions: Sequence[Session]) -> bool:
    """Whether a pass reads what is before a prompt's text, which all sessions leave alone.

    Raises:
        InterventionError: if one of them does not.
    """
    if step.number >= 0 and not (step.number == 0 and step.offset > 0):
        return False
    if not all(session.leaves_prefix for session in sessions):
        raise InterventionError(
            "a question is read onto a picture that was read before it, but a method of this run "
            "reads or edits the picture's rows too. Read the whole prompt in one pass."
        )
    return step.number < 0 and not any(session.looks_ahead for session in sessions)


def required_read_before(step: Step) -> ReadBefore:
    """Return what a prompt's text is read onto, for a session that has to know it.

    Raises:
        InterventionError: if nobody knows.
    """
    if step.read_before is None:
        raise InterventionError(
            "a question is read onto a key-value cache of which nobody knows what it was read "
            "from, but a method of this run has a second input, or asks what the picture's rows "
            "look at. Read the whole prompt in one pass, or the picture by cl.read(model, image)."
        )
    return step.read_before
