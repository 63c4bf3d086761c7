"""The gate of IMCCD's captions is its formula at every step; windows are shorter than answers.

The reference is impairing.py's: float64, loops over heads and rows, without a cache.
"""

import contrasting
import impairing
import pytest
import queries
import torch
from test_contrast_reference import decode, lens_inputs
from test_imccd import model_parts
from tiny_models import blip_of, lens_of

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE
from clva_lens.ground.errors import ParameterError
from clva_lens.methods import imccd

STEPS, WINDOW = 5, 2
ERROR = 3e-4
GATES = {gate: cl.IMCCD(alpha=0.8, beta=0.1, gate=gate) for gate in (None, "first", "last")}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(imccd, "REMEMBERED", WINDOW)


def lens_for(family):
    return lens_of("full", "sdpa") if family == "llava" else blip_of("sdpa")


@pytest.mark.parametrize("gate", ["first", "last"])
@pytest.mark.parametrize(("family", "compression"), [("llava", 3.0), ("instructblip", 1.0)])
@torch.no_grad()
def test_gate(family, compression, gate):
    lens = lens_for(family)
    inputs = lens_inputs(lens)
    ids, found = decode(lens, inputs, GATES[gate], max_new_tokens=STEPS)
    error, margin, effect, ways = 0.0, 1e9, [], []
    for item in range(3):
        prompt, parts, features = model_parts(family, "full", inputs, item)
        whole, looks = torch.cat([prompt, ids[item, :-1]]), []
        own, other = (
            impairing.run(parts, whole, features, len(prompt), compression, bad, kept)[0]
            for bad, kept in ((False, looks), (True, None))
        )
        steps = [
            sum(float(layer[:, row].mean()) for layer in looks) / len(looks)
            for row in range(len(prompt) - 1, len(whole))
        ]
        for step, looked in enumerate(steps):
            so_far = steps[: step + 1]
            some = so_far[:WINDOW] if gate == "first" else so_far[-WINDOW:]
            mean = sum(some) / len(some)
            opened = not looked < mean
            margin = min(margin, abs(looked - mean)) if step else margin
            ways.append(opened)
            row, cut = own[len(prompt) - 1 + step], other[len(prompt) - 1 + step]
            wanted = contrasting.contrast(row, cut, 0.8 if opened else 0.0, "difference")
            kept = row >= row.max() + torch.tensor(0.1).double().log()
            assert torch.equal(found[item, step].isfinite(), kept)
            error = max(error, float((found[item, step] - wanted)[kept].abs().max()))
            if not opened:
                effect.append(float(0.8 * (row - cut)[kept].abs().max()))
    print(
        f"{family} {gate}: error {error:.1e}, effect {min(effect):.3f} to {max(effect):.3f}, "
        f"margin {margin:.1e}, {sum(ways)} of {len(ways)} steps contrasted"
    )
    assert error < ERROR
    assert margin > 1e-3
    assert max(effect) > max(0.05, 100 * error)
    assert 3 < sum(ways) < len(ways)  # the first step of each always is


def test_windows_by_hand():
    """1.8 is below 2, the mean of the first two, and above 1.4, that of the last two."""
    model = lens_for("llava").hf_model
    for gate, opened in (("first", [False, True]), ("last", [True, False])):
        session = imccd._Looking(model, gate)
        session._seen = torch.tensor([[3.0, 1.0, 1.8], [-3.0, 2.0, 1.0]])
        assert session.opened().tolist() == opened
        session.reorder(torch.tensor([1, 1]))
        assert session.opened().tolist() == opened[1:] * 2


def test_a_gate_matters():
    """The first step is always contrasted; later ones are not all."""
    inputs = lens_inputs(lens_for("llava"))
    found = {
        gate: decode(lens_for("llava"), inputs, method, max_new_tokens=STEPS)[1]
        for gate, method in GATES.items()
    }
    for gate in ("first", "last"):
        assert torch.equal(found[gate][:, 0], found[None][:, 0])
        assert not torch.equal(found[gate], found[None])


@pytest.mark.parametrize("gate", ["first", "last"])
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_batches_caches_and_beams(family, gate):
    """Without a cache the steps are read again; with one they move with the beams."""
    lens, method = lens_for(family), GATES[gate]
    inputs = lens_inputs(lens)
    ids, found = decode(lens, inputs, method, max_new_tokens=STEPS)
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({"use_cache": False}, static):
        others, logits = decode(lens, inputs, method, max_new_tokens=STEPS, **options)
        assert torch.equal(ids, others)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    options = {"num_beams": 3, "max_new_tokens": STEPS}
    beams, _ = decode(lens, inputs, method, **options)
    assert torch.equal(beams, decode(lens, inputs, method, use_cache=False, **options)[0])
    for item in range(3):
        single = queries.single(inputs, item)
        alone, logits = decode(lens, single, method, max_new_tokens=STEPS)
        assert torch.equal(alone[0], ids[item])
        torch.testing.assert_close(logits[0], found[item], rtol=0, atol=1e-4)
        assert torch.equal(decode(lens, single, method, **options)[0][0], beams[item])
    assert not _ACTIVE


def test_beams_need_their_steps_in_order(monkeypatch):
    """The comparison above is not blind: with steps left in their places, scores are others."""
    lens, method = lens_for("llava"), GATES["last"]
    inputs = lens_inputs(lens)

    def scores():
        with torch.inference_mode(), cl.intervening(lens, method):
            return lens.hf_model.generate(
                **inputs,
                max_new_tokens=STEPS,
                num_beams=4,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            ).sequences_scores

    right = scores()
    monkeypatch.setattr(imccd._Looking, "reorder", lambda *_: None)
    assert float((right - scores()).abs().max()) > 1e-3


def test_no_contrast_has_no_gate():
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    one, other = (
        decode(lens, inputs, cl.IMCCD(alpha=0, gate=gate), max_new_tokens=2)[1]
        for gate in (None, "last")
    )
    assert torch.equal(one, other)


@pytest.mark.usefixtures("untyped")
def test_misuse():
    with pytest.raises(ParameterError, match=r"gate must be 'first', 'last' or None, but is 'all'"):
        cl.IMCCD(gate="all")
