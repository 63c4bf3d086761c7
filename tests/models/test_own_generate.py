"""A model whose own ``generate`` drops logits processors (Janus) answers as every other."""

from copy import deepcopy

import numpy as np
import pytest
import tiny_families as tiny
import torch
from tiny_models import make_processor

import clva_lens as cl
from clva_lens.methods.opera import OperaSearch

STEPS = 5


@pytest.fixture(scope="module")
def janus():
    model = deepcopy(tiny.tiny_model("janus"))
    with torch.no_grad():
        model.lm_head.weight[8:10].normal_(0, 0.2)  # yes and no, which are never said otherwise
    return cl.load((model, make_processor()), check=False)


def by_hand(model, choose):
    """Return tokens chosen from the logits of whole passes, without ``generate`` or a cache."""
    inputs, chosen, first = tiny.sample("janus", 0), [], None
    for step in range(STEPS):
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, -1]
        first = logits if first is None else first
        chosen.append(choose(step, logits))
        ids = torch.cat([inputs["input_ids"], torch.tensor([[chosen[-1]]])], dim=1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return chosen, float(first[8] - first[9])


def drawn(how):
    """Return the choice of nucleus sampling, written out."""
    numbers = np.random.Generator(np.random.Philox(key=[how.seed, 0])).random(STEPS)

    def choose(step, logits):
        share = (logits.double() / how.temperature).softmax(dim=-1)
        for token in share.argsort(descending=True).tolist():  # the rarest of the nucleus is kept
            if share[share > share[token]].sum() >= how.top_p:
                share[token] = 0
        return int((share.cumsum(0) > numbers[step] * share.sum()).nonzero()[0])

    return choose


METHODS = [None, cl.CLVA(tau=1.0), cl.ONLY(), cl.DeCo(), cl.PAI()]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        cl.Greedy(max_new_tokens=STEPS),
        cl.Sampling(seed=5, max_new_tokens=STEPS),
        cl.Sampling(seed=6, temperature=3.0, top_p=0.7, max_new_tokens=STEPS),
    ],
    ids=["greedy", "sampling", "nucleus"],
)
def test_answers_are_chosen_as_asked(janus, method, how):
    choose = drawn(how) if isinstance(how, cl.Sampling) else lambda _, one: int(one.argmax())
    with cl.intervening(janus, method):
        wanted, margin = by_hand(janus.hf_model, choose)
    found = cl.generate(janus, tiny.sample("janus", 0), method, how)
    assert found.ids[0].tolist() == wanted
    if method is None:
        assert found.margins[0] == pytest.approx(margin, abs=1e-4) != 0


def test_a_search_of_its_own_is_run(janus, monkeypatch):
    """OPERA decodes by itself; that reaches this model too."""
    searched = []
    search = OperaSearch.decode

    def spy(self, *given, **options):
        searched.append(self)
        return search(self, *given, **options)

    monkeypatch.setattr(OperaSearch, "decode", spy)
    found = cl.generate(
        janus, tiny.sample("janus", 0), cl.OPERA(), cl.Beam(num_beams=2, max_new_tokens=STEPS)
    )
    assert len(searched) == 1 and len(found.ids[0]) == STEPS


def test_its_checkpoint_decides_nothing(janus):
    how = cl.Greedy(max_new_tokens=STEPS)
    plain = cl.generate(janus, tiny.sample("janus", 0), None, how)
    own = janus.hf_model.generation_config
    own.suppress_tokens = [int(plain.ids[0][0])]
    try:
        found = cl.generate(janus, tiny.sample("janus", 0), None, how)
        assert found.ids[0].equal(plain.ids[0]) and found.margins == plain.margins
        asked = cl.generate(janus, tiny.sample("janus", 0), None, cl.FromCheckpoint())
        assert not asked.ids[0][:STEPS].equal(plain.ids[0])
    finally:
        own.suppress_tokens = None
