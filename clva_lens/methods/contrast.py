"""Contrastive decoding: the logits of a prompt against those of a second, worse input.

VCD, ICD, IMCCD and PAI's guidance differ in the second input (a noisy picture, a disturbing
instruction, an impaired attention, no picture) and share the rest: it has a key-value cache of its
own, it reads the tokens that the model generates from the first one, and the logits of the last
position, l and l′, are combined and cut off (adaptive plausibility, arXiv:2210.15097): a token
keeps a probability if l ≥ max l + ln β. "l" is what the model says without the contrast.

The second input is read by a twin of the model (``models/twin.py``), so traces and hooks see the
model's own pass only; where there are none, a generated token is read for all inputs in one pass
(``one_batch.py``). Methods of the same run act on both inputs, where the second has a picture
at all; ``PatchActivations``, and what is done to activations by hand, in a trace or by hooks, acts
on the first.

Beams: the second cache is reordered with the model's. The releases of VCD and ICD define sampling,
PAI's and IMCCD's greedy decoding and sampling (IMCCD's beams leave the second cache as it was).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from clva_lens.engine.beams import Reordering
from clva_lens.engine.run import open_sessions
from clva_lens.engine.session import Session, required_read_before
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.branch import Branch
from clva_lens.methods.one_batch import OneBatch
from clva_lens.models.beginning import Beginning, read_beginning
from clva_lens.models.belonging import found_at
from clva_lens.models.decoder_passes import DecoderPasses
from clva_lens.models.family import Inputs, find_family, find_site
from clva_lens.models.norms import wide
from clva_lens.models.positions import positions_of
from clva_lens.models.room import Room
from clva_lens.models.step import Step
from clva_lens.models.twin import twin

Form = Literal["difference", "subtraction", "guidance", "sum"]
"""(1 + a)·l − a·l′; l − a·l′; lp′ + a·(lp − lp′) with lp = log softmax l; or l + a·l′."""

Logits = Float[Tensor, "batch vocabulary"]


@dataclass(frozen=True, kw_only=True)
class ContrastRule:
    """How the logits l of the prompt and l′ of the second input make the method's.

    Args:
        strength: a of ``form``; finite and >= 0.
        beta: β of the cut-off l >= max l + ln β, in [0, 1]; 0 cuts nothing off.
        form: see ``Form``.

    Raises:
        ParameterError: if a parameter is out of range.
    """

    strength: float | int
    beta: float | int
    form: Form = "difference"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ParameterError(
                f"the strength of a contrast must be a finite number >= 0, but is {self.strength}. "
                "Pass 1.0, for example."
            )
        if not 0 <= self.beta <= 1:
            raise ParameterError(
                f"beta must be in [0, 1], but is {self.beta}. Pass beta=0.1, for example."
            )
        if self.form not in get_args(Form):
            raise ParameterError(
                f"form must be one of {', '.join(get_args(Form))}, but is {self.form!r}. Pass "
                "form='difference'."
            )

    @property
    def is_identity(self) -> bool:
        """Whether the contrast is the prompt's own logits: it is left out then, cut-off and all."""
        return self.strength == (1 if self.form == "guidance" else 0)

    def uncut(self, own: Logits, *others: Logits, token: int = 1) -> Logits:
        """Return the contrast before the cut-off, in float32 or better.

        Of several second inputs, l′ is the mean.
        """
        own, other = wide(own), wide(others[0])
        if len(others) > 1:
            other = torch.stack([wide(one) for one in others]).mean(dim=0)
        if self.form == "guidance":
            own, other = own.log_softmax(dim=-1), other.log_softmax(dim=-1)
            return other + self.strength * (own - other)
        if self.form == "sum":
            return own + self.strength * other
        weight = 1 + self.strength if self.form == "difference" else 1
        return weight * own - self.strength * other

    def cut(self, own: Logits, contrast: Logits) -> Logits:
        """Return ``contrast`` with −∞ where l < max l + ln β."""
        if self.beta == 0:
            return contrast
        floor = own.amax(dim=-1, keepdim=True) + math.log(self.beta)
        return contrast.masked_fill(own < floor, -torch.inf)


class Rule(Protocol):
    """What makes one row of logits of the prompt's and of those of its second inputs."""

    def uncut(self, own: Logits, *others: Logits, token: int = 1) -> Logits:
        """Return them for the ``token``-th new token (1 is the first), before any cut-off."""
        ...

    def cut(self, own: Logits, contrast: Logits) -> Logits:
        """Return ``contrast`` with −∞ at tokens that become impossible."""
        ...


Second = Callable[[Inputs], Inputs]
"""What makes a second input of the prompt's."""


