"""Eqs. 1-3: expectations by hand, laws by hypothesis, and a float64 reference in numpy."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clva_lens.ground.errors import ParameterError, SpanError
from clva_lens.science.heads import (
    HeadClasses,
    classify_heads,
    intensity_from_mass,
    visual_intensity,
    visual_mass,
)

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=50)


def random_pattern(rng, *shape):
    scores = rng.normal(size=shape)
    weights = np.exp(scores)
    return torch.tensor(weights / weights.sum(-1, keepdims=True), dtype=torch.float32)


def random_masks(rng, batch, length):
    """Some visual keys and some text rows, at least one each."""
    visual, text = rng.random((batch, length)) < 0.5, rng.random((batch, length)) < 0.5
    visual[:, 0], text[:, -1] = True, True
    return torch.tensor(text), torch.tensor(visual)


# ── Eq. 1 ──


def test_intensity_by_hand():
    # Keys: system, image, image, text, text. Rows 3 and 4 are text.
    rows = [[1, 0, 0, 0, 0]] * 3
    first = torch.tensor([*rows, [0.25, 0.5, 0.125, 0.125, 0], [0.5, 0.125, 0.125, 0.125, 0.125]])
    second = torch.tensor([*rows, [0.5, 0, 0, 0.5, 0], [0, 0, 1, 0, 0]]).float()
    pattern = torch.stack([first, second])[None]
    text = torch.tensor([[False, False, False, True, True]])
    visual = torch.tensor([[False, True, True, False, False]])
    # Head 0: (0.625 + 0.25)/2 = 0.4375. Head 1: (0 + 1)/2 = 0.5.
    expected = torch.tensor([[0.4375, 0.5]])
    torch.testing.assert_close(visual_intensity(pattern, text, visual), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        visual_intensity(pattern[0], text[0], visual[0]), expected[0], rtol=0, atol=0
    )


@few
@given(seed=seeds)
def test_intensity_matches_the_formula(seed):
    rng = np.random.default_rng(seed)
    batch, heads, length = 2, 3, 6
    pattern = random_pattern(rng, batch, heads, length, length)
    text, visual = random_masks(rng, batch, length)
    a, t, v = pattern.double().numpy(), text.numpy(), visual.numpy()
    expected = [
        [sum(a[b, h, i, v[b]].sum() for i in np.flatnonzero(t[b])) / t[b].sum() for h in range(3)]
        for b in range(batch)
    ]
    found = visual_intensity(pattern, text, visual)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert ((found >= 0) & (found <= 1 + 1e-6)).all()


def test_intensity_from_streamed_masses_is_the_same():
    rng = np.random.default_rng(0)
    pattern = random_pattern(rng, 2, 3, 5, 5)
    text, visual = random_masks(rng, 2, 5)
    text[:] = torch.tensor([False, False, True, False, True])
    whole = visual_intensity(pattern, text, visual)
    mass = visual_mass(pattern[:, :, [2, 4]], visual)  # only the text rows were ever computed
    torch.testing.assert_close(intensity_from_mass(mass), whole)


def test_padding_rows_do_not_count_even_as_nan():
    pattern = torch.full((1, 1, 3, 3), 1 / 3)
    text = torch.tensor([[False, True, True]])
    visual = torch.tensor([[True, False, True]])
    expected = visual_intensity(pattern, text, visual)
    pattern[:, :, 0] = torch.nan  # softmax over a fully masked row
    torch.testing.assert_close(visual_intensity(pattern, text, visual), expected)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2],
)
def test_intensity_is_at_least_float32(dtype, result):
    pattern = torch.full((1, 301, 301), 1 / 256, dtype=dtype)
    every = torch.ones(301, dtype=torch.bool)
    found = visual_intensity(pattern, every, every)
    assert found.dtype == result
    # 301/256 exactly: nine significant bits, one more than a bfloat16 sum could hold.
    torch.testing.assert_close(found, torch.tensor([301 / 256], dtype=result), rtol=0, atol=1e-6)


def test_intensity_needs_text_and_image():
    pattern = torch.full((2, 1, 3, 3), 1 / 3)
    some = torch.tensor([[True, False, True], [False, True, True]])
    none = torch.tensor([[True, False, True], [False, False, False]])
    with pytest.raises(SpanError, match=r"item 1 of the batch has 0 visual keys.*Pass the image"):
        visual_intensity(pattern, text=some, visual=none)
    with pytest.raises(SpanError, match=r"item 1 of the batch has 0 text rows.*Pass a question"):
        visual_intensity(pattern, text=none, visual=some)
    with pytest.raises(SpanError, match=r"item 0 of the batch has 0 text rows"):
        intensity_from_mass(torch.zeros(1, 4, 0))


# ── Eqs. 2-3 ──


def classify_by_formula(phi, threshold):
    """Eqs. 2-3 in float64 numpy, before any policy for empty sets."""
    mean, sigma = phi.mean(-1, keepdims=True), phi.std(-1, keepdims=True)
    return phi > mean + threshold * sigma, phi < mean - threshold * sigma


def clear_of_ties(phi, threshold):
    """No head is within rounding of a threshold, and no two heads are equal."""
    mean, sigma = phi.mean(-1, keepdims=True), phi.std(-1, keepdims=True)
    gap = np.abs(np.abs(phi - mean) - threshold * sigma).min()
    return gap > 1e-9 and np.diff(np.sort(phi, axis=-1)).min() > 1e-9


def test_classes_by_hand():
    # Φ = 0, 2, 2, 2, 2, 4 (eighths): μ = 2, deviations −2, 0, 0, 0, 0, 2, σ = √(8/6) = 1.155.
    # Above 3.155: head 5. Below 0.845: head 0.
    phi = torch.tensor([[0, 2, 2, 2, 2, 4]]) / 8
    classes = classify_heads(phi)
    assert classes.sensitive.tolist() == [[False] * 5 + [True]]
    assert classes.insensitive.tolist() == [[True] + [False] * 5]
    assert not classes.sensitive_fallback.any()
    assert not classes.insensitive_fallback.any()
    # The sample σ (ddof 1) would be √(8/5) = 1.265. With λ = 1.6 the population bound is 1.848 < 2,
    # the sample one 2.024 > 2: only the population σ still selects the two heads.
    assert not classify_heads(phi, threshold=1.6).sensitive_fallback.any()


def test_inequalities_are_strict():
    # Half at 0, half at 1: μ = σ = 1/2, so that every head lies exactly on a bound.
    classes = classify_heads(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), empty="skip")
    assert not classes.sensitive.any()
    assert not classes.insensitive.any()
    assert classes.sensitive_fallback.tolist() == [True]
    assert classes.insensitive_fallback.tolist() == [True]


def test_tail_fills_an_empty_set():
    # Φ: one head at 0.8, seven low ones: μ − σ < 0, so that no head is insensitive by Eq. 3.
    # 1 − N(1) = 0.1587; 0.1587·8 = 1.27, hence 2 heads: the lowest are heads 3 (0.01) and 6 (0.02).
    phi = torch.tensor([[0.05, 0.06, 0.8, 0.01, 0.04, 0.03, 0.02, 0.07]])
    filled, left = classify_heads(phi), classify_heads(phi, empty="skip")
    assert filled.insensitive.nonzero().tolist() == [[0, 3], [0, 6]]
    assert filled.sensitive.nonzero().tolist() == [[0, 2]]
    assert filled.insensitive_fallback.tolist() == left.insensitive_fallback.tolist() == [True]
    assert filled.sensitive_fallback.tolist() == [False]
    assert not left.insensitive.any()
    assert left.empty == "skip"


@pytest.mark.parametrize(
    ("threshold", "heads", "count"),
    # ⌈0.1587·32⌉ = ⌈5.08⌉; ⌈0.5·8⌉; ⌈0.0228·32⌉ = ⌈0.73⌉; at λ = 50 the share underflows to 0.
    [(1.0, 32, 6), (0.0, 8, 4), (2.0, 32, 1), (50.0, 8, 1), (1.0, 1, 1)],
)
def test_size_of_the_tail(threshold, heads, count):
    classes = classify_heads(torch.full((1, heads), 0.1), threshold)
    assert int(classes.sensitive.sum()) == count
    assert int(classes.insensitive.sum()) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [3, 7, 8])
def test_equal_heads_have_no_spread(heads, dtype):
    # 0.1 is not a binary fraction: a rounded mean would put every head beside it, at λ = 0.
    classes = classify_heads(torch.full((2, heads), 0.1, dtype=dtype), 0.0, empty="skip")
    assert not classes.sensitive.any()
    assert not classes.insensitive.any()
    assert classes.sensitive_fallback.all()
    assert classes.insensitive_fallback.all()


def test_ties_go_by_index_and_keep_the_tails_apart():
    classes = classify_heads(torch.full((1, 8), 0.5))
    assert classes.insensitive.nonzero()[:, 1].tolist() == [0, 1]
    assert classes.sensitive.nonzero()[:, 1].tolist() == [6, 7]


@few
@given(seed=seeds, threshold=st.sampled_from([0.25, 1.0, 1.5]), heads=st.integers(2, 12))
def test_classes_match_the_formula(seed, threshold, heads):
    phi = np.random.default_rng(seed).random((2, 3, heads))
    assume(clear_of_ties(phi, threshold))
    classes = classify_heads(torch.tensor(phi), threshold, empty="skip")
    sensitive, insensitive = classify_by_formula(phi, threshold)
    np.testing.assert_array_equal(classes.sensitive, sensitive)
    np.testing.assert_array_equal(classes.insensitive, insensitive)
    np.testing.assert_array_equal(classes.sensitive_fallback, ~sensitive.any(-1))
    np.testing.assert_array_equal(classes.insensitive_fallback, ~insensitive.any(-1))
    assert not (classes.sensitive & classes.insensitive).any()


@few
@given(seed=seeds, threshold=st.sampled_from([0.25, 1.0, 1.5]), heads=st.integers(2, 12))
def test_tail_ranks_and_never_touches_a_found_set(seed, threshold, heads):
    phi = np.random.default_rng(seed).random((3, heads))
    assume(clear_of_ties(phi, threshold))
    filled = classify_heads(torch.tensor(phi), threshold)
    left = classify_heads(torch.tensor(phi), threshold, empty="skip")
    count = max(1, math.ceil(0.5 * (1 - math.erf(threshold / math.sqrt(2))) * heads))
    for layer in range(3):
        order = np.argsort(phi[layer])
        for found, kept, empty, tail in (
            (filled.sensitive, left.sensitive, left.sensitive_fallback, order[-count:]),
            (filled.insensitive, left.insensitive, left.insensitive_fallback, order[:count]),
        ):
            expected = sorted(tail) if empty[layer] else np.flatnonzero(kept[layer])
            assert np.flatnonzero(found[layer]).tolist() == list(expected)


@few
@given(seed=seeds, scale=st.floats(1e-3, 1e3), shift=st.floats(-1, 1), heads=st.integers(2, 12))
def test_classes_follow_a_permutation_and_ignore_scale_and_shift(seed, scale, shift, heads):
    rng = np.random.default_rng(seed)
    phi, order = rng.random((2, heads)), rng.permutation(heads)
    assume(clear_of_ties(phi, 1.0))
    straight = classify_heads(torch.tensor(phi))
    changed = classify_heads(torch.tensor(scale * phi[:, order] + shift))
    assert torch.equal(changed.sensitive, straight.sensitive[:, order])
    assert torch.equal(changed.insensitive, straight.insensitive[:, order])


@pytest.mark.parametrize("threshold", [-0.5, math.inf, math.nan])
def test_threshold_is_checked(threshold):
    with pytest.raises(ParameterError, match=r"threshold must be a finite.*Pass threshold=1.0"):
        classify_heads(torch.rand(1, 4), threshold)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_intensity_is_checked(value):
    phi = torch.full((2, 3, 4), 0.5)
    phi[1, 2, 3] = value
    with pytest.raises(ParameterError, match=f"layer 2, head 3 is {value}"):
        classify_heads(phi)


def test_policy_is_checked_without_a_type_checker():
    bare = inspect.unwrap(classify_heads)
    with pytest.raises(ParameterError, match=r"'tail' or 'skip', but is 'fill'"):
        bare(torch.rand(1, 4), 1.0, "fill")


# ── HeadClasses ──


def test_classes_from_indices():
    classes = HeadClasses.from_indices({4: [0, 1]}, {0: [3]}, layers=12, heads=8)
    assert classes.sensitive.nonzero().tolist() == [[4, 0], [4, 1]]
    assert classes.insensitive.nonzero().tolist() == [[0, 3]]
    assert classes.sensitive.shape == (12, 8)
    assert not classes.sensitive_fallback.any()
    assert classes.threshold is None


def test_indices_are_checked():
    with pytest.raises(
        ParameterError, match=r"sensitive names layer 12, but the layers are 0 to 11"
    ):
        HeadClasses.from_indices({12: [0]}, {}, layers=12, heads=8)
    with pytest.raises(ParameterError, match=r"insensitive names head 8 of layer 0.*are 0 to 7"):
        HeadClasses.from_indices({}, {0: [8]}, layers=12, heads=8)
    with pytest.raises(ParameterError, match=r"names head -1 of layer 3"):
        HeadClasses.from_indices({3: [-1]}, {}, layers=12, heads=8)


def test_repr_counts():
    # The layer of test_tail_fills_an_empty_set, for two samples: 1 sensitive head and 2 from the
    # tail in each.
    phi = torch.tensor([0.05, 0.06, 0.8, 0.01, 0.04, 0.03, 0.02, 0.07]).expand(2, 1, 8)
    assert repr(classify_heads(phi)) == (
        "HeadClasses(2 samples × 1 layers × 8 heads, λ = 1: 2 sensitive, 4 insensitive; "
        "empty sets filled from the tail: 0 sensitive, 2 insensitive)"
    )
    assert "left empty: 0 sensitive, 2 insensitive" in repr(classify_heads(phi, empty="skip"))
