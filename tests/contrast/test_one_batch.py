"""Tokens of the prompt and of second inputs, read as rows of one batch: equal, and unseen."""

from contextlib import contextmanager

import contrasting
import pytest
import torch
from test_contrast_decoding import single
from test_contrast_reference import lens_for, lens_inputs
from tiny_models import QUESTIONS, lens_of, picture

import clva_lens as cl
from clva_lens.methods.one_batch import JoinedLayer, OneBatch
from clva_lens.models.kv_cache import cache_of

STEPS = 5
# Logits of another batch size differ by this much at most.
ATOL = 5e-5
METHODS = {
    "vcd": cl.VCD(noise_step=400, beta=0),
    "icd": cl.ICD(instruction=contrasting.DISTURBING, beta=0),
    "m3id": cl.M3ID(),
    "vdd": cl.VDD(),
}
ONE, TWO = METHODS["vcd"], cl.compose(cl.KnockOut(), METHODS["vcd"])


@contextmanager
def counting(monkeypatch, *, apart=False):
    """Count the passes of all rows; ``apart``: there are none."""
    joined = []
    join = OneBatch._join

    def count(self, *call):
        found = join(self, *call)
        joined.append(self.joined)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(OneBatch, "_join", count)
        if apart:
            patch.setattr(OneBatch, "start", lambda *_, **__: None)
        yield joined


def decode(lens, inputs, method, **options):
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    torch.manual_seed(0)
    with torch.inference_mode(), cl.intervening(lens, method):
        return lens.hf_model.generate(
            **inputs, **options, output_logits=True, return_dict_in_generate=True
        )


@pytest.mark.parametrize("how", ["greedy", "beams", "sampling"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llava", "instructblip"])
def test_it_is_what_two_passes_are(monkeypatch, family, rows, name, how):
    lens, method = lens_for(family), METHODS[name]
    inputs = lens_inputs(lens) if rows == 3 else single(lens_inputs(lens), 0)
    options = {"beams": {"num_beams": 3}, "sampling": {"do_sample": True}}.get(how, {})
    with counting(monkeypatch) as joined:
        one = decode(lens, inputs, method, **options)
    with counting(monkeypatch, apart=True) as never:
        two = decode(lens, inputs, method, **options)
    # A Q-Former's model takes no positions, so what is padded there is read by itself.
    padded = family == "instructblip" and rows == 3 and name in ("vcd", "icd")
    assert sum(joined) == (0 if padded else STEPS - 1) and not any(never)
    assert torch.equal(one.sequences, two.sequences)
    found, wanted = torch.stack(one.logits), torch.stack(two.logits)
    known = wanted.isfinite()
    assert torch.equal(known, found.isfinite())
    error = float((found - wanted)[known].abs().max())
    plain = decode(lens, inputs, None, max_new_tokens=1, **options).logits[0]
    effect = float((plain - wanted[0])[known[0]].abs().max())
    print(f"error {error:.1e}, effect {effect:.1e}")
    assert error <= ATOL < 100 * ATOL < effect
    for mine, other in zip(cache_of(one).layers, cache_of(two).layers, strict=True):
        assert type(mine) is type(other) and not isinstance(mine, JoinedLayer)
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=ATOL)
        torch.testing.assert_close(mine.values, other.values, rtol=0, atol=ATOL)


def inside(lens):
    return lens.hf_model.model.language_model.layers[3].mlp


def hooked(module, seen):
    return module.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))


def test_hooks_see_the_prompts_rows_alone(monkeypatch):
    """Wherever one hangs on: within the decoder, around it, or on the head; all rows are not."""
    lens = lens_of("full", "sdpa")
    inputs, model = single(lens_inputs(lens), 0), lens.hf_model
    wanted = decode(lens, inputs, ONE).sequences
    for module in (inside(lens), model.lm_head, model.model.language_model.norm):
        seen = []
        handle = hooked(module, seen)
        with counting(monkeypatch) as joined:
            assert torch.equal(decode(lens, inputs, ONE).sequences, wanted)
        handle.remove()
        assert set(seen) == {1} and not any(joined)
    outputs = []
    handle = model.register_forward_hook(lambda *call: outputs.append(call[-1].logits.shape[0]))
    with counting(monkeypatch) as joined:
        decode(lens, inputs, ONE)
    handle.remove()
    assert set(outputs) == {1} and any(joined)


