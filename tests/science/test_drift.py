"""Eqs. 5-6: expectations by hand, laws by hypothesis, and a float64 reference in numpy."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clva_lens.ground.errors import ParameterError
from clva_lens.science.drift import attention_drift, correlation, drift_of_maps, entropy

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=50)


def random_maps(seed, *shape):
    """Maps with a visual mass below 1, some of their tokens at 0."""
    rng = np.random.default_rng(seed)
    maps = rng.exponential(size=shape) * (rng.random(shape) < 0.8)
    maps[..., 0] += 0.1
    return maps / maps.sum(-1, keepdims=True) * rng.random((*shape[:-1], 1))


# ── Eq. 5 ──


def test_entropy_by_hand():
    saliency = torch.tensor([0.25, 0.25, 0.0, 0.0])
    # Printed: −2·0.25 ln 0.25 = 0.5 ln 4 = ln 2. Normalised: p = 1/2, 1/2, hence ln 2.
    # At half the mass: −2·0.125 ln 0.125 = 0.25·3 ln 2 = 0.75 ln 2; normalised, still ln 2.
    assert float(entropy(saliency)) == pytest.approx(math.log(2))
    assert float(entropy(saliency, normalised=True)) == pytest.approx(math.log(2))
    assert float(entropy(saliency / 2)) == pytest.approx(0.75 * math.log(2))
    assert float(entropy(saliency / 2, normalised=True)) == pytest.approx(math.log(2))


def test_entropy_of_a_spike_and_of_nothing():
    spike, nothing = torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3)
    assert entropy(spike) == 0
    assert entropy(spike, normalised=True) == 0
    assert entropy(nothing) == 0
    assert entropy(nothing, normalised=True).isnan()


@few
@given(seed=seeds, visual=st.integers(3, 40))
def test_entropy_matches_the_formula(seed, visual):
    maps = random_maps(seed, 2, visual)
    for normalised in (False, True):
        m = maps / maps.sum(-1, keepdims=True) if normalised else maps
        expected = [-sum(x * math.log(x) for x in row if x > 0) for row in m]
        found = entropy(torch.tensor(maps, dtype=torch.float32), normalised)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert ((found >= -1e-6) & (found <= math.log(visual) + 1e-5)).all()


@few
@given(seed=seeds, scale=st.floats(0.01, 1))
def test_entropy_invariances(seed, scale):
    maps = torch.tensor(random_maps(seed, 20))
    order = torch.tensor(np.random.default_rng(seed).permutation(20))
    torch.testing.assert_close(entropy(maps[order]), entropy(maps))
    torch.testing.assert_close(entropy(scale * maps, True), entropy(maps, True))


def test_the_uniform_map_is_the_most_dispersed():
    found = entropy(torch.full((256,), 0.3 / 256), normalised=True)
    assert float(found) == pytest.approx(math.log(256), abs=1e-5)


def test_half_precision_is_summed_in_float32():
    assert entropy(torch.full((4,), 0.25, dtype=torch.bfloat16)).dtype == torch.float32


# ── Eq. 6 ──


def test_correlation_by_hand():
    # a − 2 = −1, 0, 1; b − 3 = −2, 1, 1; Σab = 2 + 0 + 1 = 3; √2·√6 = √12; r = 3/√12 = 0.866.
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 4.0])
    assert float(correlation(a, b)) == pytest.approx(3 / math.sqrt(12))


@few
@given(seed=seeds, visual=st.integers(2, 40))
def test_correlation_matches_numpy(seed, visual):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, visual)) / visual
    found = float(correlation(torch.tensor(a), torch.tensor(b)))
    assert found == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-7)


@few
@given(seed=seeds, scale=st.floats(0.01, 100), shift=st.floats(-1, 1))
def test_correlation_laws(seed, scale, shift):
    a, b = torch.tensor(np.random.default_rng(seed).random((2, 12)))
    r = correlation(a, b)
    assert -1 <= float(r) <= 1
    torch.testing.assert_close(correlation(b, a), r)
    torch.testing.assert_close(correlation(scale * a + shift, b), r)
    torch.testing.assert_close(correlation(-a, b), -r)
    assert float(correlation(a, a)) == pytest.approx(1)


def test_small_deviations_on_a_large_mean_survive():
    # 1 + k·2⁻²⁰ is exact in float32, but its products are not: the square of the mean would drown
    # the variance. The two maps are equal up to an affine map, so that r = 1.
    k = torch.arange(8.0)
    assert float(correlation(1 + k * 2**-20, k)) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_map_has_no_correlation(value, dtype):
    constant = torch.full((7,), value, dtype=dtype)
    assert correlation(constant, torch.rand(7, dtype=dtype)).isnan()
    assert correlation(torch.rand(7, dtype=dtype), constant).isnan()


def test_correlation_broadcasts():
    layers, anchor = torch.rand(2, 5, 9), torch.rand(2, 1, 9)
    found = correlation(layers, anchor)
    assert found.shape == (2, 5)
    torch.testing.assert_close(found[1, 3], correlation(layers[1, 3], anchor[1, 0]))
    assert correlation(layers.bfloat16(), anchor).dtype == torch.float32


@few
@given(seed=seeds, visual=st.integers(4, 40))
def test_correlation_among_some_tokens_is_that_of_these_alone(seed, visual):
    rng = np.random.default_rng(seed)
    a, b = torch.tensor(rng.random((2, 3, visual)))
    among = torch.tensor(rng.random((3, visual)) > 0.4)
    among[:, :2] = True
    found = correlation(a, b, among)
    for row in range(3):
        chosen = among[row]
        expected = correlation(a[row, chosen], b[row, chosen])
        torch.testing.assert_close(found[row], expected)
    # What is left out may be anything.
    torch.testing.assert_close(correlation(a + 9.0 * ~among, b, among), found)
    assert correlation(a, b, torch.zeros_like(among)).isnan().all()
    assert correlation(torch.ones_like(a), b, among).isnan().all()


# ── curves ──


@dataclass
class Trace:
    """The part of an AttentionTrace that attention_drift reads."""

    maps: dict[str, torch.Tensor]
    layers: tuple[int, ...]
    num_layers: int

    def saliency(self, heads):
        return self.maps[heads]


def random_trace(layers, num_layers, *batch):
    names = ("all", "sensitive", "insensitive")
    maps = {
        name: torch.tensor(random_maps(seed, *batch, len(layers), 9))
        for seed, name in enumerate(names)
    }
    return Trace(maps, layers, num_layers)


def test_anchors_are_read_at_their_layers():
    trace = random_trace(tuple(range(12)), 12)
    trace.maps["sensitive"][4, 3] = 2.0  # one token stands out, so that a mask has one
    drift = attention_drift(trace)
    assert (drift.positive_layer, drift.negative_layer) == (4, 0)  # 12//2 − 2
    assert drift.layers == tuple(range(12))
    maps = {name: value.numpy() for name, value in trace.maps.items()}
    for layer in range(12):
        row = maps["all"][layer]
        r_positive = np.corrcoef(row, maps["sensitive"][4])[0, 1]
        r_negative = np.corrcoef(row, maps["insensitive"][0])[0, 1]
        assert float(drift.toward_positive[layer]) == pytest.approx(r_positive)
        assert float(drift.toward_negative[layer]) == pytest.approx(r_negative)
        kept = np.ones(9, dtype=bool)
        for anchor in (maps["sensitive"][4], maps["insensitive"][0]):
            kept &= (anchor - anchor.mean()) / (anchor.std() + 1e-6) <= 2
        outside = np.corrcoef(row[kept], maps["sensitive"][4][kept])[0, 1]
        assert float(drift.unmasked_positive[layer]) == pytest.approx(outside)
        outside = np.corrcoef(row[kept], maps["insensitive"][0][kept])[0, 1]
        assert float(drift.unmasked_negative[layer]) == pytest.approx(outside)
        m = maps["sensitive"][layer]
        printed = -sum(x * math.log(x) for x in m if x > 0)
        dispersion = -sum(x * math.log(x) for x in m / m.sum() if x > 0)
        assert float(drift.entropy[layer]) == pytest.approx(printed)
        assert float(drift.entropy_normalised[layer]) == pytest.approx(dispersion)


def test_layers_are_named_not_counted():
    trace = random_trace((1, 5, 9), 12, 2)
    drift = attention_drift(trace, positive_layer=9, negative_layer=5)
    assert drift.layers == (1, 5, 9)
    expected = correlation(trace.maps["all"], trace.maps["sensitive"][:, [2]])
    torch.testing.assert_close(drift.toward_positive, expected)
    expected = correlation(trace.maps["all"], trace.maps["insensitive"][:, [1]])
    torch.testing.assert_close(drift.toward_negative, expected)
    text = repr(drift)
    assert "mean of 2 samples, layers 1 → 9" in text
    assert "toward positive (layer 9)" in text
    assert "nats" in text


def test_an_empty_head_set_is_seen_in_the_curve():
    trace = random_trace((0, 1, 2, 3), 4)
    trace.maps["insensitive"][0] = 0
    drift = attention_drift(trace)
    assert drift.toward_negative.isnan().all()
    assert not drift.toward_positive.isnan().any()


def test_anchor_layers_are_checked():
    trace = random_trace((0, 2), 12)
    with pytest.raises(
        ParameterError, match=r"positive_layer is 4, but the traced layers are 0, 2"
    ):
        attention_drift(trace)
    with pytest.raises(ParameterError, match=r"Pass negative_layer= one of them"):
        attention_drift(trace, positive_layer=2, negative_layer=1)
    with pytest.raises(ParameterError, match=r"Pass positive_layer= explicitly"):
        attention_drift(random_trace((0, 1), 2))


def test_curves_name_their_layers_from_zero():
    maps = torch.tensor(random_maps(0, 3, 9))
    drift = drift_of_maps(maps, maps, maps[1], maps[0], 1, 0)
    assert drift.layers == (0, 1, 2)
    # A map correlates perfectly with itself.
    assert float(drift.toward_positive[1]) == pytest.approx(1)
    assert float(drift.toward_negative[0]) == pytest.approx(1)
