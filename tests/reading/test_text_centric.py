"""Text-centric heads are those of whole attention matrices in float64, counted one by one."""

import copy
import json
from collections import Counter
from functools import cache

import pytest
import torch
from tiny_models import QUESTIONS, double_of, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import InterventionError
from clva_lens.lens.provenance import describe

IMAGE = 5
PICTURES = 12


def asked(count=PICTURES):
    return [(picture(i), QUESTIONS[i % 3]) for i in range(count)]


@cache
def ratios(heads="full"):
    """Text over image by (layer, head), of each prompt, from transformers' own eager attention."""
    model = copy.deepcopy(double_of(heads))
    model.set_attn_implementation("eager")
    found = []
    for image, question in asked():
        prompt = lens_of(heads, "sdpa").prompt(image, question)
        inputs = {
            name: one.double() if one.is_floating_point() else one for name, one in prompt.items()
        }
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        last = int((inputs["input_ids"][0] == IMAGE).nonzero().max())
        seen = inputs["input_ids"][0] == IMAGE
        found.append(
            {
                (layer, head): float(
                    pattern[last + 1 :, last + 1 :].sum() / pattern[last + 1 :][:, seen].sum()
                )
                for layer, each in enumerate(attentions)
                for head, pattern in enumerate(each[0])
            }
        )
    return found


def vote(several, count):
    """The heads that are most often among the first, and how often each one is."""
    votes = Counter()
    for one in several:
        votes.update(sorted(one, key=lambda head: -one[head])[:count])
    share = {
        head: sum(one[head] / (1 + one[head]) for one in several) / len(several)
        for head in several[0]
    }
    return sorted(share, key=lambda head: (-votes[head], -share[head]))[:count], votes


@pytest.mark.parametrize("heads", ["full", "grouped"])
@pytest.mark.parametrize("count", [None, 1, 5, 48])
def test_the_vote_is_the_references(heads, count):
    lens, several = lens_of(heads, "sdpa"), ratios(heads)
    number = count or round(12 * 4 / 32)
    wanted, votes = vote(several, number)
    made = cl.text_centric_heads(lens, asked(), count=count, progress=False)
    assert list(made.heads) == wanted
    counted = {tuple(one): int(made.votes[tuple(one)]) for one in made.votes.nonzero().tolist()}
    assert counted == votes
    even, odd = (set(vote(several[half::2], number)[0]) for half in (0, 1))
    assert made.agreement == len(even & odd) / number
    assert made.chance == number / 48
    assert made.prompts == PICTURES
    assert int(made.votes.sum()) == PICTURES * number
    print(made, made.heads)


def test_ratios_are_told_apart_far_beyond_rounding():
    """Else the vote above would say nothing; and not every prompt has the same leaders."""
    several = ratios()
    gaps = []
    for one in several:
        ordered = sorted(one.values(), reverse=True)
        gaps.append(ordered[4] / ordered[5] - 1)
    _, votes = vote(several, 5)
    print(f"smallest gap after the fifth {min(gaps):.1e}; votes {sorted(votes.values())}")
    assert min(gaps) > 1e-4
    assert len(votes) > 5


def test_a_batch_votes_as_its_prompts_do():
    lens = lens_of("full", "sdpa")
    images, questions = zip(*asked(6), strict=True)
    batch = lens.prompt(list(images), list(questions))
    one, together = (
        cl.text_centric_heads(lens, given, count=4, progress=False) for given in (asked(6), [batch])
    )
    assert torch.equal(one.votes, together.votes)
    assert (one.heads, one.agreement) == (together.heads, together.agreement)


def test_a_single_prompt_has_no_halves():
    made = cl.text_centric_heads(lens_of("full", "sdpa"), asked(1), count=2, progress=False)
    assert made.agreement is None
    assert "agree" not in repr(made)


def test_ascd_takes_them_and_lists_them():
    """The same heads by hand give the same logits; a method's parameters name them."""
    lens = lens_of("full", "sdpa")
    found = cl.text_centric_heads(lens, asked(), count=6, progress=False).heads
    method = cl.ASCD(heads=found)
    assert method.heads == found
    recorded = json.loads(json.dumps(describe(method)))["heads"]
    assert cl.ASCD(heads=recorded) == method
    by_hand = cl.ASCD(heads=[list(one) for one in found])
    prompt = lens.prompt(picture(20), QUESTIONS[0])
    logits = []
    for one in (None, cl.ASCD(), by_hand, method):
        with torch.inference_mode(), cl.intervening(lens, one):
            logits.append(lens.hf_model(**prompt).logits[0, -1])
    kept = logits[3].isfinite()
    assert torch.equal(logits[2], logits[3])
    effect = float((logits[3] - logits[0])[kept].abs().max())
    other = kept & logits[1].isfinite()
    print(
        f"effect {effect:.2f}, against ASCD's own {float((logits[3] - logits[1])[other].max()):.2f}"
    )
    assert effect > 0.05


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": "is there a cup ?"}, "prompts must be a list"),
        ({"prompts": asked(1)[0]}, "a prompt"),
        ({"count": 0}, "count must be from 1 to 48"),
        ({"count": 49}, "count must be from 1 to 48"),
        ({"count": 2.5}, "count must be"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_mined_is_said(given, message):
    with pytest.raises(cl.ClvaLensError, match=message):
        cl.text_centric_heads(lens_of("full", "sdpa"), **{"prompts": asked(2), **given})


def test_not_inside_a_trace():
    lens = lens_of("full", "sdpa")
    with (
        pytest.raises(InterventionError, match="text_centric_heads"),
        lens.trace(lens.prompt(picture(0), QUESTIONS[0])),
    ):
        cl.text_centric_heads(lens, asked(1))
