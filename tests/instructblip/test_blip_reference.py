"""Law 2 at both sites: a bias under the softmax = patterns rewritten after it, on logits.

Errors are printed beside the size of the effect, which must be 100 times larger. The reference
(queries.py) is float64, hand-written from Eqs. 1-4, 8-11 and 14 and knows nothing of clva_lens.
"""

from dataclasses import replace

import pytest
import queries
import reference
import rewrites
import torch
from tiny_models import blip_of, exact_blip

import clva_lens as cl

ERROR = 1e-4
MARGIN = 1e-4  # a decision nearer to its threshold could fall differently in float32
KNOWN: dict[tuple, queries.Result] = {}


def both(site="qformer", **parameters):
    """Return the same CLVA twice: ours, and the reference's with its site."""
    ours = dict(parameters)
    if "threshold" in ours:
        ours["head_threshold"] = ours.pop("threshold")
    if "heads" in ours:
        # A table of the site's layers, in which layer 4 of the Q-Former is the row 2.
        rows, positive = (6, 2) if site == "qformer" else (12, 4)
        ours["heads"] = cl.HeadClasses.from_indices(
            {positive: ours["heads"][0]}, {0: ours["heads"][1]}, layers=rows, heads=4
        )
    return cl.CLVA(site=site, **ours), (site, reference.Clva(**parameters))


def knock_out(site="qformer", **parameters):
    return cl.KnockOut(site=site, **parameters), (site, reference.KnockOut(**parameters))


CASES = {
    "defaults": [both()],
    "the family's own site": [(cl.CLVA(tau=1.0), both(tau=1.0)[1])],
    "tau 0": [both(tau=0.0)],
    "tau 1": [both(tau=1.0)],
    "alpha only": [both(beta=0.0, tau=1.0)],
    "beta only": [both(alpha=0.0, tau=1.0)],
    "reversed": [both(alpha=-0.9, beta=-14.0, tau=1.0)],
    "weight 0": [both(alpha=0.0, beta=1.0, tau=1.0)],
    "explicit heads": [both(heads=([1, 3], [0, 2]), tau=1.0)],
    "one head in both sets": [both(heads=([2], [2]), tau=1.0)],
    "other anchors": [both(positive_layer=6, tau=1.0)],
    "negative after positive": [both(positive_layer=2, negative_layer=6, tau=1.0)],
    "same layer": [both(positive_layer=0, negative_layer=0, tau=1.0)],
    "one layer": [both(layers=(8,), tau=1.0)],
    "threshold 0.3": [both(threshold=0.3, tau=1.0)],
    "threshold 2, tails": [both(threshold=2.0, tau=1.0)],
    "knock-out": [knock_out()],
    "knock-out before the anchors": [knock_out(layers=(2,)), both(tau=1.0)],
    "twice": [both(tau=1.0), both(tau=1.0)],
    "decoder, defaults": [both("decoder")],
    "decoder, tau 1": [both("decoder", tau=1.0)],
    "decoder, reversed": [both("decoder", alpha=-0.9, beta=-14.0, tau=1.0)],
    "decoder, last row": [both("decoder", tau=1.0, rows="last")],
    "decoder, explicit heads": [both("decoder", heads=([1, 3], [0, 2]), tau=1.0)],
    "decoder, knock-out": [knock_out("decoder")],
    "both sites": [both(tau=1.0), both("decoder", tau=1.0)],
    "both sites, the decoder named first": [both("decoder", tau=1.0), both(tau=1.0)],
    "both sites knocked out": [knock_out(), knock_out("decoder")],
    "ClearSight": [(cl.ClearSight(), ("decoder", rewrites.ClearSight()))],
    "ClearSight of CLS and patches": [
        (
            cl.ClearSight(site="qformer", enhance=1.5),
            ("qformer", rewrites.ClearSight(1.5, layers=(4,))),
        )
    ],
    "PAI": [(cl.PAI(), ("decoder", rewrites.Pai()))],
    "PAI of queries": [(cl.PAI(site="qformer"), ("qformer", rewrites.Pai(prompt="all")))],
    "VisFlow, heads only": [
        (
            cl.VisFlow(text=0.8, text_threshold=0.32),
            ("decoder", rewrites.VisFlow(text=0.8, text_threshold=0.32, tokens=False)),
        )
    ],
    "CLVA, then PAI": [both(tau=1.0), (cl.PAI(), ("decoder", rewrites.Pai()))],
}