class Gate(Session):
    """Decides at which steps a contrast is made; where it is not, the cut-off stays.

    It acts on the model itself, in the run of the ``ContrastSession`` that asks it.
    """

    @abstractmethod
    def opened(self) -> Bool[Tensor, " batch"]:
        """Return which samples the pass that has just been read is contrasted for."""

    @abstractmethod
    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Take these rows, each the continuation of a row before."""


class ContrastSession(Session):
    """Reads a second input beside the prompt, and contrasts the logits of every pass with it.

    ``second`` makes it from the prompt's inputs: ``input_ids`` and ``attention_mask`` [batch,
    position], ``pixel_values``, and what else the family's ``watch`` keeps. Without
    ``pixel_values`` it is text only. Rows and their order stay; lengths may change, but no text
    after the picture does. ``impair`` makes sessions that act on the second input only. ``gate``
    leaves the contrast out at steps. Several ``second`` make as many second inputs, each read
    beside the prompt. ``whole``: what they are depends on the question, or ``impair`` acts on rows
    before it, so that nothing can be shared with other questions.

    Where the prompt goes on from a picture that was read before, so does the second input: from
    what ``second`` makes of the prompt's beginning, which is read once for all that are equal.
    """

    site = "decoder"
    layers = ()
    leaves_prefix = rereads = True
    edits_logits = True
    cuts_off = True

    def __init__(
        self,
        model: PreTrainedModel,
        second: Second | Sequence[Second],
        rule: Rule,
        impair: Callable[[PreTrainedModel], list[Session]] = lambda _: [],
        gate: Gate | None = None,
        *,
        whole: bool = False,
    ) -> None:
        """Prepare; nothing is read before the first pass.

        Raises:
            InterventionError: if the language model is an encoder-decoder.
        """
        self.model, self.rule, self.impair, self.gate = model, rule, impair, gate
        self.seconds = tuple(second) if isinstance(second, Sequence) else (second,)
        self.leaves_prefix = not whole
        self._modules, passes = (site := find_site(model, "decoder")).modules, site.passes()
        if not isinstance(passes, DecoderPasses):
            raise InterventionError(
                "contrastive methods read their second input with a decoder-only language model, "
                f"but this {type(model).__name__} has an encoder-decoder (T5). Use the model with "
                "a Llama or OPT."
            )
        self._twin: PreTrainedModel | None = None
        self._seen: Inputs = {}
        self._handles: list[RemovableHandle] = []
        self._branches: list[Branch] = []
        self._reordering = Reordering(passes.entry, self._reorder)
        self._one_batch = OneBatch(passes.entry)
        self._last: tuple[Step, list[Logits]] | None = None

    def begin(self) -> None:
        """Watch the pictures that come in, the key-value cache and the decoder."""
        self._handles = find_family(self.model).watch(self.model, self._seen)
        self._reordering.begin()
        self._one_batch.begin(found_at(self._modules[0]))

    def end(self) -> None:
        """Let go of the model, its cache and the second input."""
        for handle in self._handles:
            handle.remove()
        self._reordering.end()
        self._one_batch.end()
        self._close()
        self._twin = self._last = None
        self._seen.clear()

    def _close(self) -> None:
        self._one_batch.stop()
        for branch in self._branches:
            branch.close()
        self._branches = []

    def logits(self, step: Step, logits: Float[Tensor, "row vocabulary"]) -> Logits:
        """Return the contrast of a pass's last position, cut off."""
        assert step.ids is not None
        read: list[Logits] = []
        if self._one_batch.joined:
            logits, *read = logits.split(len(step.ids))
        if self._last is None or self._last[0] is not step:
            self._last = (step, self._read(step, read))
        token = step.offset + step.ids.shape[1] - step.prompt_rows + 1
        others = [one.to(logits.device) for one in self._last[1]]
        contrast = self.rule.uncut(logits, *others, token=token)
        if self.gate is not None:
            made = self.gate.opened().to(logits.device)
            contrast = contrast.where(made[:, None], logits.to(contrast.dtype))
        if step.number == 0:
            self.uncut = contrast
        return self.rule.cut(logits, contrast)

    def _read(self, step: Step, read: list[Logits]) -> list[Logits]:
        """Return the second inputs' logits after the tokens that this pass reads.

        ``read`` are they where the pass was of one batch with the second inputs.
        """
        assert step.ids is not None
        if step.number == 0:
            self._begin_branches(step)
            return [one.read(step.ids[:, step.prompt_rows :]) for one in self._branches]
        if not self._branches:
            raise InterventionError(
                "a contrastive method joined a run whose prompt had been read already, so its "
                "second input is unknown. Start it before the prompt is read."
            )
        if step.offset == 0:
            return [one.reread(step.ids[:, step.prompt_rows :]) for one in self._branches]
        known = self._branches[0].generated
        if step.offset != step.prompt_rows + known:
            raise InterventionError(
                f"a pass reads position {step.offset}, but the second input has been read with "
                f"{known} generated tokens (the key-value cache was cut, or passes were "
                "left out). Generate under one method from the prompt on."
            )
        if read:
            for branch in self._branches:
                branch.generated += 1
            return read
        return [one.read(step.ids) for one in self._branches]

    def _begin_branches(self, step: Step) -> None:
        self._close()
        if self._twin is None:
            self._twin = twin(self.model)
        seen = dict(self._seen)
        self._seen.clear()
        whole = None if step.offset > 0 else whole_inputs(step, seen)
        alike, edited = whole is not None, False
        for number, make in enumerate(self.seconds):
            # Sessions act on all passes of a model, so each second input has a twin of its own.
            other = self._twin if number == 0 else twin(self.model)
            if whole is None:
                second, cache = self._continued(step, make)
            else:
                second, cache = make(whole), None
            sessions = []
            if cache is not None or "pixel_values" in second:
                others = [s for s in open_sessions(self.model) if not s.edits_logits]
                sessions = [s.again(other) for s in others if s.again is not None]
            sessions += self.impair(other)
            branch = Branch(other, second, sessions, cache, counts=step.offset > 0)
            self._branches.append(branch)
            edited = edited or bool(sessions)
            if whole is not None:
                alike = alike and has_tokens_of(second, whole)
        if not edited:
            full = bool(step.spans.real.all()) and all(one.full for one in self._branches)
            self._one_batch.start(self._branches, alike=alike and full)

    def _continued(self, step: Step, make: Second) -> tuple[Inputs, DynamicCache | None]:
        """Return a second input's question, and a cache with all that is before it.

        The whole input, and no cache, where it is text only.
        """
        before, rows = required_read_before(step)
        assert step.ids is not None
        if make is not same:
            other = before.once(self.model, make, partial(self._beginning, make))
            if other is None:
                ids = torch.cat([before.inputs["input_ids"][rows], step.ids], dim=1)
                mask = step.spans.real.long()
                return make({"input_ids": ids, "attention_mask": mask}), None
            before = other
        question = step.spans.real[:, step.offset :]
        mask = torch.cat([before.spans.real[rows], question], dim=1).long()
        inputs = {"input_ids": step.ids, "attention_mask": mask}
        return inputs, before.fork(self.model, rows, Room(step.ids.shape[1]))

    def _beginning(self, make: Second, before: Beginning) -> Beginning | None:
        """Return a second input's beginning, None where it is text only."""
        assert self._twin is not None
        second = make({n: one for n, one in before.inputs.items() if n != "position_ids"})
        if "pixel_values" not in second:
            return None
        places = positions_of(self._twin, second)
        second |= {} if places is None else {"position_ids": places}
        spans = find_family(self._twin).spans(self._twin, "decoder", second)
        return read_beginning(self._twin, second, spans)

    def _reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Have the second caches reordered with the model's, as beam search does."""
        for branch in self._branches:
            branch.reorder(rows)
        if self.gate is not None:
            self.gate.reorder(rows)


