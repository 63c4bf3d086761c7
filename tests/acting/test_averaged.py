"""Eq. 15: the average of all heads in the place of both anchors, against the equations."""

import pytest
import reference
import torch
from rewrites import VisFlow
from tiny_models import lens_of

import clva_lens as cl
from clva_lens.ground.errors import ParameterError
from clva_lens.methods.averaged import AveragedAnchors

LAYER = 4
KINDS = ("masks", "maps")


class Averaged(VisFlow):
    """The reference's way in: factors of whole patterns, before they are renormalised."""

    def __init__(self, average, strength=14.0 - 0.9, tau=1.0):
        self.__dict__ |= {"average": average, "strength": strength, "tau": tau, "seen": {}}

    def weights(self, pattern, index, result, new):
        factors = torch.ones_like(pattern)
        if index == LAYER:
            for row in [result.text[-1], *new]:
                maps = pattern[:, row, result.image]
                if self.average == "maps":
                    maps = maps.mean(dim=0, keepdim=True)
                spread = maps.std(dim=1, correction=0, keepdim=True)
                z = (maps - maps.mean(dim=1, keepdim=True)) / (spread + 1e-6)
                self.seen[row] = (z > self.tau).to(pattern).mean(dim=0)
        if index > LAYER:
            for row in [*result.text, *new]:
                share = self.seen[row if row in new else result.text[-1]]
                factors[:, row, result.image] = 1 + self.strength * share
        return factors


@torch.no_grad()
@pytest.mark.parametrize("average", KINDS)
def test_prompt_and_steps_are_the_references(lens, exact, ask, average):
    method = AveragedAnchors(tau=1.0, average=average)
    prompt = ask(lens)
    made = cl.generate(lens, [prompt], method, cl.Greedy(max_new_tokens=4), progress=False)
    ids = torch.cat([prompt.inputs["input_ids"][0], torch.as_tensor(made.ids[0])])
    with cl.intervening(lens, method):
        whole = lens.hf_model(**prompt.inputs).logits[0]
    count = len(prompt.inputs["input_ids"][0])
    pixels = prompt.inputs["pixel_values"][0]
    wanted = reference.run(exact, ids, pixels, [Averaged(average)], prompt_length=count).logits
    plain = reference.run(exact, ids, pixels, [], prompt_length=count).logits
    error = float((whole[-1].double() - wanted[count - 1]).abs().max())
    effect = float((plain[count - 1] - wanted[count - 1]).abs().max())
    assert error < 2e-3 and effect > 100 * error, (error, effect)
    assert wanted[count - 1 : -1].argmax(dim=-1).tolist() == list(made.ids[0])


@torch.no_grad()
def test_masks_and_maps_and_classes_are_three_methods(one, ask):
    prompt = ask(one, 3)

    def logits(method):
        with cl.intervening(one, method):
            return one.hf_model(**prompt.inputs).logits[:, -1]

    three = [
        logits(method)
        for method in (
            AveragedAnchors(tau=1.0),
            AveragedAnchors(tau=1.0, average="maps"),
            cl.CLVA(tau=1.0),
        )
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (three[a] - three[b]).abs().max() > 0.01
    # α = β is no edit at all, whatever stands out: what Eq. 15 says of equal strengths.
    with torch.no_grad():
        plain = one.hf_model(**prompt.inputs).logits[:, -1]
    assert torch.equal(logits(AveragedAnchors(alpha=0.5, beta=0.5, tau=1.0)), plain)
    assert not torch.equal(three[0], plain)


def test_what_it_says_and_refuses(one, ask):
    with cl.intervening(one, AveragedAnchors(tau=1.0)) as run:
        one.hf_model(**ask(one).inputs)
    anchors = run.anchors
    assert anchors.positive_layer == anchors.negative_layer == LAYER
    assert bool(anchors.heads.sensitive[LAYER].all())
    with pytest.raises(ParameterError, match="average"):
        AveragedAnchors(average="mean")
    with pytest.raises(ParameterError, match="negative"):
        AveragedAnchors(alpha=-3)
    with (
        pytest.raises(ParameterError, match="later layers"),
        cl.intervening(one, AveragedAnchors(layer=4, layers=[3])),
    ):
        pass
    assert lens_of("full", "sdpa") is one
