"""Eqs. 4 and 8-11: expectations by hand, laws by hypothesis, and a float64 reference in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clva_lens.ground.errors import ParameterError
from clva_lens.science.anchors import (
    VisualAnchors,
    anchor_mask,
    check_strengths,
    default_positive_layer,
    reanchor,
    reanchor_log_weights,
    reanchor_weights,
    saliency_map,
    z_scores,
)

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=50)

# In the positive mask, in the negative one, in both, in neither.
POSITIVE = torch.tensor([True, False, True, False])
NEGATIVE = torch.tensor([False, True, True, False])


# ── Eq. 4 ──


def test_map_by_hand():
    rows = torch.tensor([[0.5, 0.25], [0.25, 0.75], [1.0, 0.0]])
    # Heads 0 and 1: (0.5 + 0.25)/2 and (0.25 + 0.75)/2.
    found = saliency_map(rows, torch.tensor([True, True, False]))
    torch.testing.assert_close(found, torch.tensor([0.375, 0.5]), rtol=0, atol=0)


@few
@given(seed=seeds)
def test_map_matches_the_formula(seed):
    rng = np.random.default_rng(seed)
    rows, heads = rng.random((2, 5, 7)) / 7, rng.random((2, 5)) < 0.5
    found = saliency_map(torch.tensor(rows, dtype=torch.float32), torch.tensor(heads))
    expected = [rows[b, heads[b]].mean(0) if heads[b].any() else np.zeros(7) for b in range(2)]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_one_head_set_serves_a_batch():
    rows, heads = torch.rand(3, 4, 5), torch.tensor([True, False, True, False])
    torch.testing.assert_close(saliency_map(rows, heads), saliency_map(rows, heads.expand(3, 4)))


def test_an_empty_head_set_is_a_no_op():
    saliency = saliency_map(torch.rand(3, 8), torch.zeros(3, dtype=torch.bool))
    assert saliency.tolist() == [0.0] * 8
    assert not anchor_mask(saliency).any()
    assert not anchor_mask(saliency, tau=0).any()


def test_heads_outside_the_set_do_not_count_even_as_nan():
    rows = torch.tensor([[0.5, 0.25], [math.nan, math.nan]])
    assert saliency_map(rows, torch.tensor([True, False])).tolist() == [0.5, 0.25]


def test_map_of_a_half_precision_model_is_float32():
    rows = torch.full((2, 3), 0.5, dtype=torch.bfloat16)
    assert saliency_map(rows, torch.ones(2, dtype=torch.bool)).dtype == torch.float32


# ── Eqs. 8-9 ──


def test_mask_by_hand():
    # Nine tokens at 0 and one at 1: μ = 0.1, σ = √(0.1·0.9) = 0.3, z = −1/3 and 3.
    saliency = torch.tensor([0.0] * 9 + [1.0])
    expected = torch.tensor([-1 / 3] * 9 + [3.0])
    torch.testing.assert_close(z_scores(saliency), expected, rtol=1e-5, atol=1e-5)
    assert anchor_mask(saliency).tolist() == [False] * 9 + [True]
    # ε keeps z a little below 3, and the inequality is strict.
    assert not anchor_mask(saliency, tau=3.0).any()


def test_epsilon_is_added_to_sigma():
    # The map of test_mask_by_hand, ε = 0.3 = σ: z halves, 3 → 1.5.
    saliency = torch.tensor([0.0] * 9 + [1.0])
    found = float(z_scores(saliency, epsilon=0.3)[-1])
    assert found == pytest.approx(1.5)


@few
@given(seed=seeds, tau=st.sampled_from([0.5, 1.0, 2.0]))
def test_mask_matches_the_formula(seed, tau):
    saliency = np.random.default_rng(seed).exponential(size=(2, 30)) / 100
    z = (saliency - saliency.mean(-1, keepdims=True)) / (saliency.std(-1, keepdims=True) + 1e-6)
    tensor = torch.tensor(saliency, dtype=torch.float32)
    np.testing.assert_allclose(z_scores(tensor), z, atol=1e-4)
    clear = np.abs(z - tau) > 1e-4  # the rest is within rounding of the threshold
    np.testing.assert_array_equal(anchor_mask(tensor, tau).numpy()[clear], (z > tau)[clear])


@few
@given(seed=seeds, tau=st.floats(0.1, 4), visual=st.integers(1, 40), power=st.integers(1, 20))
def test_mask_is_small(seed, tau, visual, power):
    # Cantelli: at most V/(1 + τ²) tokens lie τ standard deviations above the mean.
    saliency = torch.tensor(np.random.default_rng(seed).random(visual) ** power)
    assert int(anchor_mask(saliency, tau).sum()) <= visual / (1 + tau**2) + 1e-9


@few
@given(seed=seeds)
def test_mask_does_not_know_the_order_of_tokens(seed):
    rng = np.random.default_rng(seed)
    saliency, order = torch.tensor(rng.exponential(size=25)), torch.tensor(rng.permutation(25))
    assert torch.equal(anchor_mask(saliency)[order], anchor_mask(saliency[order]))


def test_a_constant_map_marks_nothing():
    assert not anchor_mask(torch.full((2, 9), 0.1)).any()
    assert not anchor_mask(torch.rand(4, 1)).any()  # a single token has nothing to stand out of


def test_mask_parameters_are_checked():
    with pytest.raises(ParameterError, match=r"tau must be a finite number.*but is -1.0"):
        anchor_mask(torch.rand(4), tau=-1.0)
    with pytest.raises(ParameterError, match=r"tau must be .* Pass tau=2.0"):
        anchor_mask(torch.rand(4), tau=math.nan)
    with pytest.raises(ParameterError, match=r"epsilon must be finite and > 0, but is 0.0"):
        anchor_mask(torch.rand(4), epsilon=0.0)


# ── Eqs. 10-11 ──


def test_weights_by_hand():
    # 1 + 14, 1 − 0.9, 1 + 14 − 0.9, 1.
    expected = torch.tensor([15.0, 0.1, 14.1, 1.0])
    weights = reanchor_weights(POSITIVE, NEGATIVE, 14, 0.9)
    logs = reanchor_log_weights(POSITIVE, NEGATIVE, 14, 0.9)
    assert weights.dtype == logs.dtype == torch.float32
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(logs, expected.log(), rtol=1e-6, atol=0)
    assert logs[3] == 0


def test_weights_are_float32_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        logs = reanchor_log_weights(POSITIVE, NEGATIVE, 14, 0.9)
    finally:
        torch.set_default_dtype(before)
    assert logs.tolist() == pytest.approx(
        [math.log(15), math.log(0.1), math.log(14.1), 0], rel=1e-6
    )


def test_a_weight_of_zero_removes_the_key():
    # 1 + 0.5, 1 − 1 = 0, 1 + 0.5 − 1 = 0.5, 1.
    assert reanchor_weights(POSITIVE, NEGATIVE, 0.5, 1).tolist() == [1.5, 0.0, 0.5, 1.0]
    assert reanchor_log_weights(POSITIVE, NEGATIVE, 0.5, 1)[1] == -math.inf
    # (1 − 0.9) − 0.1 is −2.8e-17 in float64, and means 0.
    assert reanchor_weights(POSITIVE, NEGATIVE, -0.9, 0.1)[2] == 0
    assert reanchor_log_weights(POSITIVE, NEGATIVE, -0.9, 0.1)[2] == -math.inf


@few
@given(alpha=st.floats(-1, 50), beta=st.floats(-50, 1))
def test_weights_match_the_formula(alpha, beta):
    assume(not -1e-9 <= 1 + alpha - beta < 0)  # refused or rounded to 0, either is right
    if 1 + alpha - beta < 0:
        with pytest.raises(ParameterError, match="negative"):
            check_strengths(alpha, beta)
        return
    expected = 1 + alpha * POSITIVE.double().numpy() - beta * NEGATIVE.double().numpy()
    weights = reanchor_weights(POSITIVE, NEGATIVE, alpha, beta)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        reanchor_log_weights(POSITIVE, NEGATIVE, alpha, beta).exp(), expected, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize(("alpha", "beta"), [(14, 0.9), (0, 0), (-0.9, -14), (-1, 0), (14, 1)])
def test_strengths_that_are_allowed(alpha, beta):
    check_strengths(alpha, beta)


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (-2, 0.9, r"1 \+ α = -1 with α = -2, β = 0.9"),
        (14, 1.5, r"1 − β = -0.5 with α = 14, β = 1.5"),
        (-0.5, 0.9, r"1 \+ α − β = -0.4 .* Pass alpha >= -1, beta <= 1 and beta <= 1 \+ alpha"),
        (math.inf, 0.9, r"alpha \(α\) and beta \(β\) must be finite, but are inf and 0.9"),
        (14, math.nan, r"must be finite, but are 14 and nan"),
    ],
)
def test_strengths_are_checked(alpha, beta, message):
    with pytest.raises(ParameterError, match=message):
        check_strengths(alpha, beta)
    with pytest.raises(ParameterError, match=message):
        reanchor_weights(POSITIVE, NEGATIVE, alpha, beta)
    with pytest.raises(ParameterError, match=message):
        reanchor_log_weights(POSITIVE, NEGATIVE, alpha, beta)


def test_reanchor_by_hand():
    pattern = torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]])
    weights, rows = torch.tensor([1.0, 3.0, 1.0]), torch.tensor([False, True])
    # Row 1: 0.5, 0.75, 0.25, sum 1.5 → 1/3, 1/2, 1/6. Row 0 is not a text row.
    found = reanchor(pattern, weights, rows)
    assert found[0, 0].tolist() == [0.5, 0.25, 0.25]
    torch.testing.assert_close(found[0, 1], torch.tensor([1 / 3, 1 / 2, 1 / 6]))


@few
@given(seed=seeds, alpha=st.floats(-0.9, 30), fraction=st.floats(0, 1))
def test_bias_before_the_softmax_is_the_rewrite_after_it(seed, alpha, fraction):
    rng = np.random.default_rng(seed)
    beta = fraction * min(1, 1 + alpha)
    scores = torch.tensor(3 * rng.normal(size=(2, 3, 4, 9)), dtype=torch.float32)
    positive = torch.tensor(rng.random((2, 9)) < 0.3)
    negative = torch.tensor(rng.random((2, 9)) < 0.3)
    positive[:, 0] = negative[:, 0] = False  # a key outside the image: no row loses everything
    weights = reanchor_weights(positive, negative, alpha, beta)
    logs = reanchor_log_weights(positive, negative, alpha, beta)
    rows = torch.tensor(rng.random((2, 4)) < 0.5)
    pattern = scores.softmax(-1)
    rewritten = reanchor(pattern, weights, rows)
    biased = (scores + logs[:, None, None]).softmax(-1)
    edited = rows[:, None, :, None].expand_as(pattern)
    torch.testing.assert_close(rewritten[edited], biased[edited], rtol=0, atol=1e-5)
    assert torch.equal(rewritten[~edited], pattern[~edited])
    torch.testing.assert_close(rewritten.sum(-1), torch.ones(2, 3, 4), rtol=0, atol=1e-5)
    # Against Eqs. 10-11 in float64.
    a = pattern.double().numpy()
    w = (1 + alpha * positive.double() - beta * negative.double()).numpy()[:, None, None]
    expected = a * w / (a * w).sum(-1, keepdims=True)
    np.testing.assert_allclose(rewritten[edited], expected[edited.numpy()], atol=1e-5)


def test_unit_weights_change_nothing_and_dtype_is_kept():
    pattern = torch.rand(2, 3, 4, dtype=torch.float64).softmax(-1).to(torch.bfloat16)
    rows = torch.ones(3, dtype=torch.bool)
    found = reanchor(pattern, torch.ones(4), rows)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, pattern)


def test_a_row_that_loses_everything_is_nan():
    pattern = torch.tensor([[[0.0, 1.0]]])
    found = reanchor(pattern, torch.tensor([1.0, 0.0]), torch.tensor([True]))
    assert found.isnan().all()


# ── VisualAnchors and the layer of the positive one ──


def test_anchors_count_lazily():
    anchors = VisualAnchors(
        positive=torch.stack([POSITIVE, POSITIVE, torch.zeros(4, dtype=torch.bool)]),
        negative=torch.stack([NEGATIVE, torch.zeros(4, dtype=torch.bool), NEGATIVE]),
        positive_map=torch.zeros(3, 4),
        negative_map=torch.zeros(3, 4),
        heads=None,
        positive_layer=4,
        negative_layer=0,
    )
    assert (anchors.empty_positive, anchors.empty_negative, anchors.overlap) == (1, 1, 1)
    assert repr(anchors) == (
        "VisualAnchors(3 samples × 4 visual tokens: 4 positive (layer 4), 4 negative (layer 0), "
        "1 in both; empty masks: 1 positive, 1 negative)"
    )


def test_anchors_never_wait_for_the_device():
    # A meta tensor has no values: reading one back, as a synchronisation does, raises.
    rows = torch.empty(2, 3, 4, device="meta")
    heads = torch.empty(2, 3, dtype=torch.bool, device="meta")
    saliency = saliency_map(rows, heads)
    mask = anchor_mask(saliency)
    reanchor_log_weights(mask, mask, 14, 0.9)
    anchors = VisualAnchors(mask, mask, saliency, saliency, None, 4, 0)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        _ = anchors.overlap


def test_default_positive_layer():
    # 32/2 − 2, 12/2 − 2, and an odd count rounds down: 13//2 − 2.
    assert [default_positive_layer(count) for count in (32, 12, 13, 4)] == [14, 4, 4, 0]
    with pytest.raises(ParameterError, match=r"model has 2. Pass positive_layer= explicitly"):
        default_positive_layer(2)
