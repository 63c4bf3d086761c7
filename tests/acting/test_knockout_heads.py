"""The knock-out of some heads: its laws, and the classes that it finds itself."""

import pytest
import torch
from tiny_models import lens_of

import clva_lens as cl
from clva_lens.ground.errors import ParameterError


def logits(lens, prompt, *methods):
    with torch.inference_mode(), cl.intervening(lens.hf_model, *methods):
        return lens.hf_model(**prompt.inputs).logits


def mask(**layers):
    made = torch.zeros(12, 4, dtype=torch.bool)
    for layer, heads in layers.items():
        made[int(layer[1:]), heads] = True
    return made


def test_all_heads_is_no_argument(lens, ask):
    prompt = ask(lens, 3)
    every = cl.KnockOut(layers=(5, 8), heads=torch.ones(12, 4, dtype=torch.bool))
    expected = logits(lens, prompt, cl.KnockOut(layers=(5, 8)))
    assert torch.equal(logits(lens, prompt, every), expected)
    whole = cl.KnockOut(heads=torch.ones(12, 4, dtype=torch.bool))
    expected = logits(lens, prompt, cl.KnockOut(layers=range(12)))
    assert torch.equal(logits(lens, prompt, whole), expected)


def test_no_heads_is_the_identity(lens, ask):
    prompt = ask(lens, 3)
    none = cl.KnockOut(heads=torch.zeros(12, 4, dtype=torch.bool))
    assert torch.equal(logits(lens, prompt, none), logits(lens, prompt))


def test_two_sets_one_after_the_other_are_their_union(one, ask):
    prompt = ask(one, 3)
    first, second = mask(l6=[0, 1], l7=[2]), mask(l6=[3], l7=[2, 0], l9=[1])
    together = logits(one, prompt, cl.KnockOut(heads=first | second))
    apart = logits(one, prompt, cl.KnockOut(heads=first), cl.KnockOut(heads=second))
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)
    assert float((together - logits(one, prompt, cl.KnockOut(heads=first))).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["sensitive", "insensitive"])
def test_a_class_is_the_mask_of_the_trace(lens, ask, kind):
    """At one layer the class is what a trace finds there; the last row's mass falls to 0."""
    prompt = ask(lens)
    heads = getattr(cl.trace_attention(lens, prompt).heads(), kind)
    by_class = cl.KnockOut(layers=(6,), heads=kind)
    by_mask = cl.KnockOut(layers=(6,), heads=heads)
    assert torch.equal(logits(lens, prompt, by_class), logits(lens, prompt, by_mask))
    blind = cl.trace_attention(lens, prompt, by_class).intensity[6]
    assert torch.equal(blind == 0, heads[6])


def test_mass_that_others_keep_is_untouched(one, ask):
    prompt = ask(one)
    before = cl.trace_attention(one, prompt).intensity[6]
    after = cl.trace_attention(one, prompt, cl.KnockOut(heads=mask(l6=[1, 2]))).intensity[6]
    assert after[[1, 2]].tolist() == [0, 0]
    torch.testing.assert_close(after[[0, 3]], before[[0, 3]], rtol=0, atol=1e-6)


def test_decoding_with_a_cache_is_without(lens, ask):
    prompt, found = ask(lens, 3), []
    for cached in (True, False):
        method = cl.KnockOut(heads="sensitive")
        with torch.inference_mode(), cl.intervening(lens.hf_model, method):
            out = lens.hf_model.generate(
                **prompt.inputs,
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                use_cache=cached,
            )
        found.append(torch.stack(out.logits))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_methods_compare_by_their_heads():
    assert cl.KnockOut(heads=mask(l3=[1])) == cl.KnockOut(heads=mask(l3=[1]))
    assert cl.KnockOut(heads=mask(l3=[1])) != cl.KnockOut(heads=mask(l3=[2]))
    assert len({cl.KnockOut(heads=mask(l3=[1])), cl.KnockOut(heads=mask(l3=[1]))}) == 1


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("all", r"heads must be 'sensitive'.*is 'all'"),
        (torch.zeros(12, 4), r"bool mask \[layer, head\], .* but is torch.float32"),
        (torch.zeros(2, 12, 4, dtype=torch.bool), r"shape \(2, 12, 4\).*of one sample"),
    ],
)
def test_refused(untyped, heads, message):
    with pytest.raises(ParameterError, match=message):
        cl.KnockOut(heads=heads)


def test_another_models_mask():
    method = cl.KnockOut(heads=torch.ones(2, 4, dtype=torch.bool))
    with (
        pytest.raises(ParameterError, match=r"heads is for \(2, 4\).*has \(12, 4\)"),
        cl.intervening(lens_of("full", "sdpa").hf_model, method),
    ):
        pass


@pytest.mark.parametrize("rows", ["text", "last"])
def test_all_image_keys_is_a_mask_that_hides_them(lens, ask, rows):
    """The bare model under an explicit [batch, 1, query, key] mask, without a run of ours."""
    prompt = ask(lens)
    length = prompt["input_ids"].shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    blind = prompt.spans.text[0].clone()
    if rows == "last":
        blind[:-1] = False
    seen[blind[:, None] & prompt.spans.image[0]] = False
    hidden = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        expected = lens.hf_model(**{**prompt.inputs, "attention_mask": hidden}).logits
    found = logits(lens, prompt, cl.KnockOut(layers=range(12), rows=rows))
    error = float((found - expected).abs().max())
    effect = float((expected - logits(lens, prompt)).abs().max())
    print(f"error {error:.1e}, effect {effect:.3f}")
    assert error < 5e-5
    assert effect > 1000 * error
