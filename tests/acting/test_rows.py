"""Law 5: what is observed is what the eager model returns, or what the reference rewrote."""

import pytest
import reference
import torch
from tiny_models import lens_of

import clva_lens as cl

ATOL = 1e-5


def from_patterns(patterns, image, text, system):
    """Return (image, system, text) masses and the last row's map of [layer, head, query, key]."""
    rows = patterns[:, :, text]
    masses = [rows[..., span].sum(dim=-1).mean(dim=-1) for span in (image, system, text)]
    return (*masses, patterns[:, :, text[-1]][..., image])


def spans_of(prompt, item):
    """Return the positions of image, text and system of one sample, from its token ids alone."""
    ids = prompt.inputs["input_ids"][item].tolist()
    start = prompt.inputs["attention_mask"][item].tolist().index(1)
    image = [i for i, token in enumerate(ids) if token == 5]
    return image, list(range(image[-1] + 1, len(ids))), list(range(start, image[0]))


def check(trace, wanted, atol=ATOL):
    found = (trace.intensity, trace.system, trace.text, trace.maps)
    for name, ours, theirs in zip(("image", "system", "text", "last"), found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=atol, msg=f"{name} differs")


def test_single_is_the_eager_models(lens, variant, ask):
    prompt = ask(lens)
    trace = cl.trace_attention(lens, prompt)
    eager = lens_of(variant[0], "eager").hf_model
    with torch.inference_mode():
        out = eager(**prompt.inputs, output_attentions=True)
    patterns = torch.stack(out.attentions)[:, 0]
    assert trace.intensity.shape == (12, 4)
    assert trace.maps.shape == (12, 4, 16)
    check(trace, from_patterns(patterns, *spans_of(prompt, 0)))
    torch.testing.assert_close(trace.logits, out.logits[0, -1], rtol=0, atol=1e-4)
    # Not vacuous: heads differ, and so do layers.
    assert float(trace.intensity.std(dim=1).min()) > 0.01
    assert float((trace.intensity[0] - trace.intensity[4]).abs().max()) > 0.05


def test_padded_batch_is_the_eager_models(lens, variant, ask):
    prompt = ask(lens, 3)
    assert not prompt.inputs["attention_mask"].bool().all()
    trace = cl.trace_attention(lens, prompt)
    eager = lens_of(variant[0], "eager").hf_model
    with torch.inference_mode():
        patterns = torch.stack(eager(**prompt.inputs, output_attentions=True).attentions)
    for item in range(3):
        check(trace[item], from_patterns(patterns[:, item], *spans_of(prompt, item)))


def test_batch_is_singles(lens, ask):
    trace = cl.trace_attention(lens, ask(lens, 3))
    for item in range(3):
        alone = cl.trace_attention(lens, ask(lens, first=item))
        check(trace[item], (alone.intensity, alone.system, alone.text, alone.maps))
        torch.testing.assert_close(trace[item].logits, alone.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "clva", "knock-out"])
def test_under_a_method_is_the_references(lens, exact, ask, kind):
    method, edits = {
        "none": (None, []),
        "clva": (cl.CLVA(tau=1.0), [reference.Clva(tau=1.0)]),
        "knock-out": (cl.KnockOut(rows="last"), [reference.KnockOut(rows="last")]),
    }[kind]
    prompt = ask(lens, 3)
    trace = cl.trace_attention(lens, prompt, method)
    plain = cl.trace_attention(lens, prompt)
    total = trace.intensity + trace.system + trace.text
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
    for item in range(3):
        ids, pixels, _ = reference.rows_of(prompt.inputs, item)
        result = reference.run(exact, ids, pixels, edits)
        system = list(range(result.image[0]))
        patterns = torch.stack(result.patterns)
        check(trace[item], from_patterns(patterns, result.image, result.text, system))
    moved = (trace.maps - plain.maps).abs().amax(dim=(0, 2, 3))
    print(f"{kind}: last-row maps move by {float(moved.max()):.3f}")
    assert torch.equal(moved[:5], torch.zeros(5))
    assert bool((moved[5:] > 0.01).all()) == (kind != "none")


