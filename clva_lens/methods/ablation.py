"""Head ablation: what is lost without the output of some heads.

A head's output z (its mix of values, before the output projection) is replaced by zeros, by its
mean over a reference set of prompts, or by that of another prompt of the batch (resampling). Zeros
take the head's constant part away too; the mean and the resampled z keep what is usual of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clva_lens.engine.row_reading import stack_layers
from clva_lens.engine.session import AttentionCall, Session
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.methods.base import Kernel, Method, check_order, edited_rows, register_method
from clva_lens.methods.choosing import ChosenHeads, chosen_heads
from clva_lens.methods.target import Shape, Target
from clva_lens.models.step import Step
from clva_lens.science.heads import SomeHeads

Mode = Literal["zero", "mean", "resample"]
"""What the output of a head becomes."""

ZRows = Literal["text", "last", "all"]
"""Which rows: as ``Rows``, or all of them (image and system too)."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadMeans:
    """The mean output z of each head at a site, over ``rows`` rows; made by ``head_means``."""

    values: Float[Tensor, "layer head width"]
    site: str
    rows: int

    def __repr__(self) -> str:
        """Return the size and how many rows are in the mean."""
        layers, heads, width = self.values.shape
        return (
            f"HeadMeans({self.site}: {layers} layers × {heads} heads of width {width}, "
            f"over {self.rows} rows)"
        )


@register_method
@dataclass(frozen=True, kw_only=True)
class AblateHeads(Method):
    """Replace the output of heads, before the output projection; generated rows always.

    Args:
        heads: pairs (layer, head), {layer: [heads]}, or a bool mask [layer, head] with a row for
            each layer of the stack, or for each that the site has; or "sensitive" or
            "insensitive", the class that each layer gives its heads on the prompt (Eqs. 2-3 of
            arXiv:2603.25088v1).
        mode: "zero"; "mean", the heads' means in ``reference``; or "resample", the same rows of
            another prompt of the batch, which must have its rows in the same places (not for beam
            search, where that may be another beam of the same prompt).
        rows: prompt rows that are replaced: all text after the image, the "last", or "all".
        reference: the means for mode="mean", from ``head_means(model, prompts)``.
        seed: which other prompt each one gets; none gets itself.
        layers: 0-based; None is every layer in which a head is named, and for a class every
            layer after L/2 − 2, those that CLVA edits by default.
        site: where; None is where the model's family has CLVA act.

    Raises:
        ParameterError: if a parameter is none of these, or mean and reference are not together.

    >>> cl.generate(model, prompt, cl.AblateHeads(heads={4: [5, 6]})).texts
    ['no']
    """

    name: ClassVar[str] = "ablation"
    paper: ClassVar[str] = "control: head ablation by zero, mean or resampled output"
    kernel: ClassVar[Kernel] = "none"
    zero: ClassVar[Mapping[str, Any] | None] = {"layers": ()}
    heads: SomeHeads | str = "sensitive"
    mode: Mode = "zero"
    rows: ZRows = "text"
    reference: HeadMeans | None = None
    seed: int = 0
    layers: Sequence[int] | None = None
    site: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.mode not in get_args(Mode):
            raise ParameterError(
                f"mode must be 'zero', 'mean' or 'resample', but is {self.mode!r}. "
                "Pass mode='zero'."
            )
        if self.rows not in get_args(ZRows):
            raise ParameterError(
                f"rows must be 'text', 'last' or 'all', but is {self.rows!r}. Pass rows='text'."
            )
        if (self.mode == "mean") != (self.reference is not None):
            raise ParameterError(
                f"mode is {self.mode!r} and reference is {self.reference}, but the mean needs its "
                "reference, and nothing else takes one. Pass "
                "mode='mean', reference=head_means(model, prompts)."
            )
        object.__setattr__(self, "heads", chosen_heads(self.heads))

    def sessions(self, target: Target) -> list[Session]:
        """Return one session for the layers of this model."""
        shape = target.at(self.site)
        check_order("last" if self.rows == "last" else "text", shape)
        if self.reference is not None:
            size = (len(shape.layers), shape.heads)
            found = tuple(self.reference.values.shape[:2])
            if (self.reference.site, found) != (shape.site, size):
                raise ParameterError(
                    f"reference is for {found} (layers, heads) of site '{self.reference.site}', "
                    f"but the model's {shape.site} has {size}. Make it with head_means(model, "
                    f"prompts, site='{shape.site}')."
                )
        return [_AblationSession(self, shape)]


