"""IMCCD is its formulas, on logits, at the prompt and at later steps; both parts alone, too."""

import contrasting
import impairing
import pytest
import queries
import reference
import torch
from test_contrast_reference import decode, lens_inputs
from tiny_models import blip_of, double_of, exact_blip, lens_of

import clva_lens as cl
from clva_lens.ground.errors import ParameterError

STEPS = 3
ERROR = 3e-4
PARTS = {
    "both": {"alpha": 0.8, "beta": 0.1, "compression": 3.0},
    "cdar": {"alpha": 0.0, "compression": 2.0},
    "cmved": {"alpha": 0.8, "beta": 0.1, "compression": 1.0},
}


def model_parts(family, heads, inputs, item):
    """Return the float64 decoder, and one picture's features for it."""
    ids, pixels, _ = reference.rows_of(inputs, item)
    if family == "llava":
        model = double_of(heads)
        features = reference._features(model, pixels.double())
        decoder, head = model.model.language_model, model.lm_head
    else:
        model = exact_blip()
        text = inputs["qformer_input_ids"][item][inputs["qformer_attention_mask"][item].bool()]
        features, _ = queries.read_picture(model, pixels, text, [])
        decoder, head = model.language_model.model, model.language_model.lm_head
    return ids, (decoder, head.weight, model.config.text_config), features


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("family", "heads"), [("llava", "full"), ("llava", "grouped"), ("instructblip", "grouped")]
)
@torch.no_grad()
def test_imccd(family, heads, part):
    lens = lens_of(heads, "sdpa") if family == "llava" else blip_of("sdpa")
    inputs, settings = lens_inputs(lens), PARTS[part]
    ids, found = decode(lens, inputs, cl.IMCCD(**settings), max_new_tokens=STEPS)
    plain = decode(lens, inputs, max_new_tokens=1)[1][:, 0]
    error, effect, margin = 0.0, [], 1e9
    for item in range(2):
        prompt, parts, features = model_parts(family, heads, inputs, item)
        whole = torch.cat([prompt, ids[item, :-1]])

        def read(impaired, parts=parts, whole=whole, features=features, prompt=prompt):
            logits, nearest = impairing.run(
                parts, whole, features, len(prompt), settings["compression"], impaired
            )
            return logits[len(prompt) - 1 :], nearest

        own, _ = read(False)
        wanted, kept = own, torch.ones_like(own, dtype=torch.bool)
        if settings["alpha"]:
            other, margin = read(True)
            wanted = contrasting.contrast(own, other, settings["alpha"], "difference")
            room = own - own.amax(dim=1, keepdim=True) - torch.tensor(0.1).double().log()
            kept = room >= 0
        assert torch.equal(found[item].isfinite(), kept)
        error = max(error, float((found[item] - wanted)[kept].abs().max()))
        effect.append(float((found[item, 0] - plain[item])[kept[0]].abs().max()))
    print(f"{family} {part}: error {error:.1e}, effect {min(effect):.3f}, margin {margin:.1e}")
    assert error < ERROR
    assert min(effect) > 100 * error
    assert min(effect) > 0.05


@pytest.mark.parametrize(
    ("family", "expected"), [("llava", (3, 0.2, 3)), ("instructblip", (3, 0.3, 1))]
)
def test_defaults(family, expected):
    lens = lens_of("full", "sdpa") if family == "llava" else blip_of("sdpa")
    alpha, beta, compression = expected
    named = cl.IMCCD(alpha=alpha, beta=beta, compression=compression)
    one, other = (decode(lens, lens_inputs(lens), m)[1] for m in (cl.IMCCD(), named))
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_batches_caches_and_beams(family):
    lens = lens_of("full", "sdpa") if family == "llava" else blip_of("sdpa")
    inputs, method = lens_inputs(lens), cl.IMCCD(alpha=1.0)
    ids, found = decode(lens, inputs, method)
    others, logits = decode(lens, inputs, method, use_cache=False)
    assert torch.equal(ids, others)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    ids, _ = decode(lens, inputs, method, num_beams=3)
    for item in range(3):
        single = queries.single(inputs, item)
        alone, _ = decode(lens, single, method, num_beams=3)
        assert torch.equal(alone[0], ids[item])


def test_misuse():
    with pytest.raises(ParameterError, match=r"compression must be a finite number >= 1"):
        cl.IMCCD(compression=0.5)
    with pytest.raises(ParameterError, match=r"strength of a contrast"):
        cl.IMCCD(alpha=-1)
    with (
        pytest.raises(ParameterError, match=r"rotary positions, but a OPTDecoder has none"),
        cl.intervening(blip_of("sdpa", "opt"), cl.IMCCD(compression=3)),
    ):
        pass