def test_a_hook_may_come_and_go(monkeypatch):
    """Between two tokens: from there on the passes are two, and then one again."""
    lens = lens_of("full", "sdpa")
    inputs, seen, handles = single(lens_inputs(lens), 0), [], []
    wanted = decode(lens, inputs, ONE)

    def change(ids, scores):
        if len(ids[0]) == inputs["input_ids"].shape[1] + 2:
            handles.append(hooked(inside(lens), seen))
        elif handles:
            handles.pop().remove()
        return scores

    with counting(monkeypatch) as joined:
        out = decode(lens, inputs, ONE, logits_processor=[change])
    assert joined == [False, True, True, False, True] or joined == [False, True, False, True, True]
    assert seen == [1]
    assert torch.equal(out.sequences, wanted.sequences)
    torch.testing.assert_close(
        torch.stack(out.logits), torch.stack(wanted.logits), rtol=0, atol=ATOL
    )


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_kept_or_cached_otherwise_is_read_apart(monkeypatch, options):
    lens = lens_of("full", "eager")
    inputs = single(lens_inputs(lens), 0)
    wanted = decode(lens, inputs, ONE).sequences
    with counting(monkeypatch) as joined:
        out = decode(lens, inputs, ONE, **options)
    assert joined and not any(joined)
    assert torch.equal(out.sequences, wanted)
    if "output_hidden_states" in options:
        assert {len(one) for step in out.hidden_states for one in step} == {1}


@pytest.mark.parametrize("kept", ["output_hidden_states", "output_attentions"])
def test_a_model_that_was_asked_for_more_once_is_read_in_one_batch_again(monkeypatch, kept):
    """transformers' hooks stay on the modules; asked again, they see the prompt's rows alone."""
    lens = lens_of("grouped", "eager")
    inputs = single(lens_inputs(lens), 0)
    first = decode(lens, inputs, ONE, **{kept: True})
    with counting(monkeypatch) as joined:
        after = decode(lens, inputs, ONE)
    assert sum(joined) == STEPS - 1
    with counting(monkeypatch) as joined:
        again = decode(lens, inputs, ONE, **{kept: True})
    assert joined and not any(joined)
    kind = kept.removeprefix("output_")
    assert {len(one) for step in getattr(again, kind) for one in step} == {1}
    assert torch.equal(first.sequences, after.sequences)
    assert torch.equal(first.sequences, again.sequences)


def test_other_sessions_and_traces_see_passes_of_their_own(monkeypatch):
    lens = lens_of("full", "sdpa")
    prompt = lens.prompt(picture(0), QUESTIONS[0])
    with counting(monkeypatch) as joined:
        decode(lens, prompt.inputs, TWO)
        with cl.observing(lens):
            decode(lens, prompt.inputs, ONE)
        with cl.intervening(lens, ONE), lens.generate(prompt, max_new_tokens=3) as tracer:
            hidden = lens.model.language_model.layers[3].output
            hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).save()
            tracer.result.save()
    assert len(hidden) == 1
    assert joined and not any(joined)


def test_pictures_that_are_read_once_have_the_same_answers(monkeypatch):
    lens = lens_of("full", "sdpa")
    asked = [(picture(0), question) for question in QUESTIONS[:3]]
    how = cl.Greedy(max_new_tokens=STEPS)
    for name in ("vcd", "icd", "m3id"):
        with counting(monkeypatch, apart=True):
            wanted = cl.generate(lens, asked, METHODS[name], how, share="picture")
        with counting(monkeypatch):
            found = cl.generate(lens, asked, METHODS[name], how, share="picture")
        assert [one.tolist() for one in found.ids] == [one.tolist() for one in wanted.ids]
        assert found.margins == pytest.approx(wanted.margins, abs=ATOL)


def test_a_pass_that_fails_leaves_nothing():
    """The model's cache has its own layers again, and no hook is left."""
    lens = lens_of("full", "sdpa")
    inputs, model = single(lens_inputs(lens), 0), lens.hf_model
    decoder, ids, update = model.model.language_model, inputs["input_ids"], JoinedLayer.update
    calls, caches = [], []

    def fail(self, *given, **options):
        calls.append(self)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return update(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(JoinedLayer, "update", fail)
        with pytest.raises(RuntimeError, match="out of memory"), cl.intervening(lens, ONE):
            caches.append(cache_of(model(**inputs, use_cache=True)))
            places = torch.full((1, 1), ids.shape[1])
            model(input_ids=ids[:, -1:], position_ids=places, cache=caches[0])
    assert not any(isinstance(layer, JoinedLayer) for layer in caches[0].layers)
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks
    assert torch.equal(decode(lens, inputs, ONE).sequences, decode(lens, inputs, ONE).sequences)
