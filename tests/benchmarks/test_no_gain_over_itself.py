"""What a model says gains exactly nothing over itself, or it is said why nothing can be said."""

from dataclasses import replace

import pytest

import clva_lens as cl
from clva_lens.benchmarks.base import Answer, judge
from clva_lens.benchmarks.parsers import PARSERS
from clva_lens.benchmarks.readouts import LEGACY, READOUTS, TEXT
from clva_lens.benchmarks.toy_mme import ToyMme
from clva_lens.benchmarks.toy_pope import ToyPope
from clva_lens.lens.decoding import DECODINGS

# Hot enough that some answers contradict their margins.
HOW = {"sampling": {"seed": 0, "temperature": 3.0}}
ASKED = {"pope": ToyPope("random", count=5), "mme": ToyMme(pictures=3)}


@pytest.fixture(scope="module")
def model():
    return cl.load("toy-llava")


@pytest.fixture(scope="module")
def answers(model):
    """The answers of each benchmark by each decoding, made once."""
    made = {}

    def of(name, decoding):
        if (name, decoding) not in made:
            how = DECODINGS.get(decoding)(max_new_tokens=3, **HOW.get(decoding, {}))
            rows = cl.evaluate(model, ASKED[name], decoding=how, progress=False).rows
            made[name, decoding] = [Answer(r["id"], r["answer"], r["margin"]) for r in rows]
        return made[name, decoding]

    return of


@pytest.mark.parametrize("decoding", DECODINGS.names())
@pytest.mark.parametrize("name", ASKED)
def test_a_method_against_itself(name, decoding, answers):
    """Under every parser and readout that its answers can be scored by."""
    given, reasons = answers(name, decoding), set()
    assert len(given) > 20
    for parser in PARSERS.names():
        for readout in (one for one in READOUTS if one != LEGACY):
            benchmark = replace(ASKED[name], parser=parser, readout=readout)
            score = judge(benchmark, benchmark.samples(), given)
            found = cl.compare(score, score, resamples=20)
            if found.no_threshold is not None:
                assert found.beyond_bias is None and found.bias_matched_accuracy is None
                assert readout == TEXT, "margins have a threshold by themselves"
                reasons.add(found.no_threshold)
            else:
                assert found.beyond_bias[:3] == (0, 0, 0)
                assert found.bias_matched_accuracy == found.metrics["accuracy"].a
    print(f"{name}, {decoding}: {len(reasons)} reasons, {sorted(reasons)[:1]}")
    # The law has a case of each kind: drawn answers have no threshold, and greedy ones have.
    if decoding == "sampling":
        assert reasons
    if decoding == "greedy" and name == "pope":
        assert not reasons
