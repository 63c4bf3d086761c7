"""Contrastive methods are their formulas, on logits, at the prompt and at every later step.

Errors are printed beside the size of the effect. The reference (contrasting.py) is float64 and has
no cache. A token near the cut-off could fall on either side in float32: the nearest is printed too.
"""

import contrasting
import pytest
import reference
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.methods.base import Method
from clva_lens.methods.contrast import ContrastRule, ContrastSession, text_only

STEPS = 4
ERROR = 2e-4
FAMILIES = ("llava", "instructblip")


class TextGuidance(Method):
    """PAI's guidance alone."""

    name = "text guidance"

    def sessions(self, target):
        rule = ContrastRule(strength=1.7, beta=0.1, form="guidance")
        return [ContrastSession(target.model, text_only(5), rule)]


def lens_for(family, kernel="sdpa"):
    return lens_of("full", kernel) if family == "llava" else blip_of(kernel)


def decode(lens, inputs, *methods, **options):
    """Return the generated ids and the raw logits of every step."""
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(lens, *methods):
        out = lens.hf_model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def compare(family, lens, methods, second, a, beta, form, edits=()):
    """Check every step of three prompts of different length against the reference."""
    ids, found = decode(lens, inputs := lens_inputs(lens), *methods)
    plain = decode(lens, inputs, *methods[:-1], max_new_tokens=1)[1][:, 0]
    error, effect, nearest, cut = 0.0, [], 1e9, 0
    for item in range(len(ids)):
        own, other = contrasting.both(family, inputs, second(inputs), item, ids[item, :-1], edits)
        wanted = contrasting.contrast(own, other, a, form)
        if beta:
            room = own - own.amax(dim=1, keepdim=True) - torch.tensor(beta).double().log()
            nearest = min(nearest, float(room.abs().min()))
            assert torch.equal(found[item].isinf(), room < 0)
            cut += int((room < 0).sum())
        kept = found[item].isfinite()
        error = max(error, float((found[item] - wanted)[kept].abs().max()))
        effect.append(float((found[item, 0] - plain[item])[kept[0]].abs().max()))
    print(
        f"{family}: error {error:.1e}, effect {min(effect):.3f}, nearest {nearest:.1e}, {cut} cut"
    )
    assert error < ERROR
    assert min(effect) > 100 * error
    assert min(effect) > 0.05
    assert not beta or 0 < cut < found.numel() - len(ids) * STEPS


def lens_inputs(lens):
    inputs = lens.prompt([picture(i) for i in range(3)], QUESTIONS).inputs
    assert not inputs["attention_mask"].bool().all()  # there is padding
    return inputs


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vcd(family, kernel):
    method = cl.VCD(alpha=0.7, beta=0.1, noise_step=400, seed=3)

    def second(inputs):
        return contrasting.with_noise(inputs, 400, 3)

    compare(family, lens_for(family, kernel), [method], second, 0.7, 0.1, "difference")


@pytest.mark.parametrize(
    ("family", "variant", "expected"),
    [
        ("llava", "released", (1.0, 0.2, 500)),
        ("instructblip", "released", (0.5, 0.2, 500)),
        ("llava", "paper", (1.0, 0.1, 999)),
        ("instructblip", "paper", (1.0, 0.1, 999)),
    ],
)
def test_vcd_defaults(family, variant, expected):
    """The released scripts' settings by family, or the paper's."""
    lens = lens_for(family)
    alpha, beta, step = expected
    inputs = lens_inputs(lens)
    named = cl.VCD(alpha=alpha, beta=beta, noise_step=step)
    default, given = (decode(lens, inputs, m)[1] for m in (cl.VCD(variant=variant), named))
    assert torch.equal(default, given)


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("family", FAMILIES)
def test_icd(family, variant):
    lens = lens_for(family)
    method = cl.ICD(instruction=contrasting.DISTURBING, alpha=0.8, beta=0.1, variant=variant)
    form = "difference" if variant == "released" else "subtraction"

    def second(inputs):
        return contrasting.disturbed(family, lens, inputs)

    compare(family, lens, [method], second, 0.8, 0.1, form)


def test_text_guidance():
    lens = lens_for("llava")
    compare("llava", lens, [TextGuidance()], contrasting.without_picture, 1.7, 0.1, "guidance")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_methods_act_on_both_inputs(family):
    """CLVA anchors itself in each input by what that input shows."""
    lens = lens_for(family)
    methods = [cl.CLVA(tau=1.0), cl.VCD(alpha=0.7, beta=0.1, noise_step=400)]

    def second(inputs):
        return contrasting.with_noise(inputs, 400, 0)

    edits = [reference.Clva(tau=1.0)]
    compare(family, lens, methods, second, 0.7, 0.1, "difference", edits)
    inputs = lens_inputs(lens)
    one, other = (decode(lens, inputs, *m)[1] for m in (methods, methods[::-1]))
    assert torch.equal(one, other)


def test_no_attention_method_acts_on_text_alone():
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    ids, found = decode(lens, inputs, cl.KnockOut(), TextGuidance())
    for item in range(3):
        edits = [reference.KnockOut()]
        second = contrasting.without_picture(inputs)
        own, other = contrasting.both("llava", inputs, second, item, ids[item, :-1], edits)
        wanted = contrasting.contrast(own, other, 1.7, "guidance")
        kept = found[item].isfinite()
        assert float((found[item] - wanted)[kept].abs().max()) < ERROR