def whole_inputs(step: Step, seen: Inputs) -> Inputs:
    """Return a prompt's inputs, with what was seen of them before it was read."""
    assert step.ids is not None
    rows = len(step.ids)
    inputs = {"input_ids": step.ids, "attention_mask": step.spans.real.long()}
    for name, value in seen.items():  # one a picture; the prompt may be one a beam
        inputs[name] = value.repeat_interleave(rows // len(value), dim=0)
    if "pixel_values" not in inputs:
        raise InterventionError(
            "a contrastive method saw no pixels before the prompt was read (the picture's "
            "features were passed instead), so it has no second input. Pass pixel_values."
        )
    return inputs


def has_tokens_of(second: Inputs, first: Inputs) -> bool:
    """Whether a second input is the first one, but for its pixels."""
    return all(second.get(name) is first[name] for name in first.keys() - {"pixel_values"})


def same(inputs: Inputs) -> Inputs:
    """Return the second input of a contrast whose sessions alone tell it from the first."""
    return inputs


def text_only(image_token_id: int) -> Callable[[Inputs], Inputs]:
    """Return what takes the picture out of a prompt: its pixels and its tokens (PAI)."""

    def second(inputs: Inputs) -> Inputs:
        ids = inputs["input_ids"]
        kept = ids != image_token_id
        names = ("input_ids", "attention_mask")
        return {name: inputs[name][kept].reshape(len(ids), -1) for name in names}

    return second
