"""Patches and layer methods beside a contrast: what acts on the second input, and what does not."""

from dataclasses import replace

import contrasting
import pytest
import torch
from tiny_models import QUESTIONS, blip_of, lens_of, picture

import clva_lens as cl
from clva_lens.models.kv_cache import CACHE, cache_of

A, FED = 0.7, 8.0
CONTRASTS = {
    "VCD": cl.VCD(alpha=A, beta=0.0, noise_step=400, seed=3),
    "ICD": cl.ICD(alpha=A, beta=0.0, instruction="you are near"),
    "IMCCD": cl.IMCCD(alpha=A, beta=0.0, compression=1.0),
}


def lens_for(family, fed=1.0):
    return lens_of("full", "sdpa", fed) if family == "llava" else blip_of("sdpa", "llama", fed)


def pair(lens):
    return tuple(lens.prompt([picture(i), picture(i + 1)], QUESTIONS[:2]) for i in (11, 0))


def last(lens, prompt, *methods):
    with torch.inference_mode(), cl.intervening(lens, *methods):
        return lens.hf_model(**prompt.inputs).logits[:, -1].double()


def second(own, contrast):
    """l′ of (1 + a)·l − a·l′."""
    return ((1 + A) * own - contrast) / A


def noised(lens, prompt):
    """The prompt with VCD's second picture; its logits are what VCD takes away."""
    inputs = contrasting.with_noise(prompt.inputs, 400, 3)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    made = replace(prompt, inputs=inputs)
    taken = second(last(lens, prompt), last(lens, prompt, CONTRASTS["VCD"]))
    torch.testing.assert_close(last(lens, made), taken, rtol=0, atol=1e-4)
    return made


def patch_of(lens, source, layer=4):
    cache = lens.run_with_cache(source, f"blocks.{layer}.hook_resid_pre").cache
    return cl.PatchActivations(source=source, cache=cache, span="image", layers=[layer])


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("name", CONTRASTS)
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_a_patch_is_of_the_prompt_alone(family, name, composed):
    """(1 + a)·l − a·l′ with l of the patched prompt, and l′ as it is without the patch."""
    lens, method = lens_for(family), CONTRASTS[name]
    source, target = pair(lens)
    patch = patch_of(lens, source)
    unpatched = last(lens, target, method)
    wanted = (1 + A) * last(lens, target, patch) - A * second(last(lens, target), unpatched)
    found = last(lens, target, *([cl.compose(patch, method)] if composed else [patch, method]))
    error, effect = (float((one - wanted).abs().max()) for one in (found, unpatched))
    print(f"{family} {name}: error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-4
    assert effect > max(0.05, 1000 * error)


@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_a_patch_of_both_would_be_something_else(family):
    lens, method = lens_for(family), CONTRASTS["VCD"]
    source, target = pair(lens)
    patch, other = patch_of(lens, source), noised(lens, target)
    own = last(lens, target, patch)
    found = last(lens, target, patch, method)
    wanted, both = ((1 + A) * own - A * last(lens, other, *one) for one in ((), (patch,)))
    error, apart = float((found - wanted).abs().max()), float((both - wanted).abs().max())
    print(f"{family}: error {error:.1e}, a patch of both is {apart:.3f} away")
    assert error < 1e-4
    assert apart > max(0.05, 500 * error)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_memvr_retraces_in_both_inputs(family, order):
    """(1 + a)·l − a·l′ where each input is shown its own picture again, at every step."""
    lens = lens_for(family, FED)
    memvr, vcd = cl.MemVR(ratio=0.3, gamma=0.6), CONTRASTS["VCD"]
    _, target = pair(lens)
    other = noised(lens, target)
    written = torch.tensor([[12, 30], [8, 21]])
    found = steps(lens, target, written, *[memvr, vcd][::order])
    own, taken = (steps(lens, one, written, memvr) for one in (target, other))
    wanted = (1 + A) * own - A * taken
    error = float((found - wanted).abs().max())
    once = (1 + A) * own - A * steps(lens, other, written)
    effects = [
        (one - wanted).abs().amax(dim=(0, 2)) for one in (once, steps(lens, target, written, vcd))
    ]
    print(f"{family}: error {error:.1e}, effects by step {[one.tolist() for one in effects]}")
    assert error < 2e-4
    assert min(float(one.min()) for one in effects) > max(0.02, 100 * error)


def steps(lens, prompt, written, *methods):
    """The logits of the prompt's last row, and of each row that was written, with a cache."""
    with torch.inference_mode(), cl.intervening(lens, *methods):
        out = lens.hf_model(**prompt.inputs, use_cache=True)
        made, mask = [out.logits[:, -1]], prompt["attention_mask"]
        for token in written.T:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            given = {"input_ids": token[:, None], "attention_mask": mask}
            past = cache_of(getattr(out, "language_model_outputs", out))
            out = language(lens)(**given, **{CACHE: past}, use_cache=True)
            made.append(out.logits[:, -1])
    return torch.stack(made, dim=1).double()


def language(lens):
    return getattr(lens.hf_model, "language_model", lens.hf_model)
