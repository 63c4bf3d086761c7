"""How a bias on keys reaches the attention kernel: as a mask, for the edited rows only, or folded.

A bias that is the same for every edited row, as that of Eq. 10 of arXiv:2603.25088v1 is for the
rows of a prompt, can be applied in three forms, which give the same attention up to rounding:

- **masked**: added to the mask of all rows. One operation more; kernels without masks
  (FlashAttention) cannot be used, and the mask takes query × key numbers.
- **split**: the rows before the first edited one are left to the plain, causal kernel, and only the
  others get a mask, of their rows × key numbers.
- **folded**: (q·k + 1·h + 1·l)·s = s·q·k + b where h + l = b / s. The queries get two more columns,
  1 in edited rows and 0 in others, and the keys hold h and l there; no mask is needed. In half
  precision h and l are the high and the low part of b / s, so b is exact to 2⁻¹⁶ of itself in
  bfloat16 and to 2⁻²² in float16, where a mask of that type holds 2⁻⁹ and 2⁻¹². Heads become wider
  by 8, since kernels want widths that are multiples of 8; FlashAttention takes at most 256.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

BiasForm = Literal["masked", "split", "folded"]
"""A way to apply a bias on keys."""

# Up to this many (sample, row, key) triples a mask costs less than anything that replaces it, and
# where most rows are edited, folding costs less from this many keys on. Measured on an H100 in
# bfloat16 with 32 heads of 128: analyses/measured/forms-h100.json.
SMALL, MANY_KEYS = 2**20, 3072
# The widest heads that FlashAttention takes, the columns that folding adds, and its most negative
# log-weight: exp(−1000) is 0 in float32 beside any score within 890 of it.
WIDEST, COLUMNS, LOWEST = 256, 8, -1000.0

_FORCED: ContextVar[BiasForm | None] = ContextVar("clva_lens_bias_form", default=None)


@dataclass(frozen=True, eq=False)
class KeyBias:
    """Log-weights of keys, the same for all edited rows; other rows are left alone.

    ``keys`` are in nats, float32, −inf for a weight of 0; ``rows`` marks the edited rows of this
    pass, none of which comes before row ``first``. The row of a pass that has only one is edited.
    """

    keys: Float[Tensor, "batch key"]
    rows: Bool[Tensor, "batch query"]
    first: int

    @cached_property
    def dense(self) -> Float[Tensor, "batch 1 query key"]:
        """The same as summands of the scores of all rows."""
        return self.part(0, self.rows.shape[1])

    def part(self, start: int, stop: int) -> Float[Tensor, "batch 1 row key"]:
        """Return the summands of rows ``start`` to ``stop``."""
        keys = self.keys[:, None, None]
        if self.rows.shape[1] == 1:
            return keys
        return keys.where(self.rows[:, None, start:stop, None], 0.0)

    def columns(
        self, scaling: float, kind: torch.dtype
    ) -> tuple[Float[Tensor, "batch 1 query _"], Float[Tensor, "batch 1 key _"]]:
        """Return what folding adds to the queries and to the keys; made once for all layers."""
        made = self._columns
        if (scaling, kind) not in made:
            summand = (self.keys / scaling).clamp_min(LOWEST / scaling)
            high = summand.to(kind)
            keys = torch.stack([high, (summand - high).to(kind)], dim=2)
            keys = functional.pad(keys, (0, COLUMNS - 2))
            rows = self.rows if self.rows.shape[1] > 1 else torch.ones_like(self.rows)
            ones = rearrange(rows, "b q -> b 1 q 1").to(kind).expand(-1, -1, -1, COLUMNS)
            made[scaling, kind] = ones, rearrange(keys, "b k c -> b 1 k c")
        return made[scaling, kind]

    @cached_property
    def _columns(self) -> dict[tuple[float, torch.dtype], tuple[Tensor, Tensor]]:
        """What ``columns`` made so far: of one scaling and type, but for sites that have others."""
        return {}


Bias = KeyBias | Tensor


def add(one: Bias | None, other: Bias) -> Bias:
    """Return the sum of two biases; it stays one on keys if both are, for the same rows."""
    if one is None:
        return other
    if isinstance(one, KeyBias) and isinstance(other, KeyBias):
        same = one.rows is other.rows or one.rows.shape[1] == 1
        if same:
            return KeyBias(one.keys + other.keys, one.rows, one.first)
    return dense(one) + dense(other)


def on(bias: Bias, device: torch.device) -> Bias:
    """Return a bias on a device; itself if it is there."""
    if isinstance(bias, Tensor):
        return at(bias, device)
    if bias.keys.device == device:
        return bias
    return KeyBias(bias.keys.to(device), bias.rows.to(device), bias.first)


def at(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without an operation if it is there: decoding steps count."""
    return tensor if tensor.device == device else tensor.to(device)


