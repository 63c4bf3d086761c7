"""A bias on keys is the same attention in every form: as a mask, for the edited rows only, folded.

One attention call is compared with a float64 softmax written out here; a model's logits with those
of ``reference.py``. Every error stands beside the size of the effect.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import reference
import torch
from tiny_models import QUESTIONS, lens_of, picture
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import clva_lens as cl
from clva_lens.engine import bias as folding
from clva_lens.engine.bias import KeyBias
from clva_lens.engine.kernels import Merging
from clva_lens.engine.session import AttentionCall
from clva_lens.ground.axes import TokenSpans
from clva_lens.models.step import Step

FORMS = ("masked", "split", "folded")
COUNT, HEADS, WIDTH, FIRST, IMAGE = 40, 4, 16, 26, slice(6, 26)
# Error of the outputs, which are of size 1: a rounding of each type or two.
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


CLOSE = {"atol": 2e-6, "rtol": 0}


def tensors(kind=torch.float32, heads=HEADS, kv_heads=HEADS, width=WIDTH, batch=2):
    seed = torch.Generator().manual_seed(0)
    shapes = ((batch, heads), (batch, kv_heads), (batch, kv_heads))
    return [torch.randn(*s, COUNT, width, generator=seed).to(kind) for s in shapes]


def key_bias(beta=0.9, seed=0, batch=2):
    drawn = torch.rand(batch, COUNT, generator=torch.Generator().manual_seed(seed))
    keys = torch.zeros(batch, COUNT)
    keys[:, IMAGE] = torch.where(drawn < 0.3, math.log(15), 0.0)[:, IMAGE]
    less = math.log(1 - beta) if beta < 1 else -math.inf
    keys[:, IMAGE] = torch.where(drawn > 0.7, less, keys)[:, IMAGE]
    rows = torch.arange(COUNT).expand(batch, -1) >= FIRST
    return KeyBias(keys, rows, FIRST)


def attend(form, bias, query, key, value, mask=None):
    """Return the output of one call in a form, and the form that was used."""
    none = torch.zeros(len(query), COUNT, dtype=torch.bool)
    image, text = none.clone(), none.clone()
    image[:, IMAGE], text[:, FIRST:] = True, True
    spans = TokenSpans(system=~(image | text), image=image, text=text, generated=none)
    step = Step(0, 0, text, spans, spans.visual_index(), causal=True, ordered=True)
    scaling = query.shape[3] ** -0.5
    call = AttentionCall(0, step, query, key, mask, bias, scaling, value)
    groups = query.shape[1] // key.shape[1]
    module = SimpleNamespace(is_causal=True, num_key_value_groups=groups, training=False)
    merging = Merging(fused=True)
    with folding.forced(form):
        used = folding.choose_form(bias, query, key, mask, from_start=True)
        kernel = partial(sdpa_attention_forward, module, scaling=scaling)
        out, _ = merging.attend(kernel, call)
    return out.transpose(1, 2), used


def softmax(summand, query, key, value, allowed=None):
    """Return softmax(q·k·s + b)·v in float64; ``allowed`` [batch, key] leaves keys out."""
    query, key, value = (x.double() for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT / math.sqrt(query.shape[3])
    past = torch.ones(COUNT, COUNT, dtype=torch.bool).tril()
    if allowed is not None:
        past = past & allowed[:, None, None, :]
    edited = torch.arange(COUNT)[:, None] >= FIRST
    if summand is not None:
        scores = scores + summand.double()[:, None, None, :].where(edited, 0.0)
    return scores.masked_fill(~past, -math.inf).softmax(dim=-1).nan_to_num() @ value


@pytest.mark.parametrize("kv_heads", [HEADS, 2], ids=["full", "grouped"])
@pytest.mark.parametrize("kind", ERROR, ids=str)
@pytest.mark.parametrize("beta", [0.9, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_softmax(form, beta, kind, kv_heads):
    inputs, bias = tensors(kind, kv_heads=kv_heads), key_bias(beta)
    out, used = attend(form, bias, *inputs)
    assert used == form
    expected, plain = softmax(bias.keys, *inputs), softmax(None, *inputs)
    error, effect = (float((expected - x).abs().max()) for x in (out, plain))
    print(f"{form}, {kind}: error {error:.1e}, effect {effect:.3f}")
    assert out.dtype == kind
    assert error < ERROR[kind]
    assert effect > 40 * ERROR[kind]


@pytest.mark.parametrize("form", ["split", "folded"])
def test_rows_before_the_first_edited_one_are_left_alone(form):
    inputs = tensors()
    out, _ = attend(form, key_bias(), *inputs)
    expected = softmax(None, *inputs)
    torch.testing.assert_close(out[:, :, :FIRST].double(), expected[:, :, :FIRST], **CLOSE)
    assert (out[:, :, FIRST:] - expected[:, :, FIRST:]).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_weight_0_do_not_matter(form):
    bias, (query, key, value) = key_bias(beta=1.0), tensors()
    gone = (bias.keys == -math.inf)[:, None, :, None]
    assert gone.any()
    one, _ = attend(form, bias, query, key, value)
    other, _ = attend(form, bias, query, key, value.where(~gone, 1e4))
    assert torch.equal(one[:, :, FIRST:], other[:, :, FIRST:])


@pytest.mark.parametrize(("kind", "share"), [(torch.bfloat16, 2**-16), (torch.float16, 2**-21)])
def test_two_columns_hold_what_one_would_round(kind, share):
    bias, scaling = key_bias(), 128**-0.5
    _, columns = bias.columns(scaling, kind)
    held = columns[:, 0].double().sum(dim=2) * scaling
    changed = bias.keys != 0
    wrong = ((held - bias.keys) / bias.keys)[changed].abs().max()
    rounded = ((bias.keys.to(kind).double() - bias.keys) / bias.keys)[changed].abs().max()
    assert wrong <= share
    assert rounded > 16 * share


@pytest.mark.parametrize("form", ["split", "folded"])
def test_left_padding_is_never_folded(form):
    bias, inputs = key_bias(), tensors()
    real = torch.arange(COUNT) >= torch.tensor([[0], [4]])
    past = torch.ones(COUNT, COUNT, dtype=torch.bool).tril()
    out, used = attend(form, bias, *inputs, mask=past & real[:, None, None, :])
    assert used == ("split" if form == "split" else "masked")
    expected = softmax(bias.keys, *inputs, allowed=real)
    for item, start in enumerate((0, 4)):
        torch.testing.assert_close(
            out[item, :, start:].double(), expected[item, :, start:], **CLOSE
        )


@pytest.mark.parametrize("form", FORMS)
def test_two_biases_on_the_same_rows_stay_on_keys(form):
    one, inputs = key_bias(), tensors()
    other = KeyBias(key_bias(seed=1).keys, one.rows, FIRST)
    both = folding.add(one, other)
    assert isinstance(both, KeyBias)
    out, used = attend(form, both, *inputs)
    assert used == form
    expected = softmax(one.keys + other.keys, *inputs)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    assert (softmax(one.keys, *inputs) - expected).abs().max() > 0.1


def test_biases_of_other_rows_become_a_mask():
    one = key_bias()
    last = KeyBias(key_bias(seed=1).keys, torch.arange(COUNT).expand(2, -1) == 39, 39)
    both = folding.add(one, last)
    assert isinstance(both, torch.Tensor)
    assert torch.equal(both[:, 0, 30], one.keys)
    assert torch.equal(both[:, 0, 39], one.keys + last.keys)
    assert both[:, 0, :FIRST].abs().max() == 0


def test_heads_too_wide_for_the_kernel_are_not_folded():
    for width, form in ((248, "folded"), (249, "masked"), (256, "masked")):
        inputs = tensors(width=width)
        out, used = attend("folded", key_bias(), *inputs)
        assert used == form
        torch.testing.assert_close(out.double(), softmax(key_bias().keys, *inputs), **CLOSE)


def test_the_choice_is_made_by_size_device_and_possibility(monkeypatch):
    query, key, _ = tensors()
    late, early = key_bias(), KeyBias(key_bias().keys, key_bias().rows, 5)
    choose = partial(folding.choose_form, from_start=True)
    assert choose(late, query, key, None) == "masked"  # small
    monkeypatch.setattr(folding, "SMALL", COUNT * COUNT - 1)
    assert choose(late, query, key, None) == "split"
    assert choose(early, query, key, None) == "masked"
    assert folding.choose_form(late, query, key, None, from_start=False) == "masked"
    assert choose(late, query[:, :, -1:], key, None) == "masked"
    assert choose(late, query[:, :, 1:], key, None) == "masked"
    assert choose(late.dense, query, key, None) == "masked"
    with folding.forced("split"):
        assert choose(KeyBias(late.keys, late.rows, 0), query, key, None) == "masked"
        with folding.forced("folded"):
            assert choose(late, query, key, None) == "folded"
        assert choose(late, query, key, None) == "split"
    assert choose(late, query, key, None) == "split"


@pytest.mark.usefixtures("untyped")
def test_half_precision_on_cuda_is_folded(monkeypatch):
    """The choice looks at the device, type and shape only, so that stand-ins do for a GPU."""
    monkeypatch.setattr(folding, "SMALL", COUNT * COUNT - 1)
    monkeypatch.setattr(folding, "MANY_KEYS", COUNT)
    early = KeyBias(key_bias().keys, key_bias().rows, 5)

    def choose(kind, mask=None):
        one = SimpleNamespace(is_cuda=True, dtype=kind, shape=(2, HEADS, COUNT, WIDTH))
        return folding.choose_form(early, one, one, mask, from_start=True)

    assert choose(torch.bfloat16) == choose(torch.float16) == "folded"
    assert choose(torch.float32) == "masked"
    assert choose(torch.bfloat16, mask=torch.zeros(1)) == "masked"
    monkeypatch.setattr(folding, "MANY_KEYS", COUNT + 1)
    assert choose(torch.bfloat16) == "masked"


@pytest.fixture
def used(monkeypatch):
    """The forms that were used, in order."""
    forms, choose = [], folding.choose_form

    def spy(*args, **kwargs):
        forms.append(choose(*args, **kwargs))
        return forms[-1]

    monkeypatch.setattr(folding, "choose_form", spy)
    return forms


def logits(model, inputs, *methods, **options):
    options = {"max_new_tokens": 4, "do_sample": False} | options
    with torch.inference_mode(), cl.intervening(model, *methods):
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("heads", ["full", "grouped"])
@pytest.mark.parametrize("form", FORMS)
def test_a_models_logits_are_the_references(form, heads, ask, exact_of, used):
    lens = lens_of(heads, "sdpa")
    inputs = ask(lens).inputs
    with folding.forced(form), cl.intervening(lens.hf_model, cl.CLVA(tau=1.0)):
        found = lens.hf_model(**inputs).logits[0]
    assert set(used) == {form}
    ids, pixels, _ = reference.rows_of(inputs, 0)
    expected = reference.run(exact_of(heads), ids, pixels, [reference.Clva(tau=1.0)]).logits
    plain = reference.run(exact_of(heads), ids, pixels).logits
    error, effect = (float((expected - x).abs().max()) for x in (found, plain))
    print(f"{form}: error {error:.1e}, effect {effect:.3f}")
    assert error < 1e-4
    assert effect > 1000 * error


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("batch", [None, 3], ids=["one", "padded"])
@pytest.mark.parametrize("form", ["split", "folded"])
def test_generation_is_that_under_a_mask(form, batch, options, one, ask, used):
    inputs, model = ask(one, batch).inputs, one.hf_model
    expected = logits(model, inputs, cl.CLVA(tau=1.0))
    assert set(used) == {"masked"}
    used.clear()
    with folding.forced(form):
        found = logits(model, inputs, cl.CLVA(tau=1.0), **options)
    if batch is None:
        assert form in used
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (logits(model, inputs) - expected).abs().max() > 0.05


def test_two_methods_at_the_same_layers(one, ask, used):
    inputs, model = ask(one).inputs, one.hf_model
    methods = cl.CLVA(tau=1.0), cl.KnockOut(rows="last", layers=(8, 9))
    expected = logits(model, inputs, *methods)
    used.clear()
    with folding.forced("folded"):
        found = logits(model, inputs, *methods)
    assert "folded" in used and "masked" in used
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for method in methods:
        assert (logits(model, inputs, method) - expected).abs().max() > 0.05


def test_a_qformer_is_always_masked(one_blip, ask, used):
    prompt = one_blip.prompt(picture(0), QUESTIONS[0])
    expected = logits(one_blip.hf_model, prompt.inputs, cl.CLVA(tau=1.0, site="qformer"))
    used.clear()
    for form in ("split", "folded"):
        with folding.forced(form):
            found = logits(one_blip.hf_model, prompt.inputs, cl.CLVA(tau=1.0, site="qformer"))
        assert torch.equal(found, expected)
    assert set(used) == {"masked"}
