"""Linear probes: against a fit written out in float64, with their null and their interval."""

import builtins
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.benchmarks.statistics import wilson_interval
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.stream_reading import span_states

COUNT = 24
LABELS = [i % 2 for i in range(COUNT)]


@cache
def prompts():
    """Pictures whose left half is dark or bright, by label, under one question."""
    lens, made = lens_of("full", "sdpa"), []
    for i, label in enumerate(LABELS):
        shown = picture(i).copy()
        shown[:, :16] = shown[:, :16] // 4 + (180 if label else 0)
        made.append(lens.prompt(shown, QUESTIONS[0]))
    return made


def probe(**given):
    usual = {"layer": [0, 5], "span": ("image", "system"), "shuffles": 10, "folds": 4}
    return cl.probe(
        lens_of("full", "sdpa"), prompts(), LABELS, progress=False, **{**usual, **given}
    )


@cache
def found():
    return probe()


def test_states_are_those_of_the_cache():
    lens = lens_of("full", "sdpa")
    some = prompts()[:2]
    states = span_states(lens, some, (0, 5), ("image", "last", "text"), progress=False)
    for row, prompt in enumerate(some):
        cache_of = lens.run_with_cache(prompt).cache
        for column, layer in enumerate((0, 5)):
            whole = cache_of[f"blocks.{layer}.hook_resid_post"][0].double()
            for at, span in enumerate(("image", "last", "text")):
                wanted = whole[prompt.spans.places(span)[0]].mean(dim=0)
                torch.testing.assert_close(states[row, at, column], wanted)
    tower = span_states(lens, some, (1,), ("all",), stack="vision", progress=False)
    wanted = lens.run_with_cache(some[0]).cache["vision.blocks.1.hook_resid_post"][0].double()
    torch.testing.assert_close(tower[0, 0, 0], wanted.mean(dim=0))


def test_what_the_picture_shows_is_read_off_the_picture_only():
    """The rows before the picture know nothing of it: their probe is at its null."""
    result = found()
    print(result, result.null, result.p)
    assert result.accuracy[0, 0] > 0.85 > result.high[0, 1]
    assert float(result.low[0, 0]) > float(result.null[0, 0])
    low, high = wilson_interval(round(float(result.accuracy[0, 0]) * COUNT), COUNT)
    assert (float(result.low[0, 0]), float(result.high[0, 0])) == pytest.approx((low, high))
    assert 0.2 < float(result.null.mean()) < 0.8
    assert float(result.p[0, 0]) == pytest.approx(1 / 11)
    assert result.chance == 0.5


def test_a_fit_by_hand_gives_the_same_answers():
    """Logistic regression from its formula, minimised by scipy, in the same folds."""
    from sklearn.model_selection import StratifiedKFold

    lens, labels = lens_of("full", "sdpa"), np.array(LABELS)
    states = (
        span_states(lens, prompts(), (5,), ("image",), progress=False)[:, 0, 0].detach().numpy()
    )
    right = []
    split = StratifiedKFold(4, shuffle=True, random_state=0).split(states, labels)
    for train, test in split:
        middle, spread = states[train].mean(axis=0), states[train].std(axis=0)
        x, signs = (states - middle) / spread, 2.0 * labels - 1

        def loss(w, x=x, signs=signs, train=train):
            margin = signs[train] * (x[train] @ w[1:] + w[0])
            return 0.1 * np.logaddexp(0, -margin).sum() + 0.5 * w[1:] @ w[1:]

        w = minimize(loss, np.zeros(1 + x.shape[1]), method="L-BFGS-B").x
        right += list(((x[test] @ w[1:] + w[0] > 0) == labels[test]).astype(float))
    assert float(found().accuracy[1, 0]) == pytest.approx(np.mean(right))


def test_groups_stay_together():
    four = [i // 4 for i in range(COUNT)]
    grouped = probe(groups=four, layer=0, span="image", folds=3, shuffles=2)
    assert grouped.settings["groups"] is True
    ends = [float(one[0, 0]) for one in (grouped.low, grouped.accuracy, grouped.high)]
    assert sorted(ends) == ends
    # Each group has one label, its pictures are twins: a probe that saw a twin would know.
    twins = [prompts()[i // 2] for i in range(COUNT)]
    random = np.random.default_rng(1).permutation([0, 1] * 6).repeat(2)
    lens = lens_of("full", "sdpa")
    more = {"layer": 0, "span": "image", "folds": 3, "shuffles": 1, "progress": False}
    leaky = cl.probe(lens, twins, random, strength=10.0, **more)
    held = cl.probe(
        lens, twins, random, groups=[i // 2 for i in range(COUNT)], strength=10.0, **more
    )
    print(f"twins apart: {float(leaky.accuracy):.2f}, together: {float(held.accuracy):.2f}")
    assert float(leaky.accuracy) > float(held.accuracy)


def test_it_draws_itself():
    drawing = found().draw()
    assert len(drawing.axes) == 2
    assert {row["run"] for row in found().rows()} == {
        "labels",
        "shuffled labels",
        "most frequent label",
    }


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"folds": 13}, "the rarest with 12"),
        ({"folds": 1}, "at least 2 folds"),
        ({"shuffles": 0}, "1 shuffle"),
        ({"strength": 0.0}, "positive strength"),
        ({"layer": 12}, "names layer 12"),
        ({"span": "words"}, "span must be"),
        ({"stack": "vision", "span": "image", "layer": 0}, "its own tokens"),
        ({"groups": [1, 2]}, "2 groups"),
    ],
)
def test_what_does_not_fit_is_refused(given, match):
    with pytest.raises(ParameterError, match=match):
        probe(**given)


def test_without_scikit_learn(monkeypatch):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("no sklearn")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ParameterError, match=r"clva-lens\[probes\]"):
        probe(layer=0, span="last")