def dense(bias: Bias) -> Float[Tensor, "batch _ query key"]:
    """Return a bias as summands of the scores of all rows."""
    if not isinstance(bias, KeyBias):
        return bias
    # A graph cannot be made of the lock in a cached property; a single row's summands are a view.
    return bias.part(0, 1) if bias.rows.shape[1] == 1 else bias.dense


def part(bias: Bias, start: int, stop: int) -> Float[Tensor, "batch _ row key"]:
    """Return a bias as summands of the scores of rows ``start`` to ``stop``."""
    return bias.part(start, stop) if isinstance(bias, KeyBias) else bias[:, :, start:stop]


def choose_form(
    bias: Bias, query: Tensor, key: Tensor, mask: Tensor | None, *, from_start: bool
) -> BiasForm:
    """Return the form that costs least on this device, of those that are possible.

    ``from_start``: the attention is causal, its rows are all there are so far, and its scores are
    not capped.
    """
    count, keys = query.shape[2], key.shape[2]
    if not isinstance(bias, KeyBias) or not from_start or count == 1 or count != keys:
        return "masked"
    possible: dict[BiasForm, bool] = {
        "masked": True,
        "split": 0 < bias.first < count,
        "folded": mask is None and query.shape[3] + COLUMNS <= WIDEST,
    }
    wanted = _FORCED.get()
    if wanted is not None:
        return wanted if possible[wanted] else "masked"
    if query.shape[0] * count * keys <= SMALL:
        return "masked"
    if possible["split"] and 2 * bias.first >= count:
        return "split"
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return "folded" if half and possible["folded"] and keys >= MANY_KEYS else "masked"


@contextmanager
def forced(form: BiasForm) -> Iterator[None]:
    """Use a form wherever it is possible, for measurements and tests."""
    before = _FORCED.set(form)
    try:
        yield
    finally:
        _FORCED.reset(before)


def fold(
    bias: KeyBias,
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch kv_head key width"],
    value: Float[Tensor, "batch kv_head key value_width"],
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, 8 wider, whose plain attention is that under the bias.

    The last columns of the result are zeros and to be cut off. Log-weights below −1000 count as
    −1000.
    """
    ones, columns = bias.columns(scaling, query.dtype)
    ones = ones.expand(-1, query.shape[1], -1, -1)
    columns = columns.expand(-1, key.shape[1], -1, -1)
    wider = key.shape[3] + COLUMNS - value.shape[3]
    return (
        torch.cat([query, ones], dim=3),
        torch.cat([key, columns], dim=3),
        functional.pad(value, (0, wider)),
    )


def aligned(mask: Tensor, kind: torch.dtype) -> Tensor:
    """Return a mask in another type, its rows at multiples of 8: kernels would copy it else."""
    width = mask.shape[-1]
    rows = torch.zeros(*mask.shape[:-1], -(-width // 8) * 8, dtype=kind, device=mask.device)
    return rows[..., :width].copy_(mask)
