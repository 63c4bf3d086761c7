"""Readings refuse what they cannot read: no number and no other library's error."""

import numpy as np
import pytest
import torch
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import LogitsError, ParameterError
from clva_lens.lens.maps import MAPS
from clva_lens.lens.probing import shuffled_labels

pytestmark = pytest.mark.usefixtures("untyped")


def lens():
    return lens_of("full", "sdpa")


def prompt(number=0, count=1):
    if count == 1:
        return lens().prompt(picture(number), QUESTIONS[0])
    return lens().prompt([picture(number + i) for i in range(count)], [QUESTIONS[0]] * count)


@pytest.mark.parametrize("layers", [[], 5, "5", [1.5], [True], None, {}])
@pytest.mark.parametrize("read", ["trace", "probe", "vector", "map"])
def test_layers_are_all_or_some_indices(read, layers):
    known = {"layers": layers}
    called = {
        "trace": lambda: cl.trace_attention(lens(), prompt(), **known),
        "probe": lambda: cl.probe(lens(), [prompt()] * 4, [0, 1] * 2, layer=layers, folds=2),
        "vector": lambda: cl.steering_vector(lens(), [(prompt(), prompt(1))], **known),
        "map": lambda: cl.image_map(lens(), prompt(), "visual-ratio", **known),
    }
    if (read, layers) in [("probe", 5), ("map", None)]:
        called[read]()  # the one layer of a probe, and the map's own
        return
    with pytest.raises(ParameterError, match="layers must be"):
        called[read]()


def test_each_prompt_of_a_pair_is_told_from_its_own():
    """Three prompts against one were told apart crosswise, without a word."""
    with pytest.raises(ParameterError, match="pair 1 holds 3 prompts against 1"):
        cl.steering_vector(lens(), [(prompt(), prompt(1)), (prompt(0, 3), prompt(1))], layers=[1])
    both = cl.steering_vector(lens(), [(prompt(0, 2), prompt(2, 2))], layers=[1], progress=False)
    single = [(prompt(i), prompt(i + 2)) for i in range(2)]
    apart = cl.steering_vector(lens(), single, layers=[1], progress=False)
    assert float(both.norms.min()) > 100 * float((both.values - apart.values).norm())


def test_a_tower_reads_nothing_without_a_picture():
    with pytest.raises(ParameterError, match="nothing of a prompt without its picture"):
        cl.steering_vector(lens(), [(prompt(), None)], stack="vision", layers=[0])


def test_states_that_are_not_finite_are_refused():
    huge = torch.full((12, lens().config.text_config.hidden_size), 3e38)
    with (
        cl.intervening(lens(), cl.Steer(vector=huge, strength=9.0)),
        pytest.raises(LogitsError, match="'resid_post' is not finite"),
    ):
        cl.steering_vector(lens(), [(prompt(), prompt(1))], layers=[5], progress=False)


def test_groups_are_shuffled_whole_where_each_has_one_label():
    """Else the null is as narrow as if there were as many groups as prompts."""
    groups = np.arange(8).repeat(6)
    labels, rng = (groups % 2), np.random.default_rng(0)
    shuffled = [shuffled_labels(labels, groups, rng) for _ in range(200)]
    assert all(len(set(one[groups == g])) == 1 for one in shuffled for g in range(8))
    assert len({tuple(one) for one in shuffled}) > 40  # of 70 ways
    assert all(one.sum() == labels.sum() for one in shuffled)
    agree = [np.mean(one == labels) for one in shuffled]
    alone = [np.mean(shuffled_labels(labels, None, rng) == labels) for _ in range(200)]
    print(f"spread of agreement by group {np.std(agree):.3f}, by prompt {np.std(alone):.3f}")
    assert np.std(agree) > 2 * np.std(alone)
    mixed = np.arange(48) % 2
    assert sorted(shuffled_labels(mixed, groups, rng)) == sorted(mixed)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"labels": [1, "1", 1, "1"]}, "told apart by their type"),
        ({"labels": [float("nan"), 1, 2, 1]}, "labels has nan"),
        ({"labels": np.zeros((4, 2))}, "labels has"),
        ({"groups": [[0], [1], [2], [3]]}, "groups has"),
        ({"folds": 2.5}, "folds must be an integer"),
        ({"shuffles": 1.5}, "shuffles must be an integer"),
        ({"seed": -1}, "a seed from 0"),
        ({"span": []}, "no span to read"),
        ({"prompts": [], "labels": []}, "no prompt or no span"),
    ],
)
def test_what_probes_are_not_made_of(given, match):
    usual = {"prompts": [prompt(), prompt(1)] * 2, "labels": [0, 1, 0, 1], "layer": 1, "folds": 2}
    with pytest.raises(ParameterError, match=match):
        cl.probe(lens(), **{**usual, "span": "last", "progress": False, **given})


@pytest.mark.parametrize(
    ("by", "given"),
    [
        ("rollout", {"residual": float("nan")}),
        ("rollout", {"residual": 1.1}),
        ("rollout", {"residual": "x"}),
        ("integrated-gradients", {"steps": 1.5}),
        ("integrated-gradients", {"steps": True}),
        ("relative-attention", {"general": None}),
        ("relative-attention", {"layer": 0.5}),
        ("visual-ratio", {"layers": 3}),
        ("token-activation", {"filtered": "x"}),
    ],
)
def test_a_maps_settings_are_what_they_are_annotated_as(by, given):
    with pytest.raises(ParameterError, match=next(iter(given))):
        MAPS.get(by)(**given)


@pytest.mark.parametrize("tokens", [float("nan"), 1.5, True, (), (5, 5), b"x", (3, None)])
def test_tokens_are_one_or_two_that_differ(tokens):
    with pytest.raises(ParameterError, match="tokens are"):
        cl.image_map(lens(), prompt(), tokens=tokens)


def test_a_map_of_attention_alone_names_no_logit():
    asked = prompt()
    labels = {
        by: cl.image_map(lens(), asked, by, tokens=torch.tensor(5)).label
        for by in ("rollout", "visual-ratio", "relevancy")
    }
    assert labels.pop("relevancy") == "logit(5)"
    assert set(labels.values()) == {"attention alone, whatever the answer"}


def test_estimates_line_up_and_are_of_numbers():
    with pytest.raises(ParameterError, match="a batch of 2 prompts and the target of 1"):
        cl.attribution_patching(lens(), prompt(0, 2), prompt(), metric=lambda x: x[:, 0, 0])
    with pytest.raises(ParameterError, match=r"nan.*has no gradient"):
        made = {"metric": lambda x: x[:, 0, 0] * float("nan")}
        cl.attribution_patching(lens(), prompt(1), prompt(), **made)
    found = cl.attribution_patching(lens(), prompt(1), prompt(), metric=lambda x: x[:, 0, 0])
    for given, match in (({"spans": []}, "spans is empty"), ({"layers": 3}, "layers must be")):
        with pytest.raises(ParameterError, match=match):
            found.patching(**given)
    with pytest.raises(ParameterError, match=r"steps is 1\.5"):
        cl.edge_attribution(lens(), prompt(1), prompt(), how="eap-ig", steps=1.5)
