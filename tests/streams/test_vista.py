"""VISTA is its formulas, on logits, at the prompt and at later steps; VTI is two steerings.

The reference (reference.py) is float64 and has no cache: its ``feed`` replaces what MLPs put out.
"""

import pytest
import reference
import torch
from test_layer_methods import FED, decode
from tiny_models import QUESTIONS, blip_of, double_of, lens_of, picture

import clva_lens as cl
from clva_lens.ground.errors import InterventionError, ParameterError
from clva_lens.lens.sharing import why_unshared

STEPS, ERROR = 3, 3e-4
STRENGTH, SHARE = 0.3, 0.4


def lens_inputs(lens):
    return lens.prompt([picture(i) for i in range(3)], QUESTIONS).inputs


def feeding(directions, strength):
    """What turns an MLP's output, row by row."""

    def feed(layer, normed, fed, result):
        v, rows = directions[layer], []
        for x in fed:
            cosine = float(x @ v / (x.norm() * v.norm()))
            u = x / x.norm() + strength * (1 + max(0.0, -cosine)) * v / v.norm()
            rows.append(x.norm() * u / u.norm())
        return torch.stack(rows)

    return feed


@pytest.mark.parametrize("augment", [0.0, SHARE])
@torch.no_grad()
def test_vista(augment):
    lens = lens_of("full", "sdpa", FED)
    inputs, model = lens_inputs(lens), double_of("full", FED)
    method = cl.VISTA(strength=STRENGTH, augment=augment)
    ids, found = decode(lens, inputs, method, max_new_tokens=STEPS)
    plain = decode(lens, inputs, max_new_tokens=1)[1][:, 0]
    error, effect = 0.0, []
    for item in range(2):
        prompt, pixels, _ = reference.rows_of(inputs, item)
        none = torch.empty(0, 32, dtype=torch.float64)
        seen = reference.run(model, prompt, pixels).streams
        bare = reference.run(model, prompt[prompt != 5], pixels, features=none).streams
        pairs = zip(seen[1:], bare[1:], strict=True)
        directions = [one[-1] - other[-1] for one, other in pairs]
        whole = torch.cat([prompt, ids[item, :-1]])
        feed = feeding(directions, STRENGTH)
        result = reference.run(model, whole, pixels, (), len(prompt), feed=feed)
        wanted = result.logits[len(prompt) - 1 :]
        early = [result.streams[layer + 1] @ model.lm_head.weight.T for layer in (9, 10, 11)]
        early = (sum(early) / 3)[len(prompt) - 1 :]
        wanted = (1 - augment) * wanted + augment * early
        error = max(error, float((found[item] - wanted).abs().max()))
        effect.append(float((found[item, 0] - plain[item]).abs().max()))
    print(f"vista: error {error:.1e}, effect {min(effect):.3f}")
    assert error < ERROR
    assert min(effect) > max(0.05, 100 * error)


def test_each_half_alone_and_none():
    lens = lens_of("full", "sdpa", FED)
    inputs = lens_inputs(lens)
    plain, *found = (
        decode(lens, inputs, *one, max_new_tokens=2)[1]
        for one in (
            (),
            (cl.VISTA(strength=0, augment=0),),
            (cl.VISTA(augment=0),),
            (cl.VISTA(strength=0),),
            (cl.VISTA(),),
        )
    )
    assert torch.equal(found[0], plain)
    for one in found[1:]:
        assert float((one - plain)[:, 0].abs().max()) > 0.05
    assert not torch.equal(found[1], found[3]) and not torch.equal(found[2], found[3])


def test_a_second_input_is_steered_by_its_own_picture():
    """Beside a contrast, both are turned; early logits are the first one's."""
    lens = lens_of("full", "sdpa", FED)
    inputs = lens_inputs(lens)
    method, contrast = cl.VISTA(strength=0.5, augment=0), cl.VCD(beta=0)
    one, other = (decode(lens, inputs, *both)[1] for both in ((method, contrast), (contrast,)))
    assert float((one - other)[:, 0].abs().max()) > 0.05


def test_q_formers_and_refusals():
    blip = blip_of("sdpa", "llama", FED)
    inputs = lens_inputs(blip)
    found, plain = (decode(blip, inputs, *m, max_new_tokens=2)[1] for m in ((cl.VISTA(),), ()))
    assert float((found - plain)[:, 0].abs().max()) > 0.05
    lens = lens_of("full", "sdpa", FED)
    assert "before the question" in why_unshared(lens, cl.VISTA())
    with pytest.raises(ParameterError, match=r"augment must be in \[0, 1\]"):
        cl.VISTA(augment=2)
    with pytest.raises(ParameterError, match=r"layers names layer 12"):
        cl.generate(lens, (picture(0), QUESTIONS[0]), cl.VISTA(layers=[12]))
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    with torch.inference_mode():
        out = lens.hf_model(**prompt, use_cache=True)
        mask = torch.ones(1, prompt["input_ids"].shape[1] + 1, dtype=torch.long)
        with (
            cl.intervening(lens, cl.VISTA()),
            pytest.raises(InterventionError, match=r"prompt|picture"),
        ):
            lens.hf_model(
                input_ids=torch.tensor([[9]]),
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