def expected(inputs, item, edits, answer=None):
    """Return the reference's result; both kernels are compared with one run."""
    key = (item, tuple(inputs["input_ids"][item].tolist()), repr(edits), repr(answer))
    if key not in KNOWN:
        sides = {
            site: [e for where, e in edits if where == site] for site in ("qformer", "decoder")
        }
        KNOWN[key] = queries.run(exact_blip(), inputs, item, **sides, answer=answer)
    return KNOWN[key]


def logits(model, inputs, *methods):
    with torch.inference_mode(), cl.intervening(model, *methods):
        return model(**inputs).logits


def compare(model, inputs, pairs):
    """Return (error, smallest effect, references) over all real rows of all samples."""
    plain = logits(model, inputs)
    found = logits(model, inputs, *(ours for ours, _ in pairs))
    error, effect, results = 0.0, [], []
    for item in range(len(plain)):
        _, _, where = reference.rows_of(inputs, item)
        wanted = expected(inputs, item, [theirs for _, theirs in pairs])
        error = max(error, float((found[item, where] - wanted.logits).abs().max()))
        effect.append(float((found[item, where] - plain[item, where]).abs().max()))
        results.append(wanted)
    return error, min(effect), results


def test_bare_model_is_the_references(blip, ask):
    """The hand-written model is InstructBLIP: without edits only rounding is between them."""
    error, effect, _ = compare(blip.hf_model, ask(blip, 3).inputs, [])
    print(f"error {error:.1e}")
    assert effect == 0
    assert error < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_batch_of_different_pictures_is_the_references(blip, ask, name):
    inputs = ask(blip, 3).inputs
    assert not inputs["attention_mask"].bool().all()
    assert not inputs["qformer_attention_mask"].bool().all()
    error, effect, results = compare(blip.hf_model, inputs, CASES[name])
    margin = min(result.margin for result in results)
    print(f"{name}: error {error:.1e}, effect {effect:.3f}, margin {margin:.1e}")
    assert margin > MARGIN
    assert error < ERROR
    assert effect > 100 * error
    assert effect > 0.05


@pytest.mark.parametrize("item", range(3))
@pytest.mark.parametrize("where", ["qformer", "decoder"])
def test_single_is_the_references(one_blip, ask, where, item):
    pair = both(where, tau=1.0)
    error, effect, _ = compare(one_blip.hf_model, ask(one_blip, first=item).inputs, [pair])
    assert error < ERROR
    assert effect > 0.05


def test_masks_are_the_references(blip, ask, site):
    """run.anchors of a batch holds each sample's masks: over 16 patches, or over 8 queries."""
    inputs = ask(blip, 3).inputs
    ours, theirs = both(site, tau=1.0)
    with torch.inference_mode(), cl.intervening(blip, ours) as run:
        blip.hf_model(**inputs)
    assert run.anchors.positive.shape == (3, 16 if site == "qformer" else 8)
    assert (run.anchors.positive_layer, run.anchors.negative_layer) == (4, 0)
    for item in range(3):
        positive, negative = getattr(expected(inputs, item, [theirs]), site).masks[0]
        assert torch.equal(run.anchors.positive[item], positive)
        assert torch.equal(run.anchors.negative[item], negative)
        assert positive.any()
        assert negative.any()
        assert not torch.equal(positive, negative)


def test_reference_notices_every_parameter(one_blip, ask):
    """The cases differ from one another: no parameter is ignored by the reference."""
    inputs = ask(one_blip, 3).inputs
    start = reference.Clva(tau=1.0)
    changes = [
        {"alpha": 3.0},
        {"beta": 0.5},
        {"tau": 0.5},
        {"positive_layer": 2},
        {"negative_layer": 2},
        {"layers": (8,)},
        {"heads": ([0], [1])},
    ]
    base = expected(inputs, 0, [("qformer", start)]).logits
    for change in changes:
        other = expected(inputs, 0, [("qformer", replace(start, **change))]).logits
        assert float((other - base).abs().max()) > 1e-3, change


def test_layers_not_named_are_not_edited(ask):
    """Patterns of layers 0, 2 and 4 are the bare model's; those of 6, 8 and 10 are not."""
    inputs = ask(blip_of("sdpa"), 3).inputs
    plain = expected(inputs, 0, []).qformer.patterns
    edited = expected(inputs, 0, [both(tau=1.0)[1]]).qformer.patterns
    moved = [float((one - other).abs().max()) for one, other in zip(plain, edited, strict=True)]
    assert moved[:3] == [0, 0, 0]
    assert min(moved[3:]) > 0.05
