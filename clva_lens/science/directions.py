"""Directions between two sets of states: from the differences of pairs to one vector.

With d_i = a_i − b_i the difference of pair i, the mean direction is v = 1/n Σ d_i (contrastive
activation addition, Rimsky et al., arXiv:2312.06681). The principal one is v = m·u, where u is the
unit vector that maximises Σ (d_i·u)² (representation engineering, Zou et al., arXiv:2310.01405,
Sec. 3.1: the first principal component of differences and their negatives, whose mean is 0), with
the sign that makes m = 1/n Σ d_i·u not negative. So both are as long as the sets are apart along
them, and a strength of 1 moves one set's mean to the other's, along v.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.ground.errors import ParameterError

How = Literal["mean", "pca"]
"""How a direction is made of differences."""


def direction(
    differences: Float[Tensor, "pair *axes width"], how: str
) -> Float[Tensor, "*axes width"]:
    """Return the direction of the pairs' differences, for each of the other axes; in float64.

    Raises:
        ParameterError: if ``how`` is none, or there is no pair.
    """
    if how not in get_args(How):
        raise ParameterError(f"how must be 'mean' or 'pca', but is {how!r}. Pass how='mean'.")
    if not len(differences):
        raise ParameterError("there is no pair of prompts to tell apart. Pass some pairs.")
    wide = differences.double()
    if how == "mean":
        return wide.mean(dim=0)
    rows = wide.movedim(0, -2)
    unit = torch.linalg.svd(rows, full_matrices=False).Vh[..., 0, :]
    return (rows @ unit[..., None]).mean(dim=-2) * unit


def explained(
    differences: Float[Tensor, "pair *axes width"], vector: Float[Tensor, "*axes width"]
) -> Float[Tensor, "*axes"]:
    """Return the share of the differences' squared length that lies along a direction, in [0, 1].

    It is 0 where either has no length.
    """
    rows, wide = differences.double().movedim(0, -2), vector.double()
    along = (rows @ wide[..., None]).square().sum(dim=(-2, -1))
    whole = rows.square().sum(dim=(-2, -1)) * wide.square().sum(dim=-1)
    return torch.where(whole > 0, along / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)
