"""Mask and bias become one additive mask that every kernel can take."""

from dataclasses import replace

import pytest
import torch

from clva_lens.engine.kernels import Merging, merged
from clva_lens.engine.session import AttentionCall
from clva_lens.ground.axes import TokenSpans
from clva_lens.models.step import Step

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_nothing_stays_finite(dtype):
    """In half precision the lowest float32 is −inf: padding rows would turn into NaN and spread."""
    ids = torch.tensor([[0, 5, 5, 5, 7, 8]])  # one token of padding, three of image, two of text
    spans = TokenSpans.from_ids(ids, 5, (ids > 0).long())
    step = Step(0, 0, spans.text, spans, spans.visual_index(), causal=True, ordered=True)
    query, key = torch.randn(2, 1, 4, 6, 8).to(dtype)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 0] = False  # padding is seen by nobody, so row 0 sees nothing
    bias = torch.zeros(1, 1, 6, 6)
    bias[..., 4:, 1:4] = torch.tensor([2.7, -2.3, -torch.inf])
    kernel = merged(AttentionCall(0, step, query, key, mask, bias, 1.0)).to(dtype)
    assert kernel.isfinite().all()
    weights = kernel.float().softmax(dim=-1)
    allowed = mask & ~bias.isneginf()
    assert (weights[..., 1:, :][~allowed[..., 1:, :]] == 0).all()
    # Row 4 sees image keys with weights e^2.7, e^−2.3, 0 and itself with 1.
    wanted = torch.tensor([0, 2.7, -2.3, -torch.inf, 0]).exp()
    wanted[0] = 0
    torch.testing.assert_close(weights[0, 0, 4, :5], wanted / wanted.sum(), rtol=2e-2, atol=1e-3)


def given(query, key, value, mask):
    """A kernel that returns the mask which it is given."""
    return value, mask


def test_one_mask_serves_all_layers_of_a_pass():
    ids = torch.tensor([[5, 5, 7]])
    spans = TokenSpans.from_ids(ids, 5)
    step = Step(0, 0, spans.text, spans, spans.visual_index(), causal=True, ordered=True)
    query, key = torch.randn(2, 1, 4, 3, 8)
    merging, bias = Merging(fused=True), torch.ones(1, 1, 3, 3)
    call = AttentionCall(0, step, query, key, None, bias, 1.0, value=key)
    first = merging.attend(given, call)[1]
    assert merging.attend(given, replace(call, layer=1))[1] is first
    assert merging.attend(given, replace(call, bias=bias.clone()))[1] is not first
    assert torch.equal(first[0, 0].isfinite() & (first[0, 0] > -1e30), torch.ones(3, 3).tril() > 0)