def test_chosen_layers(one, ask):
    whole = cl.trace_attention(one, ask(one))
    some = cl.trace_attention(one, ask(one), layers=(7, 2))
    assert some.layers == (2, 7)
    assert some.num_layers == 12
    assert torch.equal(some.intensity, whole.intensity[[2, 7]])
    assert torch.equal(some.maps, whole.maps[[2, 7]])


def test_generated_rows_are_the_eager_models(lens, variant, ask):
    """Each decoding step's maps equal the eager model's patterns of that step."""
    prompt = ask(lens, 2)
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.inference_mode(), cl.observing(lens.hf_model, layers=(0, 6)) as seen:
        lens.hf_model.generate(**prompt.inputs, **options)
    eager = lens_of(variant[0], "eager").hf_model
    with torch.inference_mode():
        out = eager.generate(
            **prompt.inputs, **options, output_attentions=True, return_dict_in_generate=True
        )
    assert len(seen.steps) == 3
    assert len(out.attentions) == 4
    for step, patterns in zip(seen.steps, out.attentions[1:], strict=True):
        assert step.shape == (2, 2, 4, 1, 16)
        for item in range(2):
            image, _, _ = spans_of(prompt, item)
            wanted = torch.stack([patterns[0], patterns[6]])[:, item][..., image]
            torch.testing.assert_close(step[:, item], wanted, rtol=0, atol=ATOL)
    assert seen.trace.intensity.shape == (2, 2, 4)


def test_a_second_prompt_is_observed_afresh(one, ask):
    """Steps of an earlier answer are not those of a later one."""
    options = {"do_sample": False}
    with torch.inference_mode(), cl.observing(one.hf_model, layers=(6,)) as seen:
        one.hf_model.generate(**ask(one, first=0).inputs, max_new_tokens=5, **options)
        first = seen.trace
        one.hf_model.generate(**ask(one, first=2).inputs, max_new_tokens=3, **options)
    with torch.inference_mode(), cl.observing(one.hf_model, layers=(6,)) as alone:
        one.hf_model.generate(**ask(one, first=2).inputs, max_new_tokens=3, **options)
    assert len(seen.steps) == len(alone.steps) == 2
    for found, wanted in zip(seen.steps, alone.steps, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(seen.trace.maps, alone.trace.maps)
    assert not torch.allclose(first.maps, seen.trace.maps, atol=1e-3)


def test_saliency_of_head_sets(one, ask):
    """Eq. 4 by hand from the maps, for every way to name the heads."""
    trace = cl.trace_attention(one, ask(one))
    assert torch.allclose(trace.saliency(), trace.maps.mean(dim=1), atol=1e-7)
    for name in ("sensitive", "insensitive"):
        mask = getattr(trace.heads(), name)
        wanted = torch.stack([trace.maps[i, mask[i]].mean(dim=0) for i in range(12)])
        assert torch.allclose(trace.saliency(name), wanted, atol=1e-7)
    mask = torch.zeros(12, 4, dtype=torch.bool)
    mask[:, 2] = True
    assert torch.allclose(trace.saliency(mask), trace.maps[:, 2], atol=1e-7)
    assert not torch.allclose(trace.saliency("sensitive"), trace.saliency("insensitive"), atol=1e-3)


def test_trace_misuse(one, ask, untyped):
    trace = cl.trace_attention(one, ask(one))
    with pytest.raises(cl.ClvaLensError, match=r"heads must be 'all', 'sensitive'"):
        trace.saliency("visual")
    with pytest.raises(cl.ClvaLensError, match=r"heads is for \(3, 4\).*\(12, 4\)"):
        trace.saliency(torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(cl.ClvaLensError, match=r"this trace is of a single prompt"):
        trace[0]
    with pytest.raises(cl.ClvaLensError, match=r"layers names layer 12.*layers 0 to 11"):
        cl.trace_attention(one, ask(one), layers=(12,))
    with pytest.raises(
        cl.ClvaLensError, match=r"layers must be 'all' or one or more layer indices"
    ):
        cl.trace_attention(one, ask(one), layers="most")