class _AblationSession(Session):
    edits_output = True

    def __init__(self, method: AblateHeads, shape: Shape) -> None:
        self.method, self.shape, self.site = method, shape, shape.site
        self.heads = ChosenHeads(chosen_heads(method.heads), method.layers, shape)
        self.layers = self.heads.layers
        # A prompt of the batch gives another its rows, which must lie at the same places.
        self.leaves_prefix = method.rows != "all" and method.mode != "resample"
        self._rows: tuple[Step, Bool[Tensor, "batch query"]] | None = None

    def attention(self, call: AttentionCall) -> None:
        """Edit no scores; a class of heads is read from the prompt here."""
        if call.layer in self.layers and self.heads.kind is not None and call.step.number == 0:
            self.heads.at(call)

    def output(
        self, call: AttentionCall, out: Float[Tensor, "batch query head width"]
    ) -> Float[Tensor, "batch query head width"] | None:
        """Return z with the chosen heads replaced in the chosen rows."""
        if call.layer not in self.layers:
            return None
        if self._rows is None or self._rows[0] is not call.step:
            self._rows = (call.step, _rows(call, self.method.rows))
        rows = self._rows[1]
        chosen = rearrange(rows, "b q -> b q 1 1") & rearrange(
            self.heads.known(call), "b h -> b 1 h 1"
        )
        return torch.where(chosen, self._replacement(call, out, rows), out)

    def _replacement(self, call: AttentionCall, out: Tensor, rows: Tensor) -> Tensor:
        if self.method.mode == "resample":
            return out[self._donors(len(out), rows)]
        if self.method.reference is None:
            return torch.zeros_like(out)
        return self.method.reference.values[self.shape.layers.index(call.layer)].to(out)

    def _donors(self, batch: int, rows: Bool[Tensor, "batch query"]) -> Tensor:
        if batch < 2:
            raise ParameterError(
                "mode='resample' takes another prompt of the batch, but the batch has 1. Pass "
                "several prompts at once, or mode='mean'."
            )
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(self.method.seed))
        donors = torch.empty_like(order)
        donors[order] = order.roll(1)  # one cycle: none is its own
        donors = donors.to(rows.device)
        if not torch.equal(rows, rows[donors]):
            raise InterventionError(
                "mode='resample' takes the same rows of another prompt, but the prompts of this "
                "batch have theirs in different places. Ask questions of the same length, or pass "
                "rows='last'."
            )
        return donors


class MeanSession(Session):
    """A session that edits nothing and adds up the outputs of heads over prompt rows."""

    edits_output = True

    def __init__(self, shape: Shape, rows: ZRows = "text") -> None:
        """Begin with no rows."""
        self.shape, self.site, self.layers = shape, shape.site, shape.layers
        self.rows: ZRows = rows
        self._sums: dict[int, Float[Tensor, "head width"]] = {}
        self._count = 0

    def output(self, call: AttentionCall, out: Float[Tensor, "batch query head width"]) -> None:
        """Add the rows of one layer, in float64."""
        if call.step.number > 0:
            return
        rows = _rows(call, self.rows)
        total = out[rows].sum(dim=0, dtype=torch.float64)
        self._sums[call.layer] = self._sums.get(call.layer, 0) + total
        if call.layer == self.layers[0]:
            self._count += int(rows.sum())

    def means(self) -> HeadMeans:
        """Return the means over the rows so far.

        Raises:
            ParameterError: if there are none.
        """
        if not self._count:
            raise ParameterError("no prompt was read, so heads have no mean. Pass some prompts.")
        sums = stack_layers([self._sums[layer] for layer in self.layers], dim=0)
        return HeadMeans((sums / self._count).float(), self.site, self._count)


def _rows(call: AttentionCall, rows: ZRows) -> Bool[Tensor, "batch query"]:
    """Return which query rows of this pass are meant; padding never is."""
    if rows != "all":
        return edited_rows(call, rows)
    step, count = call.step, call.query.shape[2]
    if not step.causal:
        return torch.ones(call.query.shape[0], count, dtype=torch.bool, device=call.query.device)
    return step.spans.real[:, step.offset : step.offset + count]
