"""PAI whole: its attention part in the prompt, and guidance by a prompt without image.

The reference (contrasting.py, rewrites.py) is float64 and has no cache; errors are printed beside
the size of the effect, of both halves together and of the guidance alone.
"""

from dataclasses import replace

import contrasting
import pytest
import rewrites
import torch
from test_contrast_reference import TextGuidance, decode, lens_for, lens_inputs
from tiny_models import blip_of

import clva_lens as cl
from clva_lens.engine.run import _ACTIVE
from clva_lens.ground.errors import InterventionError

ERROR = 2e-4
BOTH = cl.PAI(alpha=0.5, guidance=1.7)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("guidance", [0.4, 1.1, 2.0])
@pytest.mark.parametrize(
    ("family", "row"), [("llava", True), ("llava", False), ("instructblip", True)]
)
def test_pai(family, row, guidance, kernel):
    """At every step of three prompts, with the prompt's last row edited, or not as released."""
    lens = lens_for(family, kernel)
    inputs = lens_inputs(lens)
    method = cl.PAI(alpha=0.5, guidance=guidance, prompt_row=row, site="decoder")
    half = cl.PAI(alpha=0.5, prompt_row=row)
    ids, found = decode(lens, inputs, method)
    plain, unguided = (
        decode(lens, inputs, *m, max_new_tokens=1)[1][:, 0].log_softmax(1) for m in ((), (half,))
    )
    edits = [rewrites.Pai(alpha=0.5, prompt="last" if row else "none")]
    where = {"edits": edits} if family == "llava" else {"decoder": edits}
    error, effects, guided, nearest, cut = 0.0, [], [], 1e9, 0
    for item in range(3):
        second = contrasting.without_picture(inputs)
        own, other = contrasting.both(family, inputs, second, item, ids[item, :-1], **where)
        wanted = contrasting.contrast(own, other, guidance, "guidance")
        room = own - own.amax(dim=1, keepdim=True) - torch.tensor(0.1).double().log()
        nearest = min(nearest, float(room.abs().min()))
        kept = room >= 0
        assert torch.equal(found[item].isfinite(), kept)
        cut += int((room < 0).sum())
        error = max(error, float((found[item] - wanted)[kept].abs().max()))
        for sizes, start in ((effects, plain), (guided, unguided)):
            sizes.append(float((found[item, 0] - start[item])[kept[0]].abs().max()))
    print(
        f"{family}: error {error:.1e}, effect {min(effects):.3f}, of guidance {min(guided):.3f}, "
        f"nearest {nearest:.1e}, {cut} cut"
    )
    assert error < ERROR
    assert min(*effects, *guided) > max(0.02, 100 * error)
    assert 0 < cut < found.numel() - len(ids) * found.shape[1]


def test_the_default_is_the_attention_part_alone():
    """No second input, no cut-off, and the numbers that it had before there was guidance."""
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    _, found = decode(lens, inputs, cl.PAI())
    assert found.isfinite().all()
    for beta in (0.0, 0.9):
        assert torch.equal(found, decode(lens, inputs, cl.PAI(guidance=1, beta=beta))[1])
    with cl.intervening(lens, cl.PAI()) as run:
        assert not any(session.edits_logits for session in run.sessions)


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_guidance_alone(family):
    """Without the attention part it is the contrast with the text alone, bit by bit."""
    lens = lens_for(family)
    inputs = lens_inputs(lens)
    one, other = (
        decode(lens, inputs, m)[1] for m in (cl.PAI(alpha=0, guidance=1.7), TextGuidance())
    )
    assert torch.equal(one, other)


def test_the_prompts_last_row_is_the_releases():
    """With guidance it is left alone, so the first token is that of guidance alone; else edited."""
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    for guidance, row in ((1.0, True), (1.7, False)):
        default = cl.PAI(alpha=0.5, guidance=guidance)
        one, same, other = (
            decode(lens, inputs, replace(default, prompt_row=given))[1]
            for given in (None, row, not row)
        )
        assert torch.equal(one, same)
        assert float((one - other)[:, 0].nan_to_num(0, 0, 0).abs().max()) > 0.05
    first = decode(lens, inputs, cl.PAI(guidance=1.7))[1][:, 0]
    assert torch.equal(first, decode(lens, inputs, TextGuidance())[1][:, 0])


def test_no_cut_off():
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    options = {"max_new_tokens": 1}
    loose = decode(lens, inputs, cl.PAI(guidance=1.7, beta=0), **options)[1]
    strict = decode(lens, inputs, cl.PAI(guidance=1.7), **options)[1]
    assert loose.isfinite().all()
    kept = strict.isfinite()
    assert not kept.all()
    assert torch.equal(loose[kept], strict[kept])


def test_other_methods_do_not_reach_the_text():
    """CLVA beside it acts on the prompt with the picture only, in either order."""
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    clva = cl.CLVA(tau=1.0)
    both = decode(lens, inputs, clva, BOTH)[1]
    alone = decode(lens, inputs, BOTH)[1]
    change = (both - alone)[:, 0].abs()
    assert float(change[change.isfinite()].max()) > 0.05
    assert not _ACTIVE


@pytest.mark.parametrize("other", [cl.VCD(), cl.ICD(), cl.DeCo(), cl.ONLY(), BOTH])
def test_two_cut_offs(other):
    with (
        pytest.raises(InterventionError, match=r"cut implausible tokens off.*Use one of them"),
        cl.intervening(lens_for("llava"), BOTH, other),
    ):
        pass
    assert not _ACTIVE


def test_the_attention_part_goes_with_a_contrast():
    """Without guidance, PAI acts on both inputs of a VCD, as it did."""
    lens = lens_for("llava")
    inputs = lens_inputs(lens)
    found, alone = (decode(lens, inputs, *m)[1] for m in ((cl.PAI(), cl.VCD()), (cl.VCD(),)))
    assert not torch.equal(found, alone)


def test_encoder_decoders_are_refused():
    with (
        pytest.raises(InterventionError, match=r"T5.*Llama or OPT"),
        cl.intervening(blip_of("sdpa", "t5"), BOTH),
    ):
        pass


def test_as_hooks_is_refused(one, ask, no_process):
    bridge = cl.to_transformer_lens(one)
    with pytest.raises(InterventionError, match=r"edits logits.*cl\.intervening"):
        BOTH.as_hooks(bridge, ask(one))
