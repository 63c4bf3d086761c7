"""Every registered method with every decoding: it answers, repeatably, or says what to do."""

import pytest
import torch
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import ParameterError
from clva_lens.lens.decoding import DECODINGS, check_decoding
from clva_lens.methods.base import METHODS

STEPS = 3
HOW = {
    "greedy": cl.Greedy(max_new_tokens=STEPS),
    "beam": cl.Beam(num_beams=5, max_new_tokens=STEPS),
    "sampling": cl.Sampling(seed=3, max_new_tokens=STEPS),
    "checkpoint": cl.FromCheckpoint(max_new_tokens=STEPS),
}
# A nucleus of one token: what is drawn does not depend on how many are drawn together.
SURE = cl.Sampling(top_p=1e-6, max_new_tokens=STEPS)
PAIRS = [(picture(i), QUESTIONS[i]) for i in range(3)]


def answer(method, how, size=3):
    lens = lens_of("full", "sdpa")
    return cl.generate(lens, PAIRS, method, how, batch_size=size, progress=False)


def rows(generation):
    return [row.tolist() for row in generation.ids]


def test_every_decoding_is_asked():
    assert set(HOW) == set(DECODINGS.names())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", METHODS.names())
def test_method_with_decoding(name, how):
    method = METHODS.get(name)()
    kind = HOW[how].kind(lens_of("full", "sdpa").hf_model)
    if kind not in method.decodings:
        remedy = rf"'{name}' decodes with .* only.*Pass decoding=cl\.{method.decodings[0].title()}"
        with pytest.raises(ParameterError, match=remedy):
            answer(method, HOW[how])
        return
    together = answer(method, HOW[how])
    if how == "sampling":
        again = answer(method, HOW[how])
        assert rows(together) == rows(again) and together.margins == again.margins
        together = answer(method, SURE)
    alone = answer(method, SURE if how == "sampling" else HOW[how], size=1)
    assert rows(together) == rows(alone)
    assert together.margins == pytest.approx(alone.margins, abs=1e-4)


def test_what_each_method_decodes_with():
    for name, method in METHODS.items():
        assert set(method.decodings) <= set(DECODINGS.names()), name
        assert set(method.extended) < set(method.decodings), name
    beam_only = [name for name, method in METHODS.items() if method.decodings == ("beam",)]
    assert beam_only == ["opera"]
    sampled = [name for name, method in METHODS.items() if method.extended == ("greedy", "beam")]
    assert sampled == ["agla", "ed", "icd", "m3id", "only", "sid", "vcd", "vdd"]
    beams = [name for name, method in METHODS.items() if method.extended == ("beam",)]
    assert beams == ["dlc", "imccd", "memvr"]


def test_a_decoding_of_ones_own_is_let_through():
    class Mine(cl.Greedy):
        pass

    check_decoding(cl.OPERA(), Mine())
    with pytest.raises(ParameterError, match=r"decodes with beam only"):
        check_decoding(cl.OPERA(), cl.Greedy())


def test_a_run_is_refused_before_it_begins(tmp_path):
    lens, out = lens_of("full", "sdpa"), tmp_path / "run"
    with pytest.raises(ParameterError, match=r"decodes with beam only"):
        cl.evaluate(lens, "pope/toy/random", cl.OPERA(), limit=2, out=out)
    assert not out.exists()


def test_seeds_matter():
    """Otherwise the same answer twice would say nothing."""
    one, other = (answer(cl.CLVA(), cl.Sampling(seed=s, max_new_tokens=STEPS)) for s in (3, 4))
    assert rows(one) != rows(other)
    assert torch.equal(one.ids[0], answer(cl.CLVA(), HOW["sampling"]).ids[0])
